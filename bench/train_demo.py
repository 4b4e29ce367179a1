"""Train the demo pair, a target and its draft: two small Qwen3 models of Python code with one tokenizer.

Run from the repository's root: ``python -m bench.train_demo``. The corpus is the running interpreter's standard
library unless ``--data`` names another folder of Python files. A model given no minutes is left as it is; the model
card is written anew every time.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

SKIPPED = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "site-packages", "__pycache__")
)
HELD_OUT_PER_MILLE = 35
EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY, WINDOW, ROWS = 4096, 512, 8
CHECKPOINT_SECONDS, LOG_SECONDS, WARMUP_SHARE = 300.0, 20.0, 0.03

# A newline never joins what precedes it, nor indentation what follows it, so that text cut at a line's end, or after
# its indentation, splits into the very tokens it has in the middle of a file.
WORDS = Regex(r"\n+|[ \t]{2,}|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s")

# Chat for a model that only continues text: what the system says is commented out, everything else is laid down as it
# stands, each on lines of its own. The generation prompt is therefore empty.
CHAT_TEMPLATE = """
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ '# ' + message['content'].strip().replace('\\n', '\\n# ') + '\\n' }}
{%- else -%}{{ message['content'] + ('' if message['content'].endswith('\\n') else '\\n') }}{%- endif -%}
{%- endfor -%}
""".strip()

SHAPES = {"draft": (128, 2, 32), "target": (256, 4, 64)}  # width, layers, width of a head

CARD = f"""# Demo models

Two Qwen3-architecture models of Python code, small enough to run anywhere: `target`, and `draft`, which proposes
tokens for it. They share a byte-level BPE tokenizer of {VOCABULARY} words and no beginning-of-text token. They continue
code and follow no instructions; trained on windows of {WINDOW} tokens, they are of little use beyond that length.
`target-int4` is the target in four bits, as `python -m bench.demo_int4` makes it.

| model | parameters | tokens seen | epochs | minutes | held-out nats/token | held-out bits/byte |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{{rows}}

Data: {{data}}, without its tests and tables. Of the files, {{share:.1f}} % were held out,
chosen by a hash of their paths. Made on a CPU, whose speed and load decide the number of steps, with

    {{command}}

