"""Tiny random models on disk, ranks as threads, and ragged batches: what the model's tests share."""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from configs.schema import ModelConfig
from runtime.batch import Batch, Piece
from runtime.comm import Communicator, Solo
from runtime.kv_cache import KVCache
from runtime.model import Model, load_model
from tests.branches import branches

VOCABULARY = 100  # seven units of 16, the last of them short
BLOCK = 8
BLOCKS = 40
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
    "intermediate_size": 160, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip

T = TypeVar("T")


def make(kind: str, seed: int, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model whose layers all matter, biases included."""
    config = AutoConfig.for_model(kind, **(SIZES | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Eager, which has all that a config may ask for: sdpa left soft caps out in transformers 5.17, and didn't say so.
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape) * (0.1 if weight.dim() == 1 else weight.shape[-1] ** -0.5)
            weight.data = (noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)).to(dtype)
        model.tie_weights()
    return model


def save(model: PreTrainedModel, directory: Path, sharded: bool = False) -> Path:
    model.save_pretrained(directory, max_shard_size="60KB" if sharded else "1GB")
    assert len(list(directory.glob("*.safetensors"))) > 1 or not sharded
    return directory


class Threads:
    """A group whose ranks are threads of this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.parts: list[Tensor | None] = [None] * size


class ThreadRank:
    through = None

    def __init__(self, group: Threads, rank: int) -> None:
        self.group, self.rank, self.size = group, rank, group.size
        self.calls = 0

    def all_gather(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.group.parts[self.rank] = x
        self.group.barrier.wait()
        out = torch.stack([part for part in self.group.parts if part is not None])
        self.group.barrier.wait()
        return out

    def all_reduce(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return branches(list(self.all_gather(x).float())).to(dtype or x.dtype)

    def barrier(self) -> None:
        self.group.barrier.wait()

    def close(self) -> None:
        self.group.barrier.abort()


def on_ranks(size: int, work: Callable[[Communicator], T]) -> list[T]:
    """Runs `work` on every rank of a group at once; the first error of a rank is raised."""
    if size == 1:
        return [work(Solo())]
    group = Threads(size)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRank(group, rank))
        except BaseException as error:
            errors.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [results[rank] for rank in range(size)]


def config_of(directory: Path, **changes: Any) -> ModelConfig:
    """Of 16 bit but for the changes; the head as well, so that all logits can be compared."""
    return ModelConfig(target=str(directory), **({"quantization": "none", "lm_head": "16bit"} | changes))


def ragged(sequences: list[list[int]], rng: random.Random, largest: int) -> list[list[tuple[int, Piece]]]:
    """Batches of random chunks of the sequences, in blocks that lie anywhere; all rows want logits."""
    free = rng.sample(range(BLOCKS), BLOCKS)
    blocks = [[free.pop() for _ in range(-(-len(tokens) // BLOCK))] for tokens in sequences]
    done = [0] * len(sequences)
    batches: list[list[tuple[int, Piece]]] = []
    while True:
        left = [i for i, tokens in enumerate(sequences) if done[i] < len(tokens)]
        if not left:
            return batches
        batch = []
        for i in rng.sample(left, rng.randint(1, len(left))):
            tokens = sequences[i][done[i] : done[i] + rng.randint(1, largest)]
            batch.append((i, Piece(tokens, done[i], blocks[i], len(tokens))))
            done[i] += len(tokens)
        batches.append(batch)


def run(model: Model, batches: list[list[tuple[int, Piece]]], num_sequences: int) -> list[Tensor]:
    """Logits of every sequence, [tokens, this rank's vocabulary]."""
    cache = KVCache(model.cache_shape, BLOCKS, BLOCK, model.dtype)
    for keys, values in zip(cache.keys, cache.values, strict=True):  # what nobody wrote must not matter
        keys.fill_(float("nan"))
        values.fill_(float("nan"))
    parts: list[list[Tensor]] = [[] for _ in range(num_sequences)]
    for batch in batches:
        logits = model.forward(Batch.build([piece for _, piece in batch], BLOCK), cache)
        for (i, piece), rows in zip(batch, logits.split([len(p.tokens) for _, p in batch]), strict=True):
            assert piece.num_logits == len(rows)
            parts[i].append(rows)
    return [torch.cat(rows) for rows in parts]


def logits_on(
    size: int, config: ModelConfig, sequences: list[list[int]], rng: random.Random, largest: int = 9, length: int | None = None
) -> list[Tensor]:
    """The sequences' logits over the whole vocabulary, from a group of `size` ranks and random batches."""
    batches = ragged(sequences, rng, largest)

    def work(comm: Communicator) -> tuple[int, list[Tensor]]:
        model = load_model(config, comm, length=length)
        return model.vocab_first, run(model, batches, len(sequences))

    ranks = on_ranks(size, work)
    assert [first for first, _ in ranks] == sorted(first for first, _ in ranks)
    return [torch.cat([parts[i] for _, parts in ranks], dim=-1) for i in range(len(sequences))]


def prompts(rng: random.Random, count: int = 4, longest: int = 60) -> list[list[int]]:
    return [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@torch.no_grad()
def reference(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """What transformers computes for one sequence, [tokens, vocabulary]."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0]
