"""Compile a C++ file of this folder when it is first needed, and keep the result in the user's cache."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
_SECONDS = 120
_DIGITS = 64
_log = logging.getLogger(__name__)


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """Return the compiled `name`.cpp; None where that cannot be had, which costs speed and nothing else.

    It takes a C++ compiler (`$CXX`, else g++) and Linux. The result is kept under `$XDG_CACHE_HOME/tailscope`, named
    by the source, the compiler and the processor, since it is built for the processor at hand. It ends with the digest
    of what stands before, which loaders do not see; a damaged one is compiled again.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or sys.platform != "linux":
        return None
    source = Path(__file__).with_name(f"{name}.cpp")
    try:
        file = cache_folder() / f"{name}-{_fingerprint(source, compiler)}.so"
        if not _is_whole(file):
            _compile(compiler, source, file)
        _share_openmp()
        return ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s is not used, training will be slower: %s", source.name, error)
        return None


def pointers(*tensors: torch.Tensor | None) -> list[ctypes.c_void_p]:
    """Return where the tensors' values lie, as a compiled function takes it; a null pointer for None."""
    return [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]


def cache_folder() -> Path:
    """Return the folder of what is worked out once for a machine, and create it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tailscope"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cpu_field(*names: str) -> str:
    """Return what Linux says of the processor under the first of these names that it has; elsewhere nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")


def _fingerprint(source: Path, compiler: str) -> str:
    """Return a digest of everything that decides the result: -march=native means another thing on another machine."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_SECONDS).stdout
    built_for = repr((FLAGS, platform.machine(), cpu_field("flags", "Features")))
    return hashlib.sha256(source.read_bytes() + version + built_for.encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, to: Path) -> None:
    """Compile into a private folder and move the result into place: two processes may do this at once."""
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        unlinked, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        compile_it = [compiler, *FLAGS, "-c", str(source), "-o", str(unlinked)]
        # Linked without OpenMP: it has to be the one that PyTorch brings, for two would fight over the cores.
        for command in (compile_it, [compiler, "-shared", str(unlinked), "-o", str(linked)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
            if done.returncode:
                raise OSError(f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
        with linked.open("ab") as file:
            file.write(_digest(linked.read_bytes()))
        linked.replace(to)


def _is_whole(file: Path) -> bool:
    """Whether a compiled file is there and ends with the SHA-256 of the rest."""
    if not file.is_file():
        return False
    content = file.read_bytes()
    return content[-_DIGITS:] == _digest(content[:-_DIGITS])


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _share_openmp() -> None:
    """Make PyTorch's OpenMP visible to libraries that are loaded from now on."""
    bundled = sorted(Path(torch.__file__).parent.parent.glob("torch*/lib*/libgomp*.so*")) + sorted(
        Path(torch.__file__).parent.parent.glob("torch.libs/libgomp*.so*")
    )
    ctypes.CDLL(str(bundled[0]) if bundled else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
