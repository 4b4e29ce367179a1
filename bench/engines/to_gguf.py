"""`python -m bench.engines.to_gguf SOURCE MODEL OUTPUT`: llama.cpp's own converter, for a model whose tokenizer it has not met.

It knows tokenizers by a hash and refuses others. Benchmarks give token ids, so any known name will do.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    source, model, output = (str(Path(word).absolute()) for word in sys.argv[1:4])
    sys.path.insert(0, source)
    from conversion.base import TextModel

    def known(*_: Any) -> str:
        return "gpt-2"

    TextModel.get_vocab_base_pre = known
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", output, "--outtype", "bf16"]
    runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")


if __name__ == "__main__":
    main()
