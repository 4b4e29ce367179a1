"""`python -m bench.enlarge --shape qwen3-0.6b --output DIR`: a small trained model made as large as a real one.

What comes out computes the function of the small model and costs what the large shape costs: its text, and so the drafts
that stand, are those of a trained model; the bytes read and the sums made are those of the shape. It says nothing about
the quality of a model of that size. It is an ordinary Hugging Face directory that any engine loads.

The idea is Net2Net's (Chen, Goodfellow and Shlens, arXiv 1511.05641), without noise. The small model's weights are a block
of the large ones, times powers of two, so that nothing is rounded; every other weight is random where it is multiplied
with zero, and zero where it would be heard:

- **Width.** The hidden state begins with the small one and is zero behind it. The mean square of a norm would shrink by
  n = W / w, so the state is written several times, times powers of two whose squares add up to n: the digits of n in
  base 4. The norms then keep their epsilon. Their weights let the first copy pass and are zero at the others.
- **Heads.** A head of D = m d dimensions turns at every m-th of its frequencies as a head of d does, and keys lie there alone.
  Queries lie at the others as well, m times in all, which is what keeps the scores: norms of queries then change nothing,
  those of keys give sqrt(m) more, and the softmax takes sqrt(m) off. One thing is not exact where m is no power of 4: the
  epsilon of key norms counts as up to twice or half as much, 1e-6 beside mean squares of about one.
- **Four bits.** Groups along the inputs hold what they hold in the small model, so that the same group size makes the same
  codes, up to groups of D. A head's D inputs of the output projection are those around it in the small model; its values
  are zero but for its own d.
- **Depth.** New layers come last, and their output projections are zero.
- **Vocabulary.** A new word must never win, and no weights make a linear head constant. But the squares of a normed vector
  add up to its width: the last layer writes that sum, a tiny number, to a channel that nothing else uses, the last norm
  amplifies it, and a new word has a large negative weight there.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bench.jobs import ROOT
from bench.places import Places, need
from bench.shapes import SHAPES, Shape

SOURCE = ROOT / "configs/demo/target"
SPREAD = 0.02  # of new weights
# The constant of the last layer, what the last norm makes of it, and a new word's weight. A logit of a new word is
# CONSTANT * GAIN * WEIGHT over the root mean square of the last hidden state: about -800 for the demo's target. All three
# fit 16 bit of either kind, and the constant's square, over the width, is nothing beside a hidden state's.
CONSTANT, GAIN, WEIGHT = 2.0**-11, 2.0**15, -512.0
SOFTEN = 2.0**-4  # of the last layer's gates, so that its output projection isn't too small for 16 bit


class Enlarger:
    """Makes the large model's tensors, in bfloat16, a layer at a time."""

    def __init__(self, source: Path, small: Shape, large: Shape, seed: int = 0) -> None:
        self.small, self.large, self.places = small, large, Places(small, large)
        self._file = safe_open(source / "model.safetensors", framework="pt")
        self._random = torch.Generator().manual_seed(seed)
        self._factor = self.places.copies[0][1]

    def __call__(self) -> Iterator[dict[str, Tensor]]:
        """The tensors by name, in as many parts as layers, and one more for each of what stands before and after."""
        yield {"model.embed_tokens.weight": self._embedding()}
        for index in range(self.large.num_hidden_layers):
            prefix = f"model.layers.{index}."
            own = self._layer(prefix) if index < self.small.num_hidden_layers else self._new_layer(index)
            yield {prefix + name: weight for name, weight in own.items()}
        last = self._norm("model.norm.weight", self._factor if self.large.tie_word_embeddings else 1.0)
        if self.places.channel is not None:
            last[self.places.channel] = GAIN
        yield {"model.norm.weight": last} | ({} if self.large.tie_word_embeddings else {"lm_head.weight": self._head()})

    def _read(self, name: str) -> Tensor:
        """A small tensor in bfloat16; nothing is rounded. Raises CannotEnlarge."""
        weight: Tensor = self._file.get_tensor(name)
        need(weight.dtype == torch.bfloat16, f"{name} is {weight.dtype}, not bfloat16")
        return weight

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, SPREAD, generator=self._random)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    def _reading(self, weight: Tensor) -> Tensor:
        """[N, w] -> [N, W]: reads the small state, and what else comes in is zero."""
        out = self._new(len(weight), self.large.hidden_size)
        out[:, : self.small.hidden_size] = weight
        return out

    def _writing(self, weight: Tensor) -> Tensor:
        """[w, K] -> [W, K]: writes every copy, and zero elsewhere."""
        out = self._zeros(self.large.hidden_size, weight.shape[1])
        for first, factor in self.places.copies:
            out[first : first + len(weight)] = factor * weight
        return out

    def _norm(self, name: str | None, factor: float = 1.0) -> Tensor:
        """[W]: passes the first copy times the small norm's weight over `factor`, or as it is, and no other copy."""
        width = self.small.hidden_size
        out = torch.ones(self.large.hidden_size, dtype=torch.bfloat16)
        out[: width * len(self.places.copies)] = 0.0
        out[:width] = (1.0 if name is None else self._read(name)) / (self._factor * factor)
        return out

    def _layer(self, prefix: str) -> dict[str, Tensor]:
        width, made = self.large.intermediate_size, {}
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            made[name] = self._new(width, self.large.hidden_size)
            made[name][: self.small.intermediate_size] = self._reading(self._read(prefix + name))
        down = self._zeros(self.small.hidden_size, width)
        down[:, : self.small.intermediate_size] = self._read(prefix + "mlp.down_proj.weight")
        made["mlp.down_proj.weight"] = self._writing(down)
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            made[name] = self._norm(prefix + name)
        return made | {f"self_attn.{name}": w for name, w in self._attention(prefix + "self_attn.").items()}

    def _attention(self, prefix: str) -> dict[str, Tensor]:
        small, large, places = self.small, self.large, self.places
        wide, dim, size = large.hidden_size, small.head_dim, large.head_dim
        query = self._new(large.num_attention_heads, size, wide)
        key, value = (self._new(large.num_key_value_heads, size, wide) for _ in range(2))
        output = self._zeros(small.hidden_size, large.num_attention_heads, size)
        queries, keys, values = (self._reading(self._read(f"{prefix}{name}_proj.weight")).view(-1, dim, wide) for name in "qkv")
        outputs = self._read(f"{prefix}o_proj.weight")
        every = [places.turning(turn, dim) for turn in range(places.turns)]
        for seat, head in enumerate(places.heads):
            if head is not None:
                for positions in every:
                    query[seat, positions] = queries[head]
                block = outputs[:, head // places.turns * size :][:, :size]
                output[:, seat, : block.shape[1]] = block
        for seat, kind in enumerate(places.kv_heads):
            if kind is not None:
                head, turn = kind
                key[seat], value[seat] = 0.0, 0.0
                key[seat, every[0]] = keys[head] * 2.0 ** math.ceil(math.log2(places.turns) / 2)
                value[seat, turn * dim : (turn + 1) * dim] = values[head]
        made = {"q_proj.weight": query.flatten(0, 1), "k_proj.weight": key.flatten(0, 1), "v_proj.weight": value.flatten(0, 1)}
        made["o_proj.weight"] = self._writing(output.flatten(1))
        for name in ("q_norm.weight", "k_norm.weight"):
            made[name] = torch.empty(size, dtype=torch.bfloat16)
            for positions in every:
                made[name][positions] = self._read(prefix + name)
        return made

    def _new_layer(self, index: int) -> dict[str, Tensor]:
        """A layer that adds nothing, or, as the last, the constant."""
        large, wide, channel = self.large, self.large.hidden_size, self.places.channel
        queries, keys = large.num_attention_heads * large.head_dim, large.num_key_value_heads * large.head_dim
        made = {f"self_attn.{name}_norm.weight": torch.ones(large.head_dim, dtype=torch.bfloat16) for name in "qk"}
        made |= {f"self_attn.{name}_proj.weight": self._new(n, wide) for name, n in (("q", queries), ("k", keys), ("v", keys))}
        made["self_attn.o_proj.weight"] = self._zeros(wide, queries)
        gate, up = (self._new(large.intermediate_size, wide) for _ in range(2))
        down = self._zeros(wide, large.intermediate_size)
        made["input_layernorm.weight"] = self._norm(None)
        made["post_attention_layernorm.weight"] = self._norm(None)
        if channel is not None and index == large.num_hidden_layers - 1:
            # silu(a) a + silu(-a) (-a) = a^2, for each channel a of the normed state.
            width = self.small.hidden_size
            for sign, rows in ((1.0, slice(width)), (-1.0, slice(width, 2 * width))):
                for weight in (gate, up):
                    weight[rows, :width] = sign * SOFTEN * torch.eye(width, dtype=torch.bfloat16)
            down[channel, : 2 * width] = CONSTANT / (SOFTEN**2 * width)
        return made | {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up, "mlp.down_proj.weight": down}

    def _embedding(self) -> Tensor:
        """[V, W]; a tied one is the head as well."""
        out = self._new(self.large.vocab_size, self.large.hidden_size)
        out[: self.small.vocab_size] = self._writing(self._read("model.embed_tokens.weight").T).T
        return self._never(out) if self.large.tie_word_embeddings else out

    def _head(self) -> Tensor:
        """[V, W] of an untied head. A word's new weights stay within its own, whose largest may set the scale of the row."""
        out = self._new(self.large.vocab_size, self.large.hidden_size)
        own = self._read("model.embed_tokens.weight" if self.small.tie_word_embeddings else "lm_head.weight")
        rows, width = out[: self.small.vocab_size], self.small.hidden_size
        rows.clamp_(-own.abs().amax(1, keepdim=True), own.abs().amax(1, keepdim=True))
        rows[:, :width] = own
        if self.places.channel is not None:
            rows[:, self.places.channel] = 0.0
        return self._never(out)

    def _never(self, head: Tensor) -> Tensor:
        if self.places.channel is not None:
            head[self.small.vocab_size :, self.places.channel] = WEIGHT
        return head


def enlarge(source: Path, output: Path, shape: dict[str, Any], seed: int = 0) -> None:
    """Writes the large model: a file for each layer, and everything else of the small one's directory.

    source: a Qwen3 model in bfloat16 with default rotary positions. shape: the keys of `Shape`. No more than a layer or
    the embedding is in memory. Raises CannotEnlarge.
    """
    config = json.loads((source / "config.json").read_text())
    need(config["model_type"] == "qwen3", f"{source} is a {config['model_type']}, not a qwen3")
    need(config["rope_parameters"]["rope_type"] == "default", "scaled rotary positions aren't handled")
    large = Shape.of(shape)
    parts = Enlarger(source, Shape.of(config), large, seed)
    output.mkdir(parents=True, exist_ok=True)
    skipped = {"model.safetensors", "config.json", "training.json"}
    for path in source.iterdir():
        if path.name not in skipped:
            shutil.copy(path, output)
    config |= asdict(large) | {"max_window_layers": large.num_hidden_layers}
    config.pop("layer_types", None)
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    places: dict[str, str] = {}
    count, total = large.num_hidden_layers + 2, 0
    for number, tensors in enumerate(parts(), 1):
        name = f"model-{number:05}-of-{count:05}.safetensors"
        save_file({key: weight.contiguous() for key, weight in tensors.items()}, output / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        total += sum(weight.nbytes for weight in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b", help=f"one of {', '.join(SHAPES)}, or the config.json of a model")
    parser.add_argument("--source", type=Path, default=SOURCE, help="the small model; by default the demo's target")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    shape = SHAPES.get(given.shape) or json.loads(Path(given.shape).read_text())
    enlarge(given.source, given.output, shape)


if __name__ == "__main__":
    main()
