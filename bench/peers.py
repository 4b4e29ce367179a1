"""`python -m bench.peers run --model DIR`: Quasar beside other engines, with the same checkpoint, prompts and lengths.

Every engine runs in a process and an environment of its own with as many threads, continues the same token ids greedily and
ignores end tokens. The clock starts when the model is loaded and a first short batch is done, and stops at the last
token. Engines take turns. `python -m bench.peers install NAME` makes a peer's environment; those that are there take part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.engines import setup
from bench.engines.driver import Job
from bench.jobs import ROOT, run_job
from bench.machine import describe, read_bandwidth
from bench.prompts import DEMO, Prompt, read_prompts, write_requests
from bench.tables import spread, table
from launcher.encoder import load_tokenizer

WEIGHTS = {
    "quasar": "int4 g128, screened head", "quasar-16bit": "bf16", "transformers": "bf16", "openvino": "int4 g128, int8 head",
    "llamacpp": "Q4_0", "vllm": "bf16",
}  # fmt: skip
SPECULATION = ("none", "ngram", "model")
ABLE = {"openvino": ("none", "ngram"), "llamacpp": ("none", "ngram"), "vllm": ("none", "ngram")}
ONE_AT_A_TIME = ("transformers",)  # takes drafts for a single sequence only


@dataclass(frozen=True)
class Contestant:
    """An engine and how it speculates."""

    engine: str
    speculation: str


def alone(who: Contestant) -> bool:
    return who.engine in ONE_AT_A_TIME and who.speculation != "none"


@dataclass(frozen=True)
class Measured:
    """tokens_per_second of new tokens; peak_memory_bytes of the processes that hold the model; texts in the prompts' order."""

    tokens_per_second: float
    peak_memory_bytes: int
    texts: list[str]


def run_ours(who: Contestant, batch: int, prompts: list[Prompt], given: argparse.Namespace, scratch: Path) -> Measured:
    write_requests(scratch / "requests.jsonl", prompts, given.new_tokens, 0.0)
    weights = {"model.quantization": "none"} if who.engine == "quasar-16bit" else {"model.lm_head": "screened"}
    settings: dict[str, Any] = weights | {
        "model.target": given.model, "engine.max_num_seqs": batch, "engine.max_model_len": 1024,
        "engine.threads": given.threads, "speculation.method": who.speculation, "speculation.model": given.draft_model,
        "speculation.num_speculative_tokens": given.drafts,
    }  # fmt: skip
    outcome = run_job(scratch / "job", 1, settings, "--input", str(scratch / "requests.jsonl"))
    summary = outcome.summary
    assert summary["output_tokens"] == len(prompts) * given.new_tokens
    memory = sum(summary["peak_memory_bytes"].values())
    return Measured(summary["tokens_per_second"], memory, [outcome.texts[key] for key in sorted(outcome.texts)])


