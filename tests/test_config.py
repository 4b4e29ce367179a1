"""The configuration: what loads, what is refused and how, and that the README says what the schema does."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from configs.load import ConfigError, load
from configs.schema import ModelConfig, RunConfig, parse_bytes
from configs.table import keys, table

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
RUNS = sorted((ROOT / "configs").glob("*.yaml"))
MARKERS = "<!-- configuration -->", "<!-- /configuration -->"
BASE = ["model.target=somewhere"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_loads(path: Path) -> None:
    config = load(path)
    assert config.files.input and config.files.output and config.files.summary


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_runs_are_named_after_model_and_hardware(path: Path) -> None:
    model, hardware = path.stem.split("_")
    assert Path(load(path).model.target).name.lower().startswith(model)
    ranks = int(hardware.split("x")[0]) if "x" in hardware else 1
    assert ranks % (load(path).parallel.tensor or ranks) == 0


# (layers, KV heads, head size) of the models that the runs are for.
SHAPES = {"qwen3-8b_h200": (36, 8, 128), "qwen3-32b_8xh100": (64, 8, 128), "llama-3.3-70b_8xh100": (80, 8, 128)}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_caches_hold_every_sequence_at_full_length(path: Path) -> None:
    config = load(path)
    layers, heads, size = SHAPES[path.stem]
    assert config.parallel.tensor and config.engine.max_model_len
    token = layers * 2 * heads // config.parallel.tensor * size * 2
    assert config.engine.kv_cache_memory == config.engine.max_num_seqs * config.engine.max_model_len * token


@pytest.mark.parametrize("directory", ["root", "elsewhere"])
def test_demo_is_found_from_any_working_directory(
    directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT if directory == "root" else tmp_path)
    (tmp_path / "target-int4").mkdir()  # another's folder of the same name in the working directory is not meant
    config = load(ROOT / "configs" / "demo" / "demo.yaml")
    demo = ROOT / "configs" / "demo"
    for name, found in (
        ("target-int4", config.model.target),
        ("draft", config.speculation.model),
        ("prompts.jsonl", config.files.input),
    ):
        assert (demo / name).exists(), f"configs/demo/{name} is not there"
        assert found == str(demo / name)


def test_paths_beside_the_file_win_and_overrides_start_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    for directory in (beside, here):
        (directory / "target").mkdir(parents=True)
        (directory / "prompts.jsonl").touch()
    (here / "draft").mkdir()
    monkeypatch.chdir(here)
    path = beside / "run.yaml"
    path.write_text(
        "model: {target: target}\nspeculation: {method: model, model: draft}\n"
        "files: {input: prompts.jsonl, output: prompts.jsonl}\n"
    )
    config = load(path)
    assert config.model.target == str(beside / "target")
    assert config.speculation.model == "draft"  # nothing of that name lies beside the file
    assert config.files.input == str(beside / "prompts.jsonl")
    assert config.files.output == "prompts.jsonl"  # what is written is written here
    assert load(path, ["files.input=prompts.jsonl"]).files.input == "prompts.jsonl"


def test_every_key_is_documented() -> None:
    assert all(meaning for _, _, meaning in keys(RunConfig))


def test_table_has_every_key_once() -> None:
    listed = [line.split("`")[1] for line in table().splitlines()[2:]]

    def walk(schema: type[BaseModel], prefix: str = "") -> list[str]:
        names: list[str] = []
        for name, field in schema.model_fields.items():
            section = field.annotation
            if isinstance(section, type) and issubclass(section, BaseModel):
                names += walk(section, f"{prefix}{name}.")
            else:
                names.append(prefix + name)
        return names

    assert listed == walk(RunConfig)
    assert all(line.count("|") == 5 for line in table().splitlines())


def test_table_says_what_a_key_takes() -> None:
    rows = {line.split("`")[1]: line for line in table().splitlines()[2:]}
    assert "| text | needed |" in rows["model.target"]
    assert "| `int4`, `none` | `int4` |" in rows["model.quantization"]
    assert "| `auto` or whole number, 0 to 32 | `auto` |" in rows["speculation.num_speculative_tokens"]
    assert "| bytes, such as `40GiB` | - |" in rows["engine.kv_cache_memory"]
    assert "| `true`, `false` | `true` |" in rows["model.symmetric"]
    assert "| number > 0 | `20.0` |" in rows["coordination.timeout"]


def test_readme_has_the_table() -> None:
    readme = ROOT / "README.md"
    assert readme.exists(), "README.md is not there"
    _, sign, rest = readme.read_text().partition(MARKERS[0])
    shown, end, _ = rest.partition(MARKERS[1])
    assert sign and end, f"README.md has no {MARKERS[0]} ... {MARKERS[1]} around its configuration table"
    assert shown.strip() == table().strip(), "the README's table is old; paste the output of `python -m configs.table`"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("model.tarlget=x", "model.tarlget: unknown key; did you mean target?"),
        ("speculation.num_speculative_token=3", "did you mean num_speculative_tokens?"),
        ("enginee.max_num_seqs=3", "enginee: unknown key; did you mean engine?"),
        ("files.zzz=1", "files.zzz: unknown key; known here: input, output, summary"),
    ],
)
def test_unknown_keys_give_a_hint(override: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [*BASE, override])
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("model.quantization=int3", "model.quantization", "'int4' or 'none'"),
        ("model.group_size=100", "model.group_size", "32, 64 or 128"),
        ("speculation.num_speculative_tokens=-1", "speculation.num_speculative_tokens", "greater than or equal to 0"),
        ("speculation.num_speculative_tokens=33", "speculation.num_speculative_tokens", "less than or equal to 32"),
        ("speculation.method=model", "speculation", "needs speculation.model"),
        ("speculation.prompt_lookup_min=9", "speculation", "larger than prompt_lookup_max"),
        ("parallel.tensor=0", "parallel.tensor", "greater than 0"),
        ("engine.max_num_seqs=many", "engine.max_num_seqs", "valid integer"),
        ("engine.kv_cache_memory=40 gigs", "engine.kv_cache_memory", "such as 512MiB or 40GiB"),
        ("engine.kv_cache_memory=0", "engine.kv_cache_memory", "greater than 0"),
        ("engine.max_num_batched_tokens=5", "configuration", "num_speculative_tokens + 1 = 6"),
        ("speculation.num_speculative_tokens=many", "speculation.num_speculative_tokens", "'auto'"),
        ("coordination.timeout=2", "coordination", "more than two heartbeats"),
        ("coordination.merge=both", "coordination.merge", "'group' or 'coordinator'"),
        ("seed=x", "seed", "valid integer"),
    ],
)
def test_bad_values_name_their_key_and_what_was_expected(override: str, key: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [*BASE, "speculation.num_speculative_tokens=5", override])
    line = str(caught.value)
    assert line.startswith(f"{key}: ") and expected in line


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, ["engine.threads=0", "seed=x"])
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["model", "engine.threads", "seed"]
    assert lines[0] == "model: needed, and not given"


def test_overrides_win_and_are_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {"target": "a"}, "engine": {"max_num_seqs": 4}}))
    config = load(path, ["engine.max_num_seqs=8", "engine.max_num_seqs=9", "model.symmetric=false", "seed=7"])
    assert (config.engine.max_num_seqs, config.model.symmetric, config.seed) == (9, False, 7)
    assert load(path, ["parallel.tensor=null"]).parallel.tensor is None


@pytest.mark.parametrize("override", ["seed", "=1", "model.=1", ".target=x", "seed.deep=1", "seed=[1"])
def test_overrides_without_form_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load(None, [*BASE, "seed=1", override])


@pytest.mark.parametrize(
    ("content", "message"), [("", "holds no keys"), ("- a\n", "holds no keys"), ("a: [", "is not YAML")]
)
def test_files_that_are_no_configuration_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load("nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7", 7), ("7B", 7), ("2KB", 2000), ("1.5GiB", 3 * 2**29), ("512 mib", 2**29), (" 3 GB ", 3 * 10**9), (12, 12)],
)
def test_bytes(text: object, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1TiB", "1,5GiB", "1e9"])
def test_bytes_refused(text: str) -> None:
    with pytest.raises(ValueError, match="number of bytes"):
        parse_bytes(text)


def test_frozen() -> None:
    config = load(None, BASE)
    with pytest.raises(ValidationError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.engine.max_num_seqs = 1  # type: ignore[misc]


def test_what_decides_a_result() -> None:
    """Groups do wherever something is held in four bits, and nowhere else."""
    model = ModelConfig(target="here", quantization="none")
    cases = ({}, False), ({"lm_head": "int8"}, False), ({"lm_head": "screened"}, True), ({"quantization": "int4"}, True)
    for changes, counts in cases:
        one, other = (model.model_copy(update={"group_size": size, **changes}) for size in (32, 64))
        assert (one.arithmetic != other.arithmetic) == counts, changes
    assert model.arithmetic == model.model_copy(update={"lm_head": "16bit"}).arithmetic
