"""Two models on the same text, and the command lines around it."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from test_quantize import directory
from tiny_models import VOCABULARY, config_of
from torch import Tensor

from launcher import main as entry
from launcher.corpus import BadText, texts, windows
from runtime.comm import Solo
from runtime.compare import Comparison, compare, logits_of
from runtime.model import load_model


class Letters:
    """A tokenizer of one token a letter."""

    eos_token_id = 2

    class Encoding:
        def __init__(self, ids: list[int]) -> None:
            self.input_ids = ids

    def __call__(self, text: str, **_: object) -> "Letters.Encoding":
        return Letters.Encoding([3 + ord(letter) % (VOCABULARY - 3) for letter in text])


def test_numbers_are_their_definitions(seed: int) -> None:
    torch.manual_seed(seed)
    found, losses, other, kl, flips, runs = Comparison(), [], [], [], 0, []
    for length in (700, 3):
        a, b = torch.randn(length, 20), torch.randn(length, 20) * 0.1
        b += a
        tokens = torch.randint(0, 20, (length,))
        found.add(a, b, tokens)
        first = None
        for t in range(length):
            p, q = (x[t].double().softmax(0) for x in (a, b))
            losses.append(-math.log(p[tokens[t]]))
            other.append(-math.log(q[tokens[t]]))
            kl.append(float((p * (p / q).log()).sum()))
            if p.argmax() != q.argmax():
                flips, first = flips + 1, t if first is None else first
        runs.append(length if first is None else first)
    summary = found.summary()
    assert summary["positions"] == 703
    assert math.isclose(summary["reference_perplexity"], math.exp(sum(losses) / 703), rel_tol=1e-4)
    assert math.isclose(summary["model_perplexity"], math.exp(sum(other) / 703), rel_tol=1e-4)
    assert math.isclose(summary["divergence"], sum(kl) / 703, rel_tol=1e-3)
    assert summary["flips"] == flips / 703 and summary["tokens_before_flip"] == sum(runs) / 2
    with pytest.raises(ValueError):
        Comparison().summary()


def test_a_model_is_itself(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    model = load_model(config_of(directory(seed, tmp_path)), Solo())
    text = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(2, 60))] for _ in range(4)]
    *_, found = compare(model, model, text)
    summary = found.summary()
    assert summary["flips"] == 0 and abs(summary["divergence"]) < 1e-6
    assert summary["tokens_before_flip"] == sum(len(tokens) - 1 for tokens in text) / 4
    shapes = [tuple(logits.shape) for logits in logits_of(model, text)]
    assert shapes == [(len(tokens), VOCABULARY) for tokens in text]


def test_text_becomes_windows(tmp_path: Path) -> None:
    lines = tmp_path / "text.jsonl"
    lines.write_text('{"text": "abcd"}\n\n{"text": "efg", "path": "x"}\n')
    tokens = [*Letters()("abcd").input_ids, 2, *Letters()("efg").input_ids, 2]
    assert windows(lines, Letters(), 4) == [tokens[:4], tokens[4:8]]  # a single token has nothing to be predicted from
    assert windows(lines, Letters(), 4, most=1) == [tokens[:4]]
    (tmp_path / "plain.txt").write_text("one\ntwo")
    assert list(texts(tmp_path / "plain.txt")) == ["one\ntwo"]
    lines.write_text('{"text": "a"}\n{"txet": "b"}\n')
    with pytest.raises(BadText, match="line 2"):
        windows(lines, Letters(), 4)
    lines.write_text("")
    with pytest.raises(BadText, match="no text of two tokens"):
        windows(lines, Letters(), 4)
    with pytest.raises(BadText, match="cannot be read"):
        windows(tmp_path / "none", Letters(), 4)


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.tokenizer.load_tokenizer", lambda directory: Letters())


@pytest.mark.usefixtures("letters")
def test_commands(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(seed)
    source = directory(seed, tmp_path / "plain")
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": "".join(chr(rng.randrange(97, 123)) for _ in range(90))}) for _ in range(9)))
    quantize = ["quantize", "--model", str(source), "--group-size", "32", "--length", "30", "--samples", "5", "--output"]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert entry.main([*quantize, one, "--method", "gptq", "--calibration", str(text), "--asymmetric"]) == 0
    assert entry.main([*quantize, two, "--method", "awq"]) == 0  # with text of its own
    before = {path.name: path.read_bytes() for path in Path(two).iterdir()}
    (Path(two) / "model.safetensors.index.json").unlink()
    assert entry.main([*quantize, two, "--method", "awq"]) == 0  # with the same text again
    assert {path.name: path.read_bytes() for path in Path(two).iterdir()} == before
    capsys.readouterr()
    for model in (one, two):
        options = ["--reference", str(source), "--model", model, "--data", str(text), "--length", "40"]
        assert entry.main(["compare", *options, "--json", "--set", "activations=16bit"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["positions"] > 700 and 0 <= summary["flips"] < 0.5 and summary["divergence"] > 0
        assert entry.main(["compare", *options]) == 0
        assert "decisions that flip" in capsys.readouterr().out


@pytest.mark.usefixtures("letters")
def test_what_commands_refuse(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, text = directory(seed, tmp_path / "plain"), tmp_path / "text.txt"
    text.write_text("abc" * 30)
    base = ["quantize", "--model", str(source), "--output", str(tmp_path / "four")]
    compared = ["compare", "--reference", str(source), "--model", str(source), "--data", str(text)]
    for arguments, told in [
        ([*base, "--method", "gptq", "--calibration", str(tmp_path / "none")], "none cannot be read"),
        ([*base, "--method", "gptq", "--calibration", str(text), "--length", "500"], "no window of 500 tokens"),
        ([*base, "--method", "rtn", "--group-size", "128"], "groups of 128"),
        ([*compared, "--set", "activations=int3"], "activations"),
        ([*compared[:-1], str(tmp_path / "none")], "none cannot be read"),
    ]:
        assert entry.main(arguments) == 2
        assert told in capsys.readouterr().err, arguments
    shutil.rmtree(source)
    assert entry.main([*base, "--method", "rtn"]) == 2
    with pytest.raises(SystemExit):
        entry.main([*base, "--bits", "3"])


def test_vocabularies_that_differ(seed: int, tmp_path: Path) -> None:
    models = [load_model(config_of(directory(seed, tmp_path / str(n), vocab_size=n)), Solo()) for n in (100, 120)]
    with pytest.raises(ValueError, match="100 and 120"):
        list(compare(*models, [[1, 2, 3]]))


def test_near_ties_are_no_flips() -> None:
    found = Comparison()
    same: Tensor = torch.zeros(5, 10)
    found.add(same, same + 1, torch.zeros(5, dtype=torch.int64))
    assert found.flips == 0