def run_peer(who: Contestant, batch: int, prompts: list[Prompt], given: argparse.Namespace, scratch: Path) -> Measured:
    environment = given.environments / who.engine
    model = setup.prepare(who.engine, environment, given.model, given.work)
    job = Job(
        str(model), [tokens for _, tokens in prompts], given.new_tokens, batch, given.threads, who.speculation,
        given.drafts, str(given.draft_model),
    )  # fmt: skip
    (scratch / "peer.json").write_text(json.dumps(asdict(job)))
    files = [str(scratch / "peer.json"), str(scratch / "result.json")]
    command = [str(setup.python(environment)), "-m", f"bench.engines.{who.engine}", *files]
    done = subprocess.run(command, cwd=scratch, env=setup.environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise subprocess.SubprocessError(f"{who}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    result = json.loads(Path(files[1]).read_text())
    outputs: list[list[int]] = result["outputs"]
    assert [len(output) for output in outputs] == [given.new_tokens] * len(prompts), f"{who} made another number of tokens"
    tokenizer = load_tokenizer(given.model)
    texts = [tokenizer.decode(output, skip_special_tokens=True) for output in outputs]
    return Measured(len(outputs) * given.new_tokens / result["seconds"], result["peak_memory_bytes"], texts)


def agreement(found: list[str], wanted: list[str]) -> float:
    """The share of characters before the first that differs."""
    same = sum(next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
               for a, b in zip(found, wanted, strict=True))  # fmt: skip
    return same / max(1, sum(map(len, wanted)))


def compete(
    who: list[Contestant], prompts: list[Prompt], given: argparse.Namespace
) -> dict[tuple[Contestant, int], list[Measured]]:
    """What was measured of everybody, by batch; who fails is named and left out."""
    found: dict[tuple[Contestant, int], list[Measured]] = {}
    out = {(each, batch) for each in who for batch in given.batch if batch > 1 and alone(each)}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(given.repeats):
            for batch in given.batch:
                for each in who:
                    if (each, batch) in out:
                        continue
                    run = run_ours if each.engine.startswith("quasar") else run_peer
                    try:
                        measured = run(each, batch, prompts, given, Path(scratch))
                    except subprocess.SubprocessError as error:
                        print(f"left out: {error}", file=sys.stderr, flush=True)
                        out.add((each, batch))
                        continue
                    found.setdefault((each, batch), []).append(measured)
                    print(
                        f"turn {turn + 1}: {each}, batch {batch}: {measured.tokens_per_second:.1f}", file=sys.stderr, flush=True
                    )
    return found


def report(found: dict[tuple[Contestant, int], list[Measured]], given: argparse.Namespace) -> str:
    """The table, and ours over the best of the others for each batch and with and without n-grams."""
    head = ["engine", "weights", "drafts", "batch", "tokens/s", "quasar's int4 over it", "peak memory, GB"]
    head += ["text as quasar's int4", "as quasar's 16 bit"]
    speeds = {key: [each.tokens_per_second for each in runs] for key, runs in found.items()}
    rows = []
    for (who, batch), runs in found.items():
        ours = speeds.get((Contestant("quasar", who.speculation), batch))
        ratio = statistics.median(ours) / statistics.median(speeds[who, batch]) if ours else None
        alike = []
        for engine in ("quasar", "quasar-16bit"):
            wanted = found.get((Contestant(engine, "none"), batch))
            alike.append("-" if wanted is None else f"{agreement(runs[-1].texts, wanted[-1].texts):.0%}")
        rows.append([
            who.engine, WEIGHTS[who.engine], who.speculation, str(batch), spread(speeds[who, batch]),
            "-" if ratio is None else f"{ratio:.2f}", f"{max(each.peak_memory_bytes for each in runs) / 1e9:.1f}", *alike,
        ])  # fmt: skip
    return (
        table(head, rows)
        + "\n\n"
        + "\n".join(
            line for batch in given.batch for allowed in (("none",), SPECULATION) if (line := verdict(speeds, batch, allowed))
        )
    )


def verdict(speeds: dict[tuple[Contestant, int], list[float]], batch: int, allowed: tuple[str, ...]) -> str | None:
    """Our best over the others' best among these ways to speculate."""
    medians = {who: statistics.median(x) for (who, b), x in speeds.items() if b == batch and who.speculation in allowed}
    ours = [speed for who, speed in medians.items() if who.engine == "quasar"]
    theirs = [(speed, who) for who, speed in medians.items() if not who.engine.startswith("quasar")]
    if not ours or not theirs:
        return None
    speed, best = max(theirs, key=lambda pair: pair[0])
    kind = "without drafts" if len(allowed) == 1 else "with drafts or without"
    return f"- batch {batch}, {kind}: {max(ours) / speed:.2f} of the best peer ({best.engine}, {best.speculation})"


def contestants(given: argparse.Namespace) -> list[Contestant]:
    """Ours, and peers whose environments are there."""
    engines = [name for name in WEIGHTS if name.startswith("quasar") or setup.python(given.environments / name).exists()]
    every = [Contestant(name, kind) for name in engines for kind in ABLE.get(name, SPECULATION) if name in given.engines]
    return [each for each in every if each.speculation in given.speculation]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=ROOT / ".peers", help="folder of the peers' environments")
    commands = parser.add_subparsers(dest="command", required=True)
    installing = commands.add_parser("install", help="make the environment of a peer")
    installing.add_argument("name", choices=setup.INSTALL)
    running = commands.add_parser("run", help="measure")
    running.add_argument("--model", type=Path, required=True, help="such as `bench.enlarge` makes")
    running.add_argument("--draft-model", type=Path, default=ROOT / "configs/demo/draft")
    running.add_argument("--work", type=Path, help="where converted models stay; by default beside the model")
    running.add_argument("--prompts", type=Path, default=DEMO, help="batch file, Spec-Bench's question.jsonl, folder of texts")
    running.add_argument("--count", type=int, default=8, help="prompts")
    running.add_argument("--new-tokens", type=int, default=64)
    running.add_argument("--engines", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    running.add_argument("--speculation", nargs="+", choices=SPECULATION, default=list(SPECULATION))
    running.add_argument("--drafts", type=int, default=5, help="drafts a check, at most, for everybody")
    running.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    running.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    running.add_argument("--repeats", type=int, default=3)
    running.add_argument("--output", type=Path, help="file for the table, besides the terminal")
    given = parser.parse_args()
    given.environments = given.environments.absolute()
    if given.command == "install":
        setup.install(given.name, given.environments / given.name)
        return
    given.model, given.draft_model = given.model.absolute(), given.draft_model.absolute()
    given.work = (given.work or given.model.parent).absolute()
    prompts = read_prompts(given.prompts, given.model, given.count, 512)
    bandwidth = read_bandwidth(given.threads)
    found = compete(contestants(given), prompts, given)
    lengths = [len(tokens) for _, tokens in prompts]
    text = (
        f"{describe()}, {given.threads} threads for everybody; {bandwidth / 1e9:.1f} GB/s read\n\n"
        f"    {' '.join(['python -m bench.peers', *sys.argv[1:]])}\n\n"
        f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {given.new_tokens} new ones each, greedy.\n\n"
        f"{report(found, given)}\n"
    )
    print(text)
    if given.output:
        given.output.write_text(text)


if __name__ == "__main__":
    main()
