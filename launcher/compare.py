"""Says how far a model is from its reference: `quasar compare --reference DIR --model DIR --data FILE`.

Both read the same held-out text, each token predicted from the true ones before it. The reference runs in 16 bit, the
model as Quasar runs it: in four bits, those of its checkpoint or rounded while it loads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from configs import exits


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quasar compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reference", required=True, help="directory of the 16-bit model")
    parser.add_argument("--model", required=True, help="directory of the model to judge")
    parser.add_argument("--data", type=Path, required=True, help='held-out text, or JSON lines with "text"')
    parser.add_argument("--set", action="append", default=[], metavar="key=value",
                        help="a key of the configuration's model section, for the model; repeatable")  # fmt: skip
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8", "int8"], default="auto",
                        help="how the model's keys and values are held, as engine.kv_cache_dtype")  # fmt: skip
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--samples", type=int, help="windows at most, spread over the file; by default all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    given = parser.parse_args(arguments)
    if given.length < 2:
        parser.error("--length is at least 2")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares two models and returns the exit code; the README lists them."""
    given = parse_arguments(arguments)
    import yaml
    from pydantic import ValidationError
    from rich.progress import track

    from configs.schema import ModelConfig
    from launcher.corpus import BadText, windows
    from runtime.checkpoint import ModelError
    from runtime.comm import Solo
    from runtime.compare import compare
    from runtime.model import load_model
    from runtime.tokenizer import TokenizerError, load_tokenizer

    try:
        changes = {key.removeprefix("model."): yaml.safe_load(value) for key, _, value in (x.partition("=") for x in given.set)}
        judged = ModelConfig.model_validate({"target": given.model} | changes)
        plain = ModelConfig(target=given.reference, quantization="none", dtype=judged.dtype)
        text = windows(given.data, load_tokenizer(given.reference), given.length, given.samples)
        reference, model = (load_model(config, Solo(), given.device) for config in (plain, judged))
        steps = compare(reference, model, text, given.kv_cache_dtype)
        shown = track(steps, total=len(text), description="windows", disable=not sys.stderr.isatty(), transient=True)
        *_, found = shown
        summary = found.summary()
    except (ModelError, BadText, TokenizerError, ValidationError, yaml.YAMLError, ValueError) as error:
        print(f"quasar: {error}", file=sys.stderr, flush=True)
        return exits.REFUSED
    if given.json:
        print(json.dumps(summary))
        return 0
    print(f"positions              {summary['positions']}")
    print(f"perplexity             {summary['reference_perplexity']:.4f} -> {summary['model_perplexity']:.4f}")
    print(f"KL divergence          {summary['divergence']:.5f} nats a token")
    print(f"decisions that flip    {100 * summary['flips']:.2f} %")
    print(f"tokens before a flip   {summary['tokens_before_flip']:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
