"""What four-bit weights change of a model's decisions, by method, group and activations.

Run from the repository's root: ``python -m bench.quantisation --model DIR --data HELDOUT.jsonl --work FOLDER``. The model
writes one calibration text, every method uses it, and all models read the same held-out windows. Quantised models stay
in FOLDER, so that a second run only compares.
"""

import argparse
import sys
import time
from itertools import product
from pathlib import Path

import torch

from configs.schema import ModelConfig
from launcher.corpus import windows
from launcher.quantize import calibrate
from launcher.quantize import parse_arguments as quantize_arguments
from runtime.comm import Solo
from runtime.compare import Comparison, logits_of
from runtime.model import Model, load_model
from runtime.quantize.layer import METHODS, Recipe
from runtime.quantize.stream import quantize_model
from runtime.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where quantised models go")
    parser.add_argument("--windows", type=int, default=48, help="of 512 held-out tokens, at most")
    parser.add_argument("--samples", type=int, default=64, help="windows of 512 tokens of calibration")
    every = [f"{m}-{g}-{k}" for g, k, m in product((128, 32), ("sym", "asym"), METHODS)]
    parser.add_argument("--variants", nargs="+", choices=every, default=every, metavar="METHOD-GROUP-KIND",
                        help="such as gptq-32-asym; by default all")  # fmt: skip
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    common = ["--model", str(given.model), "--output", str(given.work), "--samples", str(given.samples)]
    text = torch.tensor(calibrate(quantize_arguments(common)))

    models: dict[tuple[str, ...], Model] = {}
    for variant in given.variants:
        method, group, kind = variant.split("-")
        directory = given.work / variant
        recipe = Recipe(method, int(group), kind == "sym")
        quantize_model(given.model, directory, recipe, None if method == "rtn" else text)
        print(f"{time.monotonic() - started:5.0f} s  {directory.name}", file=sys.stderr, flush=True)
        for activations in ("16bit", "int8"):
            config = ModelConfig(target=str(directory), activations=activations)
            models[method, group, {"sym": "symmetric"}.get(kind, "zero points"), activations] = load_model(config, Solo())

    held_out = windows(given.data, load_tokenizer(given.model), 512, given.windows)
    inputs = [tokens[:-1] for tokens in held_out]
    reference = load_model(ModelConfig(target=str(given.model), quantization="none"), Solo())
    found = {key: Comparison() for key in models}
    streams = {key: logits_of(model, inputs) for key, model in models.items()}
    for tokens, wanted in zip(held_out, logits_of(reference, inputs), strict=True):
        for key, stream in streams.items():
            found[key].add(wanted, next(stream), torch.tensor(tokens[1:]))
    print("| weights | group | | activations | perplexity | KL, nats a token | decisions that flip | tokens before a flip |")
    print("|---|---|---|---|---|---|---|---|")
    first = next(iter(found.values())).summary()
    print(f"| 16 bit | | | 16bit | {first['reference_perplexity']:.3f} | | | |")
    for key, comparison in found.items():
        s = comparison.summary()
        print(
            f"| {' | '.join(key)} | {s['model_perplexity']:.3f} | {s['divergence']:.4f} | {100 * s['flips']:.2f} % "
            f"| {s['tokens_before_flip']:.1f} |"
        )
    print(f"\n{int(first['positions'])} positions, {len(text)} windows of calibration, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
