"""The models of a rank: whose output it is, what is certified, what drafts."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.schema import RunConfig
from runtime.checkpoint import read_json
from runtime.comm import Communicator, Solo
from runtime.model import Model, load_model
from workers.loading import Loading

log = logging.getLogger(__name__)


class BuildRefused(Exception):
    """The configuration asks for what this machine or these models cannot give; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Models:
    """verifier: whose output it is. cheap: the int4 model where the verifier certifies it. replica: the draft model."""

    verifier: Model
    cheap: Model | None
    replica: Model | None

    @property
    def fast(self) -> Model:
        """The one whose rounds are many."""
        return self.cheap or self.verifier

    @property
    def cached(self) -> list[Model]:
        """Those with a cache of their own: what is certified shares the verifier's."""
        return [model for model in (self.verifier, self.replica) if model is not None]

    @property
    def capturable(self) -> bool:
        """Whether rounds on the device can be CUDA graphs."""
        return self.fast.capturable and (self.replica is None or self.replica.capturable)

    @property
    def digest(self) -> str:
        return "".join(model.digest for model in (self.verifier, self.cheap, self.replica) if model is not None)


def load_models(config: RunConfig, comm: Communicator, inner: Communicator, device: torch.device, aloud: bool) -> Models:
    """Loads what the configuration names, in step with the other ranks. Raises BuildRefused, ModelError, CannotShard.

    comm: by which the verifier's ranks exchange; inner: by which those of a model do that it certifies. aloud: say on stderr
    how far it has come, where it takes long.
    """
    verifier = load_verifier(config, comm, device, Loading(config.verifier.target, aloud))
    cheap = load_cheap(config, verifier, inner, device, Loading(config.model.target, aloud)) if config.certified else None
    return Models(verifier, cheap, load_replica(config, device))


def load_verifier(config: RunConfig, comm: Communicator, device: torch.device, loading: Loading) -> Model:
    """The target; or the 16-bit model that certifies, as it was before anybody rounded it."""
    directory = Path(config.verifier.target)
    if config.certified and "quantization_config" in read_json(directory, "config.json"):
        raise BuildRefused(
            f"{directory} is stored in few bits, and what certifies is the 16-bit model it was made of: name that model's "
            "directory in verification.reference"
        )
    visiting = config.verification.certify_weights == "host"
    engine = config.engine
    return load_model(config.verifier, comm, device, engine.max_model_len, visiting, engine.reproducible, on_part=loading)


def load_cheap(config: RunConfig, verifier: Model, comm: Communicator, device: torch.device, loading: Loading) -> Model:
    """The int4 model, for the verifier's cache: so of the same dtype, and split the same way."""
    reference, target = Path(config.verifier.target), Path(config.model.target)
    check_same_words("model.target", target, reference)
    dtype = str(verifier.dtype).removeprefix("torch.")
    own = config.model.model_copy(update={"dtype": dtype})
    cheap = load_model(own, comm, device, config.engine.max_model_len, on_part=loading)
    if (cheap.cache_shape, cheap.vocab_size) != (verifier.cache_shape, verifier.vocab_size):
        raise BuildRefused(
            f"verification.certify: {target} has {tuple(cheap.cache_shape)} layers, key-value heads on this rank and their "
            f"width, and {cheap.vocab_size} tokens, {reference} {tuple(verifier.cache_shape)} and {verifier.vocab_size}, and "
            "the two share a cache; use a model.target made of the other, and a parallel.tensor and model.group_size with "
            "which both have as many heads on every rank"
        )
    return cheap


def load_replica(config: RunConfig, device: torch.device) -> Model | None:
    """The draft model, whole and unquantised, for the methods that use one."""
    directory = config.speculation.model
    if config.speculation.method not in ("auto", "model") or directory is None or config.speculation.width == 0:
        return None
    check_same_words("speculation.model", Path(directory), Path(config.verifier.target))
    draft_config = config.model.model_copy(update={"target": directory, "quantization": "none"})
    return load_model(draft_config, Solo(), device)


def check_same_words(key: str, draft: Path, target: Path) -> None:
    """Raises BuildRefused unless both tokenizers give the same ids to the same words; either may have unused ids more."""
    try:
        words = [json.loads((path / "tokenizer.json").read_text())["model"]["vocab"] for path in (target, draft)]
    except (OSError, KeyError, ValueError):
        log.warning("cannot compare the tokenizers of %s and %s: one has no readable tokenizer.json", target, draft)
        return
    if words[0] != words[1]:
        raise BuildRefused(f"{key} {draft} has another vocabulary than {target}: its drafts would mean other words")
