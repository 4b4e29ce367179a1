"""The target as one rank holds it: transformers' architecture, our linears, our attention, our cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import lcm
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import ModelConfig
from runtime.attention import Pass
from runtime.batch import Batch
from runtime.belt import Belt
from runtime.checkpoint import DTYPES, Checkpoint, ModelError, read_json
from runtime.comm import Communicator
from runtime.decoder import Decoder, Trial, fuse
from runtime.experts import experts_of, steady_routers, unpack_files
from runtime.kernels import reference, select
from runtime.kernels.loose import loosened
from runtime.kv_cache import CacheShape, KVCache
from runtime.layout import lay_out
from runtime.linear import is_table
from runtime.loader import Loader, OnPart
from runtime.pointwise import steady
from runtime.products import Products
from runtime.quantize.schemes import Scheme, read_schemes
from runtime.rope import longest
from runtime.screened import Screened
from runtime.sequence import GREEDY_BELOW
from runtime.skeleton import build_config, build_skeleton, present_names, tied_weights, weight_names


@dataclass(frozen=True, eq=False)
class Model:
    """One rank's part of a causal language model; `load_model` makes it.

    dtype: of activations, cache and unquantised weights. cache_shape: what `KVCache` needs. vocab_first: the id of the
    first token of this rank's slice; vocab_size: of all ranks together. max_model_len: of a sequence, in tokens.
    end_tokens: its own. digest: hex, of the checkpoint, the same on all ranks. num_parameters: of the whole model.
    weight_bytes: of this rank's weights as they are held. ranks_alike: whether the same bits come from 1, 2, 4 and
    8 ranks. decoder: runs the model in transformers' place, if it can.
    """

    module: PreTrainedModel
    kernels: ModuleType
    device: torch.device
    dtype: torch.dtype
    cache_shape: CacheShape
    vocab_first: int
    vocab_size: int
    max_model_len: int
    end_tokens: frozenset[int]
    digest: str
    num_parameters: int
    weight_bytes: int
    ranks_alike: bool
    under_way: Pass
    decoder: Decoder | None

    @property
    def capturable(self) -> bool:
        """Whether a pass launches the same work for all batches of one shape, as a CUDA graph has to: experts are asked one
        after the other, for the rows that were sent to them, and a screened head for some tokens."""
        head = self.module.get_output_embeddings().siblings.product
        return next(experts_of(self.module), None) is None and not isinstance(head, Screened)

    @property
    def bytes_read(self) -> int:
        """Of the weights, what a pass reads: all but an embedding's table that isn't the head's weight too, and the weights
        that a screened head looks up."""
        table: Tensor = self.module.get_input_embeddings().weight  # type: ignore[assignment]
        head = self.module.get_output_embeddings().siblings.product
        kept = head.kept if isinstance(head, Screened) else 0
        return self.weight_bytes - kept - (0 if is_table(head, table) else table.nbytes)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Writes the batch's keys and values into the cache and returns logits [L, this rank's vocabulary], in dtype.

        All ranks of the group call this with the same batch; L may be 0. A token sees the tokens of its sequence before
        it, of this batch or in the cache. Raises PeerLost, and what kernels raise for a batch that doesn't fit the cache.
        """
        if self.decoder is not None:
            return self.decoder(batch, cache)
        return self.under_way.run(self.module, batch, cache, self.kernels)

    @torch.inference_mode()
    def best(
        self, batch: Batch, cache: KVCache, temperatures: Tensor, seeds: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`sampling.local_best` of what `forward` gives, to the same bits; no logits are written where no one needs them."""
        rest = torch.where(temperatures < GREEDY_BELOW, 0, temperatures), seeds, positions, self.vocab_first
        head = None if self.decoder is None else self.decoder.weight
        best: tuple[Tensor, Tensor]
        if self.decoder is None or head is None:
            best = self.kernels.best_tokens(self.forward(batch, cache), *rest)
        else:
            best = self.kernels.head_best(self.decoder.hidden(batch, cache), head, *rest)
        return best



def load_model(
    config: ModelConfig, comm: Communicator, device: torch.device | str = "cpu", length: int | None = None,
    visiting: bool = False, reproducible: bool = True, on_part: OnPart = lambda done, total: None,
) -> Model:  # fmt: skip
    """Builds the architecture, reads this rank's slices of the checkpoint, quantises and packs them.

    Weights that are stored in four bits are taken as they are, in the checkpoint's own groups; with quantization: none
    they are expanded to `dtype`. length: the longest sequence there will be, by default the longest that the model knows.
    visiting: the dense weights of layers stay in host memory, and are on the device by turns. reproducible: a row's bits
    depend on no other row; else libraries may add as they like. on_part: told what is loaded of how much, as it goes.

    Names, shapes and files are checked before anything is computed. Raises ModelError, CannotShard.
    """
    device = torch.device(device)
    if config.activations == "auto":
        config = config.model_copy(update={"activations": "int8" if device.type == "cpu" else "16bit"})
    description = build_config(config.target)
    known = longest(description)
    if length is not None and length > known:
        raise ModelError(
            f"engine.max_model_len is {length}, and {config.target} knows {known} positions, its rotary scaling included; "
            "lower it, or set a scaling under rope_parameters in config.json"
        )
    checkpoint = Checkpoint(config.target)
    try:
        dtype = _dtype(config, description, checkpoint)
        module = build_skeleton(description, dtype, length)
        checkpoint.rename(present_names(module))
        unpack_files(module, checkpoint)
        expected = dict(weight_names(module))
        tied = tied_weights(module)
        num_parameters = sum(weight.numel() for name, weight in module.named_parameters() if name in expected)
        schemes = read_schemes(read_json(config.target, "config.json"), module, checkpoint.shapes, tied)
        integers = _store(expected, schemes)
        companions = {name for path, scheme in schemes.items() for name in scheme.companions(path)}
        checkpoint.check(expected, _ignored(module, checkpoint) | set(tied) | companions, integers)
        layout = lay_out(module, _unit(config, schemes), comm.rank, comm.size)
        vocab_size = module.get_output_embeddings().out_features
        kernels = select(device) if reproducible else loosened(select(device))
        belt = Belt(device) if visiting else None
        products = Products(module, config, checkpoint, kernels, dtype, device, schemes, comm, belt)
        loader = Loader(module, products, comm)
        held = loader.fill(layout, tied, on_part)
    finally:
        checkpoint.close()
    if device.type == "cpu":
        steady(module)
    steady_routers(module)
    # On a GPU the reference's operations, which fold sums by halves, are no faster than transformers' own.
    own = device.type == "cpu" or kernels is not reference
    rounds = config.quantization == "int4" and config.activations == "int8"
    trial = Trial(module, kernels, layout.cache_shape, dtype, rounds)
    decoder = fuse(trial) if own else None
    if decoder is None:
        trial.run()
    return Model(
        module=module,
        kernels=kernels,
        device=device,
        dtype=dtype,
        cache_shape=layout.cache_shape,
        vocab_first=layout.head_span.start,
        vocab_size=vocab_size,
        max_model_len=length or known,
        end_tokens=_end_tokens(config, description),
        digest=checkpoint.digest,
        num_parameters=num_parameters,
        weight_bytes=held,
        ranks_alike=loader.ranks_alike,
        under_way=trial.under_way,
        decoder=decoder,
    )


def _store(expected: dict[str, tuple[int, ...]], schemes: dict[str, Scheme]) -> dict[str, str]:
    """Puts what is stored of quantised linears in their weights' place. Returns the kinds of integers by name."""
    for path, scheme in schemes.items():
        expected.update(scheme.tensors(path, *expected.pop(f"{path}.weight")))
    return {name: kind for path, scheme in schemes.items() for name, kind in scheme.integers(path).items()}


def _unit(config: ModelConfig, schemes: dict[str, Scheme]) -> int:
    """What a split must not cut: a group; of a checkpoint with several sizes, a whole number of each."""
    if schemes:
        return lcm(*(scheme.group_size for scheme in schemes.values()))
    return config.group_size if config.quantization == "int4" else 1


def _end_tokens(config: ModelConfig, description: Any) -> frozenset[int]:
    ends = read_json(config.target, "generation_config.json").get("eos_token_id")
    if ends is None:
        ends = description.get_text_config().eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def _dtype(config: ModelConfig, description: Any, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype asked for; `auto` is the config's or else the stored one. Raises ModelError."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    found = description.get_text_config().dtype or description.dtype
    if found is None:
        stored = {DTYPES.get(name) for name in checkpoint.dtypes.values()} - {torch.float64, None}
        found = next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in stored), torch.float32)
    if found not in (torch.bfloat16, torch.float16, torch.float32):
        raise ModelError(f"{config.target} is of dtype {found}; set model.dtype to bfloat16, float16 or float32")
    return found


def _ignored(module: PreTrainedModel, checkpoint: Checkpoint) -> set[str]:
    """Names a checkpoint may have without need: what the architecture says, and rotary frequencies of old files."""
    patterns = [*(module._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    return {name for name in checkpoint.shapes if any(re.search(pattern, name) for pattern in patterns)}
