"""Every causal-LM architecture of transformers: it gives transformers' logits on any number of ranks, or says why not.

All of them run in float32 on 1 to 4 ranks, token by token or in chunks, with 1, 2 or 4 KV heads for 8 query heads. With four
bits, whose cuts depend on groups and not on the architecture, each runs on a number of ranks that is drawn. Where there are no
experts a pass asks nothing of the host, so that a CUDA graph can hold it.
"""

import random
import re
from pathlib import Path

import pytest
import torch
import transformers
from architectures import KINDS, build, quantised, row
from near_ties import decided
from tiny_models import config_of, logits_on

from runtime.checkpoint import ModelError
from tests.alone import check_capturable

MODELS = Path(__file__).parents[1] / "MODELS.md"
TABLED = f"transformers {transformers.__version__}" in MODELS.read_text()

pytestmark = pytest.mark.usefixtures("one_thread")


def listed() -> dict[str, str]:
    """The rows of the table in MODELS.md by architecture."""
    return {match[1]: match[0] for match in re.finditer(r"^\| `([^`]+)` \|.*$", MODELS.read_text(), re.M)}


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_as_in_transformers_or_says_why_not(kind: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    why = ""
    try:
        model = build(kind, tmp_path, seed, num_key_value_heads=rng.choice([1, 2, 4]))
        sequences, wanted = decided(model, rng, 3)
        for size in (1, 2, 3, 4):
            found = logits_on(size, config_of(tmp_path), sequences, rng, rng.choice([1, 5, 40]))
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)
        if TABLED:  # older ones may do what a graph cannot hold; such passes are launched one by one
            check_capturable(tmp_path)
        quantised(model, tmp_path, 32)
        sequences, wanted = decided(model, rng, 3)
        config = config_of(tmp_path, quantization="int4", group_size=32, activations="16bit")
        for a, b in zip(logits_on(rng.randint(1, 4), config, sequences, rng), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)
    except ModelError as error:
        why = str(error)
    if TABLED:
        assert row(kind, why) == listed()[kind], "python -m tests.architectures makes the table anew"


def test_the_table_lists_all() -> None:
    if TABLED:
        assert sorted(listed()) == KINDS