Licence: the weights are under Apache-2.0. CPython's standard library, from which the default corpus and the held-out
text and prompts beside this file are taken, is under the Python Software Foundation License.
"""


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the corpus, in POSIX form, and its text."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the file is kept from training; a function of its relative path alone."""
        digest = hashlib.sha256(f"demo{self.path}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PER_MILLE


def split(root: Path | None = None) -> tuple[list[Document], list[Document]]:
    """Training and held-out Python files of `root`, by default the running interpreter's standard library.

    Both are in path order; files that are skipped, empty or undecodable are in neither.
    """
    root, found = root or Path(sysconfig.get_path("stdlib")), []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.isdisjoint(relative.parts):
            with suppress(UnicodeDecodeError):
                found.append(Document(relative.as_posix(), path.read_bytes().decode()))
    return [d for d in found if d.text and not d.held_out], [d for d in found if d.text and d.held_out]


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCABULARY` words learnt from `texts`; lossless, and without a beginning-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(WORDS, behavior="isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=2 * WINDOW,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


class Corpus:
    """The split corpus with the tokenizer learnt from its training part.

    `training` and `held_out` hold each document's token ids, int64 [length], the end-of-text token last.
    """

    def __init__(self, root: Path | None) -> None:
        training, held_out = split(root)
        self.held_out_bytes = sum(len(d.text.encode()) for d in held_out)
        self.tokenizer = build_tokenizer([d.text for d in training])
        self.training, self.held_out = self._encode(training), self._encode(held_out)
        self.training_tokens, self.held_out_tokens = sum(map(len, self.training)), sum(map(len, self.held_out))

    def _encode(self, documents: Sequence[Document]) -> list[torch.Tensor]:
        encodings = self.tokenizer.backend_tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
        return [torch.tensor([*e.ids, self.tokenizer.eos_token_id]) for e in encodings]

    def batches(self, generator: torch.Generator) -> Iterator[torch.Tensor]:
        """Endless int64 [ROWS, WINDOW + 1]; each epoch shuffles the documents, then the windows of their stream."""
        while True:
            order = torch.randperm(len(self.training), generator=generator).tolist()
            windows = torch.cat([self.training[i] for i in order]).unfold(0, WINDOW + 1, WINDOW)
            rows = torch.randperm(len(windows), generator=generator)
            for start in range(0, len(rows) - ROWS + 1, ROWS):
                yield windows[rows[start : start + ROWS]]


def loss_of(model: torch.nn.Module, window: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in nats of each row's next tokens; `window` is int64 [rows, length + 1]."""
    logits = model(input_ids=window[:, :-1], use_cache=False).logits.float()
    return functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, encoded: Sequence[torch.Tensor]) -> float:
    """Mean loss, in nats per token, of documents' token ids, each predicted from what precedes it in its window."""
    stream = torch.cat([encoded[-1][-1:], *encoded])
    starts = range(0, len(stream) - 1, WINDOW)
    return sum(loss_of(model, stream[None, s : s + WINDOW + 1], "sum").item() for s in starts) / (len(stream) - 1)


def optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embedding and the norms."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(hidden, lr=4e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def schedule(share: float) -> float:
    """Factor of the learning rate once `share` of the time budget, in [0, 1], is spent."""
    return min(share / WARMUP_SHARE, (1.0 - share) / (1.0 - WARMUP_SHARE), 1.0)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `model` in bf16, with its tokenizer, in Hugging Face layout; each file is replaced in one move."""
    copy: Any = Qwen3ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    staging = folder.with_name(f".{folder.name}")
    copy.to(torch.bfloat16).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    folder.mkdir(parents=True, exist_ok=True)
    for path in staging.iterdir():
        path.chmod(0o644)
        os.replace(path, folder / path.name)
    staging.rmdir()


def train(name: str, minutes: float, corpus: Corpus, options: argparse.Namespace) -> None:
    """Train one of `SHAPES` for `minutes`, compilation apart, and save it with its measurements."""
    torch.manual_seed(options.seed)
    width, layers, head = SHAPES[name]
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=corpus.tokenizer.eos_token_id,
        pad_token_id=corpus.tokenizer.pad_token_id,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=head,
        intermediate_size=3 * width,
    )
    model = Qwen3ForCausalLM(config)
    compiled = torch.compile(loss_of, dynamic=False) if shutil.which("g++") else loss_of
    stream = corpus.batches(torch.Generator().manual_seed(options.seed))

    def backward() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            loss = compiled(model, next(stream))
        loss.backward()
        return loss.item()

    backward()
    steppers = optimizers(model)
    groups = [(group, group["lr"]) for stepper in steppers for group in stepper.param_groups]
    step, recent = 0, 0.0
    start = logged = saved = time.monotonic()
    while (share := (time.monotonic() - start) / (60 * minutes)) < 1.0:
        model.zero_grad()
        for group, peak in groups:
            group["lr"] = peak * schedule(share)
        loss = backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        step += 1
        recent = loss if step == 1 else 0.95 * recent + 0.05 * loss
        now = time.monotonic()
        if now - logged > LOG_SECONDS:
            logged, rate = now, step * ROWS * WINDOW / (now - start)
            print(f"{name} {share:6.1%} step {step} loss {recent:.3f} {rate:.0f} tokens/s", flush=True)
        if now - saved > CHECKPOINT_SECONDS:
            saved = now
            save(model, corpus.tokenizer, options.output / name)
            print(f"{name} held-out loss {held_out_loss(model, corpus.held_out[:4]):.3f} (four files)", flush=True)
    save(model, corpus.tokenizer, options.output / name)
    nats = held_out_loss(model, corpus.held_out)
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": minutes,
        "tokens_seen": step * ROWS * WINDOW,
        "epochs": step * ROWS * WINDOW / corpus.training_tokens,
        "held_out_nats_per_token": nats,
        "held_out_bits_per_byte": nats / math.log(2) * corpus.held_out_tokens / corpus.held_out_bytes,
    }
    (options.output / name / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(name, json.dumps(record), flush=True)


def write_card(corpus: Corpus, options: argparse.Namespace) -> None:
    """Write the model card from what `train` measured of the models present."""
    rows, command = [], "python -m bench.train_demo" + (" --data FOLDER" if options.data else "")
    for path in sorted(options.output.glob("*/training.json")):
        name, r = path.parent.name, json.loads(path.read_text())
        seen = f"{r['tokens_seen'] / 1e6:.1f} M | {r['epochs']:.1f} | {r['minutes']:g}"
        losses = f"{r['held_out_nats_per_token']:.3f} | {r['held_out_bits_per_byte']:.3f}"
        rows.append(f"| {name} | {r['parameters'] / 1e6:.2f} M | {seen} | {losses} |")
        command += f" --{name}-minutes {r['minutes']:g}"
    data = "Python sources of one's own" if options.data else f"CPython {platform.python_version()}'s standard library"
    table, share = "\n".join(rows), 100 * len(corpus.held_out) / (len(corpus.held_out) + len(corpus.training))
    (options.output / "README.md").write_text(CARD.format(rows=table, data=data, share=share, command=command))


def main() -> None:
    """Read the command line, learn the tokenizer, train the draft, then the target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("configs/demo"))
    parser.add_argument("--data", type=Path, help="folder of Python files (default: the standard library)")
    parser.add_argument("--draft-minutes", type=float, default=10.0)
    parser.add_argument("--target-minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="matrix products in bf16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    corpus = Corpus(options.data)
    print(f"{corpus.training_tokens} tokens to train on, {corpus.held_out_tokens} held out", flush=True)
    for name, minutes in (("draft", options.draft_minutes), ("target", options.target_minutes)):
        if minutes > 0:
            train(name, minutes, corpus, options)
    write_card(corpus, options)


if __name__ == "__main__":
    main()
