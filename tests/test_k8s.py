"""The manifests are valid, and what they name exists: flags, configuration, files, exit codes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from configs import exits
from configs.load import load
from launcher import complete

ROOT = Path(__file__).resolve().parent.parent
K8S = ROOT / "k8s"
DOCUMENTS = [
    pytest.param(document, id=f"{path.stem}-{document['kind']}-{document['metadata']['name']}")
    for path in sorted(K8S.glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]


def read(kind: str, name: str = "quasar") -> dict[str, Any]:
    """One document of the eight-GPU job's manifest."""
    documents = yaml.safe_load_all((K8S / "job-8gpu.yaml").read_text())
    return next(d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name)


def pod() -> dict[str, Any]:
    return read("Job")["spec"]["template"]["spec"]


def commands() -> list[list[str]]:
    """What the entrypoint runs in turn."""
    found: list[list[str]] = [[]]
    for argument in pod()["containers"][0]["args"]:
        if argument == "---":
            found.append([])
        else:
            found[-1].append(argument)
    return found


def documented_exit_codes() -> dict[int, str]:
    """Exit code -> its row in the README's table."""
    rows = re.findall(r"^\| ([0-9, ]+) \|(.*)\|$", (K8S / "README.md").read_text(), re.MULTILINE)
    return {int(code): row for codes, row in rows for code in codes.split(",")}


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize("version", ["1.29", "1.31", "1.33", "1.35", "1.37"])
def test_valid(document: dict[str, Any], version: str) -> None:
    assert kubernetes_validate.validate(document, version, strict=True) == version


def test_validation_is_strict() -> None:
    job = read("Job")
    job["spec"]["paralelism"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.35", strict=True)


def test_configuration_is_the_one_in_configs(tmp_path: Path) -> None:
    written = tmp_path / "run.yaml"
    written.write_text(read("ConfigMap")["data"]["run.yaml"])
    reference = load(ROOT / "configs" / "qwen3-32b_8xh100.yaml")
    assert load(written) == reference.model_copy(update={"files": load(written).files})


@pytest.mark.parametrize("command", [["launcher/main.py"], ["-m", "launcher.complete"]], ids=["main", "complete"])
def test_flags_exist(command: list[str]) -> None:
    line = next(line for line in commands() if command[-1] in line)
    known = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert known.returncode == 0, known.stderr
    flags = {argument for argument in line[line.index(command[-1]) :] if argument.startswith("--")}
    assert flags
    assert flags <= set(re.findall(r"--[a-z][a-z-]*", known.stdout))


def test_both_commands_name_the_same_files() -> None:
    run, check = commands()
    for flag in ("--config", "--input", "--output"):
        assert run[run.index(flag) + 1] == check[check.index(flag) + 1]


def test_one_rank_a_gpu() -> None:
    resources = pod()["containers"][0]["resources"]
    run = commands()[0]
    gpus = {resources[kind]["nvidia.com/gpu"] for kind in ("requests", "limits")}
    assert gpus == {int(run[run.index("--num_gpus") + 1])}


def test_what_is_mounted_exists() -> None:
    spec = pod()
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert {mount["name"] for mount in spec["containers"][0]["volumeMounts"]} == set(volumes)
    assert read("ConfigMap", volumes["config"]["configMap"]["name"])
    for name in ("data", "models"):
        assert read("PersistentVolumeClaim", volumes[name]["persistentVolumeClaim"]["claimName"])
    paths = [mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]]
    for argument in (a for command in commands() for a in command if a.startswith("/")):
        assert any(argument.startswith(path + "/") for path in paths), argument


