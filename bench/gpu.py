"""One call that says what rounds and kernels are worth on the GPU at hand, in less than ten minutes.

    python -m bench.gpu                 # needs torch with CUDA and triton; see bench/README.md for what else
    python -m bench.gpu --dry-run       # tiny shapes in Triton's interpreter, on any machine: does it run at all

First the card's own ceilings, copying and dense products; then rounds and whole jobs of a model of a real shape
(`bench.gpu_rounds`), each kernel beside what torch has (`bench.gpu_kernels`), and the tests that need a card. Each part prints
what it has as it goes, and a part that fails, or lacks a package, takes no other along. Last comes what was reached of what
is wanted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch

from bench.goals import Reached
from bench.gpu_kernels import ceilings, check, every_product, other_kernels
from bench.parts import Tee, attempt
from bench.shapes import SHAPES as SHAPES_OF_MODELS
from runtime.kernels.gpu.table import slug

ROOT = Path(__file__).parent.parent
ROWS = [1, 2, 4, 8, 16, 32, 64]
MODEL, PRODUCTS, ALL = 300, 480, 570  # seconds after which no other round, no other product and nothing at all is begun


def rounds_and_jobs(shape: str, device: torch.device, copied: float, dry: bool, until: float, reached: Reached) -> None:
    """`bench.gpu_rounds`, which needs more packages than kernels do."""
    from bench.gpu_rounds import report

    report(shape, device, copied * 1e9, dry, until, reached)


def marked_tests(until: float) -> None:
    """Runs the tests that need a card. Raises RuntimeError for those that fail, ModuleNotFoundError without pytest."""
    importlib.import_module("pytest")
    left = max(30.0, until - time.monotonic())
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_triton*.py"))]
    print("\ntests marked gpu:", flush=True)
    try:
        tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *files]
        done = subprocess.run(tests, cwd=ROOT, timeout=left, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not done after {left:.0f} s") from error
    print(done.stdout)
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}")


def main(arguments: Sequence[str] | None = None) -> int:
    """All parts, the telling ones first. On a card what is printed goes into a file of `bench/results` as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in the interpreter, on a CPU")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shape", choices=SHAPES_OF_MODELS, default="qwen3-8b", help="of the model for rounds and whole jobs")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    if options.dry_run:
        return every_part(options, torch.device("cpu"), started)
    if not torch.cuda.is_available():
        print("no CUDA device; --dry-run runs tiny shapes on a CPU", file=sys.stderr)
        return 2
    path = ROOT / "bench/results" / f"gpu_{slug(torch.cuda.get_device_name())}_{date.today()}.md"
    with path.open("w") as file, contextlib.redirect_stdout(Tee(sys.stdout, file)):
        return every_part(options, torch.device("cuda"), started)


def every_part(options: argparse.Namespace, device: torch.device, started: float) -> int:
    """The exit code: 1 if a part has failed, or was left out."""
    dry, reached = options.dry_run, Reached()
    torch.manual_seed(0)
    print(f"{'dry run, times mean nothing' if dry else torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    copied, dense = ceilings(device, dry)
    print(f"copies {copied:.0f} GB/s, dense bf16 product {dense:.0f} TFLOP/s")
    print(f"our product's largest error, relative: {check(device, dry):.1e} (bfloat16 rounds by 3.9e-03)\n", flush=True)
    parts = {
        "rounds and jobs": lambda: rounds_and_jobs(options.shape, device, copied, dry, started + MODEL, reached),
        "other kernels": lambda: other_kernels(device, copied, dry, reached),
        "products": lambda: every_product(device, copied, dry, options.rows, started + PRODUCTS, reached),
        "tests": lambda: marked_tests(started + ALL),
    }
    passed = [attempt(what, part) for what, part in parts.items()]
    print(f"\n{time.monotonic() - started:.0f} seconds\n\n{reached.table()}")
    return int(not all(passed))


if __name__ == "__main__":
    raise SystemExit(main())
