"""Weights that visit the device by turns are the same weights, and never more than two layers of them are there."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.batch import Batch, Piece
from runtime.belt import Belt, Carried
from runtime.comm import Communicator
from runtime.kernels import reference
from runtime.kernels.reference import ALIGNMENT
from runtime.kv_cache import KVCache
from runtime.linear import RowParallel
from runtime.model import Model, load_model
from tests.tiny_models import config_of, make, on_ranks, prompts, ragged, run, save

LAYERS = 5
CPU = torch.device("cpu")


def inside(weight: Tensor, belt: Belt) -> bool:
    """Whether a tensor's memory is one of the belt's buffers."""
    first, last = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    return any(buffer.data_ptr() <= first and last <= buffer.data_ptr() + buffer.nbytes for buffer in belt._buffers)


def test_whatever_the_order_of_visits(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        belt, weights = Belt(CPU), list[list[Tensor]]()
        for layer in range(rng.randint(1, 6)):
            shapes = [(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(rng.randint(1, 4))]
            weights.append([torch.randn(shape) for shape in shapes])
            for weight in weights[-1]:
                carried = belt.carry(layer, weight, reference)
                assert (carried.out_features, carried.in_features, carried.nbytes) == (*weight.shape, 0)
        largest = max(sum(-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in layer) for layer in weights)
        assert belt.start() == 2 * largest
        for _ in range(30):
            layer = rng.randrange(len(weights))
            for index in rng.sample(range(len(weights[layer])), len(weights[layer])):
                there = belt.weight(layer, index)
                assert torch.equal(there, weights[layer][index])
                assert inside(there, belt) and there.data_ptr() % ALIGNMENT == 0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", [1, 2])
def test_a_model_gives_the_same_bits(
    size: int, fused: bool, seed: int, tmp_path: Path, request: pytest.FixtureRequest, one_thread: None
) -> None:
    if not fused:
        request.getfixturevalue("unfused")
    config = config_of(save(make("llama", seed, torch.bfloat16, num_hidden_layers=LAYERS), tmp_path), quantization="none")
    rng = random.Random(seed)
    sequences = prompts(rng)
    batches = ragged(sequences, rng, 9)

    def both(comm: Communicator) -> None:
        here, visiting = load_model(config, comm), load_model(config, comm, visiting=True)
        assert (here.decoder is not None) == (visiting.decoder is not None) == fused
        for expected, found in zip(*(run(model, batches, len(sequences)) for model in (here, visiting)), strict=True):
            assert torch.equal(found, expected)
        check_turns(here, visiting)

    on_ranks(size, both)


def check_turns(here: Model, visiting: Model) -> None:
    """All layers come once in a pass, and all that is on the device of them are two buffers."""
    outputs = [module.product for module in visiting.module.modules() if isinstance(module, RowParallel)]
    (belt,) = {product._belt for product in outputs if isinstance(product, Carried)}
    assert [len(held) for held in belt._held.values()] == [4] * LAYERS, "q/k/v, o, gate/up, down"
    layer = sum(belt.shape(0, index).numel() * 2 for index in range(4))
    assert here.weight_bytes - visiting.weight_bytes == (LAYERS - 2) * layer
    assert sum(buffer.nbytes for buffer in belt._buffers) == 2 * layer
    before = belt.fetched
    cache = KVCache(visiting.cache_shape, 1, 8, visiting.dtype)
    for passes in range(1, 4):
        visiting.forward(Batch.build([Piece([3, 4], 0, [0], 1)], 8), cache)
        assert belt.fetched - before == passes * LAYERS, "the next layer is under way while one is computed"
