"""Builds and loads the C++ extension of `csrc/`, once per kind of machine."""

import fcntl
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
NAME = "quasar_cpu"
WAIT = 900.0  # seconds: the longest wait for another process that builds
ADVICE = "It takes a C++20 compiler and ninja: `apt-get install g++` and `pip install ninja`."

log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """The extension cannot be built or loaded on this machine; the message says what is missing."""


def architecture() -> str:
    """What `-march` gets: `QUASAR_MARCH` if set (`haswell`, `x86-64`, ...), else this machine's own."""
    return os.environ.get("QUASAR_MARCH") or "native"


def cache_directory() -> Path:
    """Where built extensions are kept: `QUASAR_CACHE`, else `quasar` in the user's cache directory.

    The name of the directory inside it carries the torch version, the CPU's features and the sources, so that machines
    that share a home directory, and versions of this project, never load each other's code.
    """
    own = os.environ.get("QUASAR_CACHE")
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quasar"
    target = root / f"kernels-torch{torch.__version__}-{architecture()}-{_machine()}-{_sources()}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            return target
    except OSError:
        if own or (target / f"{NAME}.so").exists():
            return target
    private = Path(tempfile.gettempdir()) / f"quasar-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    if private.stat().st_uid != os.getuid() or private.stat().st_mode & 0o022:
        raise BuildError(f"{private} can be written by others; set QUASAR_CACHE to a directory of your own")
    (private / target.name).mkdir(exist_ok=True)
    return private / target.name


def _machine() -> str:
    """A hash of what `-march=native` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        about = "\n".join(x for x in lines if re.match(r"(flags|Features|vendor_id|cpu family|model|CPU part)\b", x))
    except OSError:
        about = platform.processor()
    return hashlib.sha256(f"{platform.machine()}\n{about}".encode()).hexdigest()[:10]


def _sources() -> str:
    digest = hashlib.sha256(" ".join(_flags()).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def _flags() -> list[str]:
    return ["-std=c++20", "-O3", f"-march={architecture()}", "-ffp-contract=off", "-fopenmp", "-Wno-psabi", "-DNDEBUG"]


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Holds the directory's lock. The kernel lets go of it when its holder dies, however that happens."""
    end = time.monotonic() + WAIT
    with open(directory / "lock", "a") as lock:
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    log.warning("another process is compiling the C++ kernels; waiting for it")
                told = True
            if time.monotonic() > end:
                raise BuildError(f"another process has held {directory / 'lock'} for {WAIT:.0f} s")
            time.sleep(0.1)
        yield


@functools.cache
def load_extension() -> None:
    """Makes `torch.ops.quasar` complete: builds the extension if need be, which takes tens of seconds, and loads it.

    Safe when many processes start at once: one builds, the others wait. Raises BuildError.
    """
    try:
        directory = cache_directory()
        library = directory / f"{NAME}.so"
        if not library.exists():
            with _only_one(directory):
                if not library.exists():
                    _build(directory, library)
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        if isinstance(error, BuildError):
            raise
        lines = [x for x in str(error).splitlines() if "error" in x.lower()] or [str(error)]
        said = "\n".join(lines[:6])[:2000]
        raise BuildError(f"the C++ kernels cannot be built here. {ADVICE} What went wrong:\n{said}") from None


def _build(directory: Path, library: Path) -> None:
    from torch.utils import cpp_extension

    log.warning("compiling the C++ kernels for this machine (once; about half a minute) into %s", directory)
    path = os.environ.get("PATH", "")
    scratch = Path(tempfile.mkdtemp(prefix="build-", dir=directory))
    try:
        # An interpreter started by its absolute path doesn't have its environment's ninja on PATH.
        os.environ["PATH"] = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), path]))
        cpp_extension.load(
            NAME,
            [str(x) for x in sorted(SOURCES.glob("*.cpp"))],
            extra_cflags=_flags(),
            extra_ldflags=["-fopenmp"],
            build_directory=str(scratch),
            is_python_module=False,
        )
        os.replace(scratch / f"{NAME}.so", library)
    finally:
        os.environ["PATH"] = path
        shutil.rmtree(scratch, ignore_errors=True)
