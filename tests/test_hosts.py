"""Two hosts: network namespaces with a cable between them, CURVE for the coordinator, gloo for the ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import jobs
from workers.keys import make

HOSTS = {"a": "10.77.0.1", "b": "10.77.0.2"}


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def namespaces() -> Iterator[dict[str, str]]:
    """Names of two namespaces that reach each other and nothing else."""
    names = {host: f"quasar-{os.getpid()}-{host}" for host in HOSTS}
    cable = {host: f"q{os.getpid() % 10**6}{host}" for host in HOSTS}
    try:
        made = all(ip("netns", "add", name) for name in names.values())
        ends = [word for host in HOSTS for word in ("name", cable[host], "netns", names[host])]
        made = made and ip("link", "add", *ends[1:4], "type", "veth", "peer", *ends[4:])
        if not made:
            pytest.skip("this machine lets nobody make network namespaces")
        for host, name in names.items():
            assert ip("-n", name, "addr", "add", f"{HOSTS[host]}/24", "dev", cable[host])
            assert ip("-n", name, "link", "set", cable[host], "up") and ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names.values():
            ip("netns", "del", name)


def command(namespace: str, node: int, launch: list[str]) -> list[str]:
    return ["ip", "netns", "exec", namespace, *launch, "--node_rank", str(node)]


def test_two_hosts_give_what_one_gives(namespaces: dict[str, str], tmp_path: Path) -> None:
    prompts = jobs.write_requests(tmp_path / "in.jsonl", 6)
    one, two, keys = tmp_path / "one", tmp_path / "two", tmp_path / "keys"
    one.mkdir(), two.mkdir(), make(keys)
    expected = jobs.run("torchrun", 2, one, prompts=prompts)
    overrides = ["coordination.endpoint=tcp://10.77.0.1:5557", f"coordination.curve={keys}"]
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nnodes", "2", "--nproc_per_node", "1"]
    torchrun += ["--master_addr", HOSTS["a"], "--master_port", "29511"]
    running = []
    for node, name in enumerate(namespaces.values()):
        launch = [*command(name, node, torchrun), "launcher/main.py"]
        running.append(jobs.start(launch, two, *overrides, prompts=prompts))
    for job in running:
        code, printed = jobs.finish(job)
        assert code == 0, printed
    assert jobs.rows(two) == expected


ACROSS = """
import torch
from configs.load import load
from launcher.topology import board, discover
from workers.build import Place, connect
topology = discover()
posted = board(topology, 60)
place = Place(topology.rank, 0, [(0, 1)], 0, 1, False, posted.share("job", "j" if topology.rank == 0 else None))
comm = connect(load(None, ["model.target=x"]), place, torch.device("cpu"))
assert type(comm).__name__ == "TorchGroup" and topology.launcher == "mpi"
print(f"sum {comm.all_reduce(torch.tensor([topology.rank + 1.0])).item()}\\n", end="", flush=True)
"""


def test_ranks_under_mpirun_meet_over_gloo_where_they_share_no_memory() -> None:
    if not jobs.available("mpirun"):
        pytest.skip("mpirun is not installed")
    words = [*jobs.launcher_command("mpirun", 2)[:-1], "-c", ACROSS]
    done = subprocess.run(words, cwd=jobs.ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.count("sum 3.0") == 2, done.stdout + done.stderr


def test_hosts_without_an_endpoint_are_told_what_to_set(tmp_path: Path) -> None:
    prompts = jobs.write_requests(tmp_path / "in.jsonl", 2)
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    words = ["env", *(f"{k}={v}" for k, v in (environment | {"MASTER_PORT": jobs.free_port()}).items())]
    code, printed = jobs.finish(jobs.start([*words, sys.executable, "launcher/main.py"], tmp_path, prompts=prompts))
    assert code == 2 and "coordination.endpoint" in printed
