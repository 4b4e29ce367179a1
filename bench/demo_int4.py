"""Make the demo's four-bit target: ``python -m bench.demo_int4``, from the repository's root.

GPTQ in groups of 32 with zero points, calibrated on files that the target was trained on: those of the running
interpreter's standard library, or of ``--data``, without the held-out ones. `configs/demo/target-int4` was made under
CPython 3.11.7, whose library the target knows.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from bench.train_demo import split
from launcher.quantize import main as quantize

RECIPE = ["--method", "gptq", "--group-size", "32", "--asymmetric", "--samples", "128", "--length", "512"]


def main() -> int:
    """Returns what `quasar quantize` returns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("configs/demo"), help="folder that holds the models")
    parser.add_argument("--data", type=Path, help="the folder the target was trained on (default: the standard library)")
    options = parser.parse_args()
    training, _ = split(options.data)
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "calibration.jsonl"
        text.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in training))
        output = options.demo / "target-int4"
        model = ["--model", str(options.demo / "target"), "--output", str(output)]
        code = quantize([*model, "--calibration", str(text), *RECIPE])
    (output / "training.json").unlink(missing_ok=True)  # the model card's, of models that were trained
    return code


if __name__ == "__main__":
    sys.exit(main())
