"""How fast a model loads and is rounded to four bits, against `cat` of the same files.

Run from the repository's root: ``python -m bench.loading --work FOLDER``. Makes random weights of Qwen3-1.7B's shape in
several files (3.4 GB), then takes turns with `cat FILES > /dev/null`: cold, when the kernel has been asked to forget the
files' pages, so that both wait for the disk, and warm, when all pages are in memory, so that neither does.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from configs.schema import ModelConfig
from runtime.checkpoint import INDEX
from runtime.skeleton import build_skeleton, weight_names

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
FILE_BYTES = 1 << 30


def make(directory: Path, layers: int) -> None:
    """A model directory of random bfloat16 weights, in files of about FILE_BYTES."""
    config = AutoConfig.for_model("qwen3", num_hidden_layers=layers, dtype="bfloat16", **SHAPE)
    config.save_pretrained(directory)
    noise = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    where: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(where.values())) + 1:05}.safetensors"
        save_file(pending, directory / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(pending, file))
        pending.clear()

    for name, shape in weight_names(build_skeleton(config, torch.bfloat16)):
        count = torch.Size(shape).numel()
        pending[name] = noise.repeat(-(-count // len(noise)))[:count].view(shape).clone()
        if sum(tensor.nbytes for tensor in pending.values()) > FILE_BYTES:
            flush()
    flush()
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def forget(files: list[Path]) -> None:
    """Asks the kernel to drop what it holds of the files."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(directory: str, quantization: str, threads: int) -> None:
    """Loads once and prints the seconds it took."""
    from runtime.comm import Solo
    from runtime.kernels import select
    from runtime.model import load_model

    torch.set_num_threads(threads)
    select(torch.device("cpu"))  # its build is nobody's loading
    started = time.perf_counter()
    load_model(ModelConfig(target=directory, quantization=quantization), Solo())
    print(time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the model, kept for the next run")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--pages", nargs="+", choices=("cold", "warm"), default=["cold", "warm"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--once", help=argparse.SUPPRESS)  # int4 or none: what a process of its own loads
    given = parser.parse_args()
    directory = given.work / f"qwen3-1.7b-{given.layers}"
    if given.once:
        load(str(directory), given.once, given.threads)
        return
    if not (directory / INDEX).exists():
        directory.mkdir(parents=True, exist_ok=True)
        make(directory, given.layers)
    files = sorted(directory.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    print(f"{size / 1e6:.0f} MB in {len(files)} files, {given.threads} threads")
    print("| pages | what | MB/s, best of the repeats | of cat's |\n|---|---|---|---|")
    words = ["--work", given.work, "--layers", given.layers, "--threads", given.threads, "--once"]
    for pages in given.pages:
        best: dict[str, float] = {}
        for _ in range(given.repeats):
            for what in ("cat", "int4", "none"):
                if pages == "cold":
                    forget(files)
                if what == "cat":
                    started = time.perf_counter()
                    with open(os.devnull, "wb") as nowhere:
                        subprocess.run(["cat", *files], stdout=nowhere, check=True)
                    seconds = time.perf_counter() - started
                else:
                    command = [sys.executable, "-m", "bench.loading", *map(str, words), what]
                    seconds = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                best[what] = max(best.get(what, 0.0), size / 1e6 / seconds)
        for what, rate in best.items():
            print(f"| {pages} | {what} | {rate:.0f} | {rate / best['cat']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
