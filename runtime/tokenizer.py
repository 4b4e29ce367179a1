"""The tokenizer of a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class TokenizerError(Exception):
    """The model's tokenizer cannot be loaded."""


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a model directory. Raises TokenizerError; never looks anywhere but there.

    AutoTokenizer and not a class of our choice, because the rules by which it picks one belong to the model's format.
    It imports torch, so it is imported here and not at the top: nothing else of the launcher's files needs either.
    """
    if not Path(directory).is_dir():
        raise TokenizerError(f"no tokenizer: {directory} is not a directory")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # whatever a broken directory makes transformers raise
        raise TokenizerError(f"cannot load the tokenizer of {directory}: {error}") from error
