"""Starts Quasar: this process becomes a rank of the job, whichever launcher started it.

    deepspeed --num_gpus 8 launcher/main.py --config FILE --input IN.jsonl --output OUT.jsonl
    torchrun --nproc_per_node 8 launcher/main.py ...
    mpirun -n 8 python launcher/main.py ...
    python launcher/main.py ...

`quantize` or `compare` as the first word is another program: `launcher/quantize.py`, `launcher/compare.py`. The job's first
rank starts the coordinator beside itself, unless `--role` says that it runs elsewhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: the repository, not launcher/, is where packages are looked for
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import importlib
import logging
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

from configs import exits
from configs.load import ConfigError, load
from configs.schema import RunConfig
from launcher.topology import Topology, TopologyError, board, discover

COMMANDS = ("quantize", "compare")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quasar", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, help="the run, in YAML")
    parser.add_argument("--input", help="batch file of requests; wins over files.input")
    parser.add_argument("--output", help="where results go; wins over files.output")
    parser.add_argument("--summary", help="where a JSON with the run's numbers goes; wins over files.summary")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="changes one key; repeatable")
    parser.add_argument(
        "--role",
        choices=("auto", "rank", "coordinator"),
        default="auto",
        help="auto: a rank, and the first rank starts the coordinator; the others are for a coordinator that runs alone",
    )
    parser.add_argument("--ranks", type=int, default=1, help="with --role coordinator: how many ranks the job has")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    return parser.parse_args(arguments)


def read_config(given: argparse.Namespace) -> RunConfig:
    """The configuration with the command line's files and overrides in it. Raises ConfigError."""
    files = [f"files.{name}={getattr(given, name)}" for name in ("input", "output", "summary") if getattr(given, name)]
    return load(given.config, [*given.set, *files])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs this process's part of the job and returns its exit code; the README lists them."""
    logging.basicConfig(level=logging.WARNING, format="quasar: %(message)s")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        return importlib.import_module(f"launcher.{words[0]}").main(words[1:])
    given = parse_arguments(words)
    try:
        config = read_config(given)
        if given.role == "coordinator":
            return run_coordinator(config, given)
        topology = discover()
        return run_rank(config, given, topology)
    except (ConfigError, TopologyError) as error:
        print(f"quasar: {error}", file=sys.stderr, flush=True)
        return exits.REFUSED


def run_coordinator(config: RunConfig, given: argparse.Namespace) -> int:
    from launcher.coordinate import coordinate, die_with_parent
    from workers.transport import TransportError

    endpoint = config.coordination.endpoint
    if endpoint is None:
        raise ConfigError("coordination.endpoint: needed by a coordinator that runs alone, such as tcp://10.0.0.1:5555")
    if os.environ.get("QUASAR_CHILD"):
        die_with_parent()
    _, groups = Topology(0, given.ranks, 0, given.ranks, "single").group(config.parallel.tensor)
    try:
        return coordinate(config, groups, endpoint)
    except TransportError as error:
        raise ConfigError(str(error)) from error


def run_rank(config: RunConfig, given: argparse.Namespace, topology: Topology) -> int:
    """Joins the job as this rank; the first rank brings the coordinator along."""
    # How long OpenMP's threads spin before they sleep, read as torch loads. By default long enough that one other busy
    # process on the machine makes everything many times slower; CONTRIBUTING.md has the numbers.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    group, groups = topology.group(config.parallel.tensor)
    one_host = topology.local_size == topology.size
    leads = topology.rank == 0
    endpoint = config.coordination.endpoint
    if endpoint is None and not one_host:
        raise ConfigError(
            "coordination.endpoint: needed where ranks run on several hosts, such as tcp://ADDRESS-OF-RANK-0:5555, "
            "with coordination.curve"
        )
    posted = board(topology, config.coordination.startup_timeout)
    scratch: str | None = None
    if endpoint is None:
        if leads:
            scratch = tempfile.mkdtemp(prefix="quasar-")  # of mode 0700: no other user can connect
        endpoint = posted.share("endpoint", f"ipc://{scratch}/coordinator" if leads else None)
    job = posted.share("job", secrets.token_hex(8) if leads else None)
    child = start_coordinator(given, topology.size, endpoint) if leads and given.role == "auto" else None
    store = getattr(posted, "store", None)
    try:
        # Only now: they take seconds, in which the coordinator starts, and which nobody need wait for who is refused.
        from workers.build import Place
        from workers.life import live

        place = Place(topology.rank, group, groups, topology.local_rank, topology.local_size, one_host, job, store)
        return live(config, place, endpoint, child)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def start_coordinator(given: argparse.Namespace, ranks: int, endpoint: str) -> subprocess.Popen[bytes]:
    """The coordinator as a process of its own, so that neither Python's lock nor a long forward ever delays it."""
    command = [sys.executable, str(Path(__file__).resolve()), "--role", "coordinator", "--ranks", str(ranks)]
    for name in ("config", "input", "output", "summary"):
        if getattr(given, name):
            command += [f"--{name}", str(getattr(given, name))]
    for override in [*given.set, f"coordination.endpoint={endpoint}"]:
        command += ["--set", override]
    ours = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    environment = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith(("OMPI_", "PMI", "PMIX_"))}
    return subprocess.Popen(command, env=environment | {"QUASAR_CHILD": "1", "CUDA_VISIBLE_DEVICES": ""})


if __name__ == "__main__":
    sys.exit(main())
