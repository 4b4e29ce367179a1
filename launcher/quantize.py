"""Writes a model's weights in four bits: `quasar quantize --model DIR --output DIR --method rtn|gptq|awq|awq+gptq`.

The output is a model directory in compressed-tensors' `pack-quantized` format. One layer at a time is in memory, and the
same command goes on where it was stopped. Without a calibration file the model writes its own calibration text, for
which, and only for that, it is held whole.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs import exits
from launcher.atomic import write_whole

SAMPLES, LENGTH = 128, 512
TEXT = "quantization_calibration.json"
AT_ONCE = 32  # texts that are generated together


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    from runtime.quantize.layer import METHODS

    parser = argparse.ArgumentParser(prog="quasar quantize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of a 16-bit Hugging Face model")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--method", choices=METHODS, default="gptq", help="rtn needs no calibration")
    parser.add_argument("--bits", type=int, choices=(4,), default=4)
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128), default=128, help="weights that share a scale")
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=True,
                        help="no zero points")  # fmt: skip
    parser.add_argument("--asymmetric", dest="symmetric", action="store_false", help="a zero point for every group")
    parser.add_argument("--calibration", type=Path, help='text, or JSON lines with "text"; by default the model writes its own')
    parser.add_argument("--samples", type=int, default=SAMPLES, help="windows of calibration")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a window")
    parser.add_argument("--activation-order", action=argparse.BooleanOptionalAction, default=True,
                        help="gptq: inputs of large magnitude first, under scales fixed before")  # fmt: skip
    parser.add_argument("--damping", type=float, default=0.01, help="gptq: added to the diagonal, as a share of its mean")
    parser.add_argument("--seed", type=int, default=0, help="of the text that the model writes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    given = parser.parse_args(arguments)
    if given.samples < 1 or given.length < 2 or not 0 < given.damping <= 1:
        parser.error("--samples is at least 1, --length at least 2, --damping between 0 and 1")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Quantises a model and returns the exit code; the README lists them."""
    given = parse_arguments(arguments)
    import torch
    from rich.progress import Progress

    from launcher.corpus import BadText
    from runtime.checkpoint import ModelError
    from runtime.quantize.layer import Recipe
    from runtime.quantize.stream import quantize_model
    from runtime.tokenizer import TokenizerError

    recipe = Recipe(given.method, given.group_size, given.symmetric, given.activation_order, given.damping)
    try:
        calibration = None if given.method == "rtn" else torch.tensor(calibrate(given))
        with Progress(disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("layers", total=None)
            quantize_model(
                given.model, given.output, recipe, calibration, device=given.device,
                on_layer=lambda done, total: progress.update(task, completed=done, total=total),
            )  # fmt: skip
    except (ModelError, BadText, TokenizerError) as error:
        print(f"quasar: {error}", file=sys.stderr, flush=True)
        return exits.REFUSED
    except OSError as error:
        print(f"quasar: {given.output} cannot be written: {error}", file=sys.stderr, flush=True)
        return exits.INCOMPLETE
    print(f"{given.output}: {given.method}, groups of {given.group_size}", flush=True)
    return 0


def calibrate(given: argparse.Namespace) -> list[list[int]]:
    """Windows of calibration, all of one length."""
    from launcher.corpus import BadText, windows
    from runtime.checkpoint import read_json
    from runtime.tokenizer import load_tokenizer

    if given.calibration is None:
        # Kept beside the model: to go on after a stop takes the very same text, on whatever machine.
        kept, asked = given.output / TEXT, {"seed": given.seed, "samples": given.samples, "length": given.length}
        held = read_json(given.output, TEXT)
        if {name: held.get(name) for name in asked} != asked:
            held = asked | {"tokens": write_text(given)}
            given.output.mkdir(parents=True, exist_ok=True)
            write_whole(kept, json.dumps(held).encode())
        tokens: list[list[int]] = held["tokens"]
        return tokens
    found = windows(given.calibration, load_tokenizer(given.model), given.length)
    found = [window for window in found if len(window) == given.length]
    if not found:
        raise BadText(f"{given.calibration} holds no window of {given.length} tokens; a smaller --length takes less text")
    return [found[i * len(found) // given.samples] for i in range(min(given.samples, len(found)))]


def write_text(given: argparse.Namespace) -> list[list[int]]:
    """What the model writes by itself at temperature 1, from random first tokens: its own distribution, no data needed.

    Liu et al., "LLM-QAT", arXiv 2305.17888, section 3.1, without their greedy first tokens. Windows are filled up with
    further text where one ends.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from runtime.quantize.source import open_source

    open_source(given.model)  # refuses what transformers would fail on in its own words
    disable_progress_bar()
    torch.manual_seed(given.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(
        given.model, local_files_only=True, dtype="auto", attn_implementation="eager",  # others may drop soft caps
    ).to(given.device)  # fmt: skip
    found: list[list[int]] = []
    vocabulary = model.config.get_text_config().vocab_size
    while len(found) < given.samples:
        count = min(AT_ONCE, given.samples - len(found))
        first = torch.randint(0, vocabulary, (count, 1), device=given.device)
        made = model.generate(
            first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=given.length - 1, min_new_tokens=given.length - 1, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        found += made.tolist()
    return found


if __name__ == "__main__":
    sys.exit(main())