def test_service_finds_the_pod() -> None:
    service, template = read("Service"), read("Job")["spec"]["template"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert template["spec"]["subdomain"] == service["metadata"]["name"]


def test_pod_is_confined() -> None:
    spec = pod()
    container = spec["containers"][0]["securityContext"]
    assert spec["restartPolicy"] == "Never" and spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert container["allowPrivilegeEscalation"] is False and container["readOnlyRootFilesystem"] is True
    assert container["capabilities"]["drop"] == ["ALL"]
    assert f"USER {spec['securityContext']['runAsUser']}:" in (K8S / "Dockerfile").read_text()


def test_failure_policy_follows_the_documented_exit_codes() -> None:
    codes = documented_exit_codes()
    assert set(codes) == {0, 1, 2, 3, 4, 5, 6, 130, 143}
    rules = read("Job")["spec"]["podFailurePolicy"]["rules"]
    fatal = {code for rule in rules if rule["action"] == "FailJob" for code in rule["onExitCodes"]["values"]}
    assert fatal == {code for code, row in codes.items() if "fails at once" in row}
    assert [rule["onPodConditions"][0]["type"] for rule in rules if rule["action"] == "Ignore"] == ["DisruptionTarget"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {"quasar"}
    assert [container["name"] for container in pod()["containers"]] == ["quasar"]
    assert {exits.REFUSED, exits.INCOMPLETE} == {2, 3}


def test_image_has_what_is_run() -> None:
    dockerfile = (K8S / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists() or name == "README.md", name
    assert 'ENTRYPOINT ["python", "/opt/quasar/k8s/entrypoint.py"]' in dockerfile
    assert f"WORKDIR {pod()['containers'][0]['workingDir']}" in dockerfile


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(K8S / "entrypoint.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize(
    ("arguments", "code", "output"),
    [
        (["echo", "a", "---", "echo", "b"], 0, "a\nb\n"),
        (["sh", "-c", "exit 3", "---", "echo", "b"], 3, ""),
        (["sh", "-c", "kill -9 $$", "---", "echo", "b"], 137, ""),
        (["sh", "-c", "(sleep 0.3; echo orphan) &", "---", "echo", "b"], 0, "orphan\nb\n"),
        (["no-such-program"], 127, ""),
        (["---", "echo"], 2, ""),
    ],
    ids=["both", "first-fails", "killed", "orphan", "unknown", "empty"],
)
def test_entrypoint_runs_in_turn(arguments: list[str], code: int, output: str) -> None:
    process = start(*arguments)
    assert process.communicate(timeout=30)[0] == output
    assert process.returncode == code


def test_entrypoint_passes_signals_to_all_and_waits_for_all() -> None:
    """As with `deepspeed`: the child dies of SIGTERM at once, its own child takes a moment and must be left to."""
    rank = "trap 'sleep 0.5; echo drained; exit 4' TERM; echo ready; while :; do sleep 0.05; done"
    process = start("sh", "-c", f'sh -c "{rank}" & exec sleep 60', "---", "echo", "next")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "drained\n"
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("rows", "code", "message"),
    [
        (['{"id":"quasar-00000000"}\n', '{"id":"quasar-00000001"}\n'], 0, "all 2 requests"),
        (['{"id":"quasar-00000001"}\n', '{"id":"quasar-00000000"'], 3, "1 of 2 requests"),
        (['{"id":"quasar-00000000"}\n', '{"id":"quasar-00000009"}\n', '{"id":"other"}\n', "[]\n"], 3, "1 of 2"),
        (None, 3, "2 of 2 requests"),
    ],
    ids=["all", "torn", "strangers", "no-output"],
)
def test_complete(
    rows: list[str] | None, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"custom_id": "a"}\n\n{"custom_id": "b"}\n')
    if rows is not None:
        output.write_text("".join(rows))
    assert complete.main(["--input", str(source), "--output", str(output)]) == code
    assert message in "".join(capsys.readouterr())


def test_complete_takes_files_from_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{target: t}}\nfiles: {{input: in.jsonl, output: {tmp_path}/out.jsonl}}\n")
    assert complete.main(["--config", str(config)]) == exits.REFUSED
    assert "in.jsonl" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text('{"custom_id": "a"}\n')
    (tmp_path / "out.jsonl").write_text('{"id": "quasar-00000000"}\n')
    assert complete.main(["--config", str(config)]) == 0
    assert complete.main([]) == exits.REFUSED
