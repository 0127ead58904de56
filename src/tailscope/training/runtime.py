"""Where and how fast a run computes. Nothing here changes a result beyond rounding, so none of it is in any key."""

import ctypes
import logging
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tailscope.errors import UserError
from tailscope.kernels import norm_act
from tailscope.kernels.build import cpu_field
from tailscope.progress import Progress, Quiet

Engine = Literal["eager", "fused", "compiled"]
"""What computes the steps of a training: PyTorch's own operations, our kernel between them, or torch.compile."""

SHARED_FROM_PIXELS = 50_000
"""From how many pixels a batch on the CPU threads share the work (128 CIFAR images have 131,072, 64 digits 4,096)."""


@dataclass(frozen=True)
class Runtime:
    """A device, its low precision, the engine if one was asked for, and who is told about progress."""

    device: torch.device
    low_precision: torch.dtype
    engine: Engine | None = None
    progress: Progress = field(default_factory=Quiet)

    @classmethod
    def choose(
        cls,
        device: str = "auto",
        *,
        engine: str = "auto",
        progress: Progress | None = None,
        keep_memory: bool = True,
    ) -> "Runtime":
        """Pick the device and what it can do; tune the process's allocator, and let float32 mean float32 on CUDA.

        Args:
            device: auto, cpu, cuda or cuda:N; `cuda` is the current device, and the runtime's has its number.
            engine: eager, fused or compiled; auto takes the one that is measured to be the fastest.
            progress: receives the work done.
            keep_memory: keep what is freed for the next step; False where no networks run and memory is short.

        Raises:
            UserError: the device or the engine is unknown or not there.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            chosen = torch.device(device)
        except RuntimeError:
            chosen = torch.device("meta")
        if chosen.type not in ("cpu", "cuda"):
            raise UserError(f"--device {device}: known are auto, cpu, cuda and cuda:N")
        if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {device}: this machine has no such CUDA device that PyTorch can use; take cpu")
        if chosen.type == "cuda":
            chosen = torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
            torch.cuda.set_device(chosen)
            _refuse_tf32()
        if keep_memory:
            keep_freed_memory()
        low = torch.bfloat16 if has_bf16(chosen) else torch.float32
        return cls(chosen, low, _asked_for(engine, chosen), progress or Quiet())

    def dtype(self, precision: Literal["auto", "fp32"]) -> torch.dtype:
        """Return the type of convolutions and matrix products under a recipe's precision."""
        return torch.float32 if precision == "fp32" else self.low_precision

    @contextmanager
    def threads_for(self, images: Tensor, batch: int) -> Iterator[None]:
        """Compute on one CPU thread while batches are too small to share out.

        On 8x8 digits waiting for the other threads costs more than they bring, and many times more when another
        process has one of the cores.
        """
        threads = torch.get_num_threads()
        if batch * images.shape[1] * images.shape[2] < SHARED_FROM_PIXELS:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def describe(self) -> dict[str, str | int | None]:
        """Return the hardware for a result file."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        return {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def _asked_for(engine: str, device: torch.device) -> Engine | None:
    """Return the engine that was asked for, None for auto; refuse one that this machine has not.

    Raises:
        UserError: it is unknown, or not to be had here.
    """
    match engine:
        case "auto":
            return None
        case "eager":
            return engine
        case "fused":
            if device.type == "cpu" and norm_act.available():
                return engine
            raise UserError(
                "--engine fused: its kernel needs the CPU of a Linux machine with a C++ compiler; take auto or eager"
            )
        case "compiled":
            if can_compile():
                return engine
            raise UserError(
                "--engine compiled: it needs Linux, a C++ compiler and Python's headers; take auto or eager"
            )
    raise UserError(f"--engine {engine}: known are auto, eager, fused and compiled")


def arithmetic(device: torch.device, precision: torch.dtype, engine: str = "eager") -> dict[str, str | None]:
    """Return what the numbers of a trained stage depend on beyond its key, for its description in the store.

    Args:
        device: where it was trained.
        precision: of convolutions and matrix products.
        engine: what computed its steps; several, if it went on with another.
    """
    return {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "engine": engine,
        "precision": named(precision),
        "torch": torch.__version__,
    }


def arithmetic_of(meta: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the arithmetic that a stored stage's description names; None for what one from before it did not say."""
    if "arithmetic" in meta:
        return dict(meta["arithmetic"])
    device = meta.get("device", {})
    engine = None
    if "compiled" in meta:
        engine = "compiled" if meta["compiled"] else "fused" if meta.get("fused") else "eager"
    return {
        "processor": device.get("gpu") or device.get("cpu"),
        "engine": engine,
        "precision": meta.get("precision"),
        "torch": None,
    }


def named(dtype: torch.dtype) -> str:
    """Return a type's name: bfloat16, float32."""
    return str(dtype).removeprefix("torch.")


def has_bf16(device: torch.device | str) -> bool:
    """Whether bf16 is native there; where it is emulated, fp32 is faster."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    flags = torch.backends.cpu.get_cpu_capability()
    return (
        flags.startswith("AVX512")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and "avx512_bf16" in cpu_field("flags").split()
    )


def _refuse_tf32() -> None:
    """Keep all digits of float32 in convolutions and matrix products, for good: the setting is one for all threads.

    Geometry needs the digits and a recipe may ask for them; what may be rounded is bfloat16, whatever is set here.
    """
    # The newer `fp32_precision` cannot be set for convolutions alone: PyTorch then refuses to be asked for the old one.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def can_compile() -> bool:
    """Whether torch.compile can work here: a C++ compiler, Python's headers, and Linux, where it is dependable."""
    headers = Path(sysconfig.get_path("include", scheme="posix_prefix"), "Python.h")
    if not torch.cuda.is_available():  # a CUDA toolkit without a device is worth no warning
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return sys.platform == "linux" and headers.is_file() and shutil.which(os.environ.get("CXX", "g++")) is not None


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep the memory that a step frees.

    By default every large activation is mapped and unmapped anew, and up to half of the CPU time of a training step
    goes into page faults. Elsewhere (musl, macOS, Windows) nothing is done.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def cpu_name() -> str:
    """Return the processor's name."""
    return cpu_field("model name") or platform.processor() or platform.machine()
