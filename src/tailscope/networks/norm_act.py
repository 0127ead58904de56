"""Batch norm, an optional shortcut and ReLU as one module; on a CPU in a kernel of our own where that is possible.

The kernel passes over the activations twice in each direction, where the separate operations of PyTorch pass six times
forward. It is registered with `torch.library`, so that `torch.compile` and fake tensors know it. The C++ file beside
this one is compiled when it is first needed, and the result is kept in the user's cache.
"""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
_SECONDS = 120
_DIGITS = 64
_log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernel; None where that cannot be had, which costs speed and nothing else.

    It takes a C++ compiler (`$CXX`, else g++) and Linux. The result is kept under `$XDG_CACHE_HOME/tailscope`, named
    by the source, the compiler and the processor, since it is built for the processor at hand. It ends with the digest
    of what stands before, which loaders do not see; a damaged one is compiled again.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or sys.platform != "linux":
        return None
    source = Path(__file__).with_name("batch_norm.cpp")
    try:
        file = cache_folder() / f"{source.stem}-{_fingerprint(source, compiler)}.so"
        if not _is_whole(file):
            _compile(compiler, source, file)
        _share_openmp()
        return ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s is not used, training will be slower: %s", source.name, error)
        return None


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
    content = file.read_bytes() if file.is_file() else b""
    return content[-_DIGITS:] == _digest(content[:-_DIGITS])


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _share_openmp() -> None:
    """Make PyTorch's OpenMP visible to libraries that are loaded from now on."""
    packages = Path(torch.__file__).parent.parent
    bundled = [*sorted(packages.glob("torch*/lib*/libgomp*.so*")), *sorted(packages.glob("torch.libs/libgomp*.so*"))]
    ctypes.CDLL(str(bundled[0]) if bundled else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


_CHANNELS = 16  # how many the kernel handles together
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

Results = TypeVar("Results", bound=Callable[..., tuple[Tensor, ...] | Tensor])


class NormAct(nn.BatchNorm2d):
    """relu(batch_norm(x) + shortcut); to everybody else an `nn.BatchNorm2d`.

    PyTorch's own operations take over for what the kernel does not know: other devices, types and layouts, channels
    that are no multiple of 16, single images, gradients in evaluation, compiled networks, and machines without a
    compiler.
    """

    fused = True
    """Whether the kernel may be used at all."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Return activations [B, C, H, W] normalised, added to the shortcut if there is one, and rectified."""
        if not (self.fused and self._fits(x, shortcut) and available()):
            plain = super().forward(x)
            return F.relu(plain if shortcut is None else plain + shortcut)
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        out: Tensor
        if self.training:
            out, statistics = _Fused.apply(x, shortcut, self.weight, self.bias, self.eps)
            self._track(statistics)
        else:
            assert self.running_mean is not None
            assert self.running_var is not None
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            out = torch.ops.tailscope.scale_shift_relu(x, shortcut, scale, self.bias - self.running_mean * scale)
        return out

    def _fits(self, x: Tensor, shortcut: Tensor | None) -> bool:
        usual = self.affine and self.track_running_stats and self.num_features % _CHANNELS == 0
        # In evaluation there is no gradient.
        suits_mode = self.momentum is not None if self.training else not torch.is_grad_enabled()
        return (
            usual
            and suits_mode
            and x.device.type == "cpu"
            and x.dtype in _NAMES
            and (shortcut is None or shortcut.dtype == x.dtype)
            and x.dim() == 4
            and len(x) > 1  # one value a channel has no variance: PyTorch says so
            and x.is_contiguous(memory_format=torch.channels_last)
            and not torch.compiler.is_compiling()  # the compiler fuses the plain operations itself
        )

    @torch.no_grad()
    def _track(self, statistics: Tensor) -> None:
        """Move the running statistics as `nn.BatchNorm2d` does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        mean, _, unbiased = statistics.unbind()
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)


def available() -> bool:
    """Whether the kernel can be used on this machine; compiles it the first time."""
    return library() is not None


def fits(network: nn.Module) -> bool:
    """Whether the kernel can train a network on the CPU: some of its modules, switched on or off."""
    return any(module.num_features % _CHANNELS == 0 for module in _within(network)) and available()


def switch(network: nn.Module, *, on: bool) -> None:
    """Let a network use the kernel where it fits, or not."""
    for module in _within(network):
        module.fused = on


def _within(network: nn.Module) -> list[NormAct]:
    return [module for module in network.modules() if isinstance(module, NormAct)]


class _Fused(torch.autograd.Function):
    """The kernel with its gradient: a plain autograd function costs a third of one registered with the operator."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        out, statistics = torch.ops.tailscope.norm_act(x, shortcut, weight, bias, eps)
        # A result that the next layer keeps in any case.
        ctx.save_for_backward(x, None if shortcut is None else out, weight, bias, statistics)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return out, statistics

    @staticmethod
    def backward(ctx: Any, arriving: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if arriving is None:
            return None, None, None, None, None
        x, out, weight, bias, statistics = ctx.saved_tensors
        arriving = arriving.contiguous(memory_format=torch.channels_last)
        of_x, of_shortcut, of_weight, of_bias = torch.ops.tailscope.norm_act_backward(
            arriving, out, x, weight, bias, statistics
        )
        return of_x, None if out is None else of_shortcut, of_weight, of_bias, None


_operators = torch.library.Library("tailscope", "DEF")  # type: ignore[no-untyped-call]


def _operator(function: str, schema: str) -> Callable[[Results], Results]:
    """Register an operator: a compiled function that fills the results which the decorated function makes."""

    def register(results: Results) -> Results:
        def run(*given: Any) -> tuple[Tensor, ...] | Tensor:
            made = results(*given)
            tensors = [value for value in given if not isinstance(value, float)]
            tensors += made if isinstance(made, tuple) else [made]
            _call(function, tensors, [ctypes.c_float(value) for value in given if isinstance(value, float)])
            return made

        name = _operators.define(schema)  # type: ignore[no-untyped-call]
        _operators.impl(name, run, "CPU")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"tailscope::{name}", results, lib=_operators)
        return results

    return register


def _call(function: str, tensors: list[Tensor | None], numbers: list[ctypes.c_float]) -> None:
    """Run a compiled function on tensors, rows and channels of the first, and numbers."""
    x = tensors[0]
    assert x is not None
    channels = x.shape[1]
    sizes = (ctypes.c_int64(x.numel() // channels), ctypes.c_int64(channels))
    compiled = getattr(library(), f"{function}_{_NAMES[x.dtype]}")
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    compiled(*pointers, *sizes, *numbers, torch.get_num_threads())


@_operator("forward", "norm_act(Tensor x, Tensor? shortcut, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)")
def _norm_act(x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return relu(batch_norm(x) + shortcut), and float32 [3, C]: means, inverse deviations, unbiased variances."""
    return torch.empty_like(x), weight.new_empty((3, len(weight)))


@_operator(
    "backward",
    "norm_act_backward(Tensor arriving, Tensor? out, Tensor x, Tensor weight, Tensor bias, Tensor statistics)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _norm_act_backward(
    arriving: Tensor, out: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, of the shortcut (empty without one), of weight and of bias."""
    of_shortcut = x.new_empty(0) if out is None else torch.empty_like(x)
    return torch.empty_like(x), of_shortcut, torch.empty_like(weight), torch.empty_like(bias)


@_operator("apply", "scale_shift_relu(Tensor x, Tensor? shortcut, Tensor scale, Tensor shift) -> Tensor")
def _scale_shift_relu(x: Tensor, shortcut: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    """Return relu(x * scale + shift + shortcut), reading activations once."""
    return torch.empty_like(x)
