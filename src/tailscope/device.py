"""Where and how fast a run computes: device, precision, threads, and the engine that takes the steps.

The fastest engine is measured once on a machine, and then remembered. Two shapes of the same step are timed in turn, on
a throw-away copy of the network: PyTorch's own operations (`eager`) and our kernel for batch norm, shortcut and ReLU
between them (`fused`, on a CPU). The least time of each counts, since whatever else the machine does can only add to
it. `torch.compile` (`compiled`) takes up to a minute before its first step, so it is tried where the whole training is
much longer than that, and is taken where it repays it. The times are kept in the user's cache. No engine changes a
result beyond rounding, so none of this is in any key; what a stage was trained with is in its description.

Processes that train together: one leads and owns the store and the results, the others follow its orders.

Every process runs the same command. The leader goes on alone, and calls the others in where work is worth sharing: it
announces an order, all carry it out, and sum what they found. Lightning Fabric starts the processes (also under
`torchrun`), gives each its device and connects them (gloo on CPUs, NCCL on GPUs).
"""

import ctypes
import hashlib
import importlib
import json
import logging
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tailscope.errors import UserError, one_line, unknown
from tailscope.networks import norm_act
from tailscope.networks.norm_act import cache_folder, cpu_field
from tailscope.progress import Progress, Quiet
from tailscope.store.files import write_json

Engine = Literal["eager", "fused", "compiled"]
"""What computes the steps of a training: PyTorch's own operations, our kernel between them, or torch.compile."""

_SHARED_FROM_PIXELS = 50_000
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
        cls, device: str = "auto", *, engine: str = "auto", progress: Progress | None = None, keep_memory: bool = True
    ) -> "Runtime":
        """Pick the device and what it can do; tune the process's allocator, and let float32 mean float32 on CUDA.

        `cuda` is the current device, and the runtime's has its number. The engine `auto` is the one that is measured to
        be the fastest. Without `keep_memory` what is freed is not kept: where no networks run and memory is short.

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
            raise unknown("--device", device, ("auto", "cpu", "cuda", "cuda:N"))
        if chosen.type == "cuda":
            if (chosen.index or 0) >= torch.cuda.device_count():
                raise UserError(
                    f"--device {device}: this machine has no such CUDA device that PyTorch can use; take cpu"
                )
            chosen = torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
            torch.cuda.set_device(chosen)
            # Geometry needs all digits of float32 and a recipe may ask for them; what may be rounded is bfloat16. The
            # newer `fp32_precision` cannot be set for convolutions alone: PyTorch then refuses to be asked for the old.
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        if keep_memory:
            keep_freed_memory()
        low = torch.bfloat16 if has_bf16(chosen) else torch.float32
        return cls(chosen, low, _asked_for(engine, chosen), progress or Quiet())

    def dtype(self, precision: Literal["auto", "fp32"]) -> torch.dtype:
        """Return the type of convolutions and matrix products under a recipe's precision."""
        return torch.float32 if precision == "fp32" else self.low_precision

    @contextmanager
    def threads_for(self, pixels: int) -> Iterator[None]:
        """Compute on one CPU thread while batches, of so many pixels, are too small to share out.

        On 8x8 digits waiting for the other threads costs more than they bring, and many times more when another
        process has one of the cores.
        """
        threads = torch.get_num_threads()
        if pixels < _SHARED_FROM_PIXELS:
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
    """Return the engine that was asked for, None for auto; refuse one that this machine has not."""
    match engine:
        case "auto":
            return None
        case "eager":
            return engine
        case "fused":
            if device.type == "cpu" and norm_act.available():
                return engine
            needs = "its kernel needs the CPU of a Linux machine with a C++ compiler"
        case "compiled":
            if can_compile():
                return engine
            needs = "it needs Linux, a C++ compiler and Python's headers"
        case _:
            raise unknown("--engine", engine, ("auto", *get_args(Engine)))
    raise UserError(f"--engine {engine}: {needs}; take auto or eager")


def arithmetic(device: torch.device, precision: torch.dtype, engine: str = "eager") -> dict[str, str | None]:
    """Return what the numbers of a trained stage depend on beyond its key; `engine` names all that took its steps."""
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
    return (
        torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and "avx512_bf16" in cpu_field("flags").split()
    )


def can_compile() -> bool:
    """Whether torch.compile can work here: a C++ compiler, Python's headers, and Linux, where it is dependable."""
    headers = Path(sysconfig.get_path("include", scheme="posix_prefix"), "Python.h")
    if not torch.cuda.is_available():  # a CUDA toolkit without a device is worth no warning
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return sys.platform == "linux" and headers.is_file() and shutil.which(os.environ.get("CXX", "g++")) is not None


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep the memory that a step frees; with another allocator nothing is done.

    By default every large activation is mapped anew, and page faults take up to half of a training step's CPU time.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def cpu_name() -> str:
    """Return the processor's name."""
    return cpu_field("model name") or platform.processor() or platform.machine()


SECONDS, ROUNDS = 3.0, 12
"""How long all timing takes, compiling aside, and how often each engine takes its turn at most: both are limits."""

TIMED_FROM_PIXELS = 100_000_000
"""From how many pixels on a training is worth timing: 100,000 CIFAR images, a minute or two on two cores."""

COMPILED_FROM_SECONDS = 1_200.0
"""How long a training takes at least for which compiling is tried: compiling takes about 5 % of that."""

_TIMING = threading.Lock()
"""Trainings that begin at the same time in threads: one measures, the others find its times."""

_log = logging.getLogger(__name__)
_clock = time.perf_counter

_Prepare = Callable[[Engine], Callable[[], object]]
"""Returns, for an engine, what takes a step on a copy of the network and waits for it; ready to be timed."""


@dataclass(frozen=True)
class Work:
    """A training as far as its engine is concerned: `steps` of images [B, H, W, C]; those alike share their times."""

    alike: Mapping[str, object]
    images: tuple[int, ...]
    steps: int


@dataclass(frozen=True)
class _Times:
    """What was measured: the seconds of a step with each engine, and how long compiling took."""

    step: dict[Engine, float] = field(default_factory=dict)
    compiling: float = 0.0

    def whole(self, engine: Engine, steps: int) -> float:
        """Return the seconds of a whole training."""
        return steps * self.step[engine] + (self.compiling if engine == "compiled" else 0.0)


def possible(network: nn.Module, device: torch.device, *, compiles: bool = True) -> list[Engine]:
    """Return the engines that can train a network here; `compiles`: whether the training's steps can be compiled."""
    fused = device.type == "cpu" and norm_act.fits(network)
    found: list[tuple[Engine, bool]] = [("eager", True), ("fused", fused), ("compiled", compiles and can_compile())]
    return [engine for engine, usable in found if usable]


def choose(engines: Sequence[Engine], work: Work, prepare: _Prepare, tell: Callable[[str], object] = str) -> Engine:
    """Return which of the possible engines finishes a training first; too short to be timed, the one that usually does.

    `tell` receives a line on what was measured just now.
    """
    plain = [engine for engine in engines if engine != "compiled"]
    if len(engines) == 1:
        return plain[-1]
    with _TIMING:
        known = times = _recall(work)
        if not times.step.keys() >= set(plain):
            long = work.steps * math.prod(work.images[:3]) >= TIMED_FROM_PIXELS
            times = _Times(_in_turn({engine: prepare(engine) for engine in plain}, SECONDS * 3 / 4) if long else {})
        if not times.step:
            return plain[-1]
        best = min(plain, key=times.step.__getitem__)
        if {"compiled"} & set(engines) - times.step.keys() and times.whole(best, work.steps) >= COMPILED_FROM_SECONDS:
            times = _with_compiled(times, best, prepare)
        chosen = min(times.step.keys() & set(engines), key=lambda engine: times.whole(engine, work.steps))
        if times != known:
            _keep(work, times)
            tell(f"engine {chosen}; seconds a step: {', '.join(f'{e} {s:.3g}' for e, s in times.step.items())}")
    return chosen


def _in_turn(steps: Mapping[Engine, Callable[[], object]], seconds: float) -> dict[Engine, float]:
    """Return the least seconds of a step with each engine, in two rounds and as many more as fit into the time.

    Nothing is returned where even two rounds take longer than `SECONDS`: the machine is too busy to tell.
    """
    least = dict.fromkeys(steps, float("inf"))
    began = _clock()
    for rounds in range(1, ROUNDS + 1):
        for engine, step in steps.items():
            started = _clock()
            step()
            least[engine] = min(least[engine], _clock() - started)
            if _clock() - began > SECONDS and rounds <= 2:
                return {}
        if rounds >= 2 and (_clock() - began) * (rounds + 1) / rounds > seconds:
            break
    return least


def _with_compiled(times: _Times, best: Engine, prepare: _Prepare) -> _Times:
    """Return the times with those of compiled steps, in turn with the best others; without, where that fails."""
    plain, started = prepare(best), _clock()
    try:
        compiled = prepare("compiled")  # a step that is captured is compiled here
        compiled()
    except RuntimeError as error:  # of the many that the compiler raises, all are of this kind
        _log.warning("torch.compile fails here, training goes on without: %s", one_line(str(error)))
        return times
    compiling = _clock() - started
    least = _in_turn({best: plain, "compiled": compiled}, SECONDS / 4)
    if not least:
        return times
    # Relative to the others, so that times from two different minutes are not compared.
    return _Times({**times.step, "compiled": times.step[best] * least["compiled"] / least[best]}, compiling)


def _file(work: Work) -> Path:
    name = hashlib.sha256(json.dumps(work.alike, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "engines" / f"{name}.json"


def _recall(work: Work) -> _Times:
    """Return the times of before; none where there are none that can be read."""
    try:
        kept = json.loads(_file(work).read_text())
        step: dict[Engine, float] = {e: float(kept["step"][e]) for e in get_args(Engine) if e in kept["step"]}
        times = _Times(step, float(kept["compiling"]))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # the last where nobody has a home
        return _Times()
    return times if min(times.step.values(), default=0.0) > 0 else _Times()


def _keep(work: Work, times: _Times) -> None:
    """Keep the times for later trainings, if the cache can be written."""
    try:
        path = _file(work)
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"alike": work.alike, "step": times.step, "compiling": times.compiling})
    except (OSError, UserError, RuntimeError) as error:
        _log.debug("times of engines are not kept: %s", error)


_PATIENCE = timedelta(days=7)
"""How long followers wait for the leader, who may fit classifiers and measure geometry for hours in between."""


class Team:
    """The processes that work on one command; by itself a team of one, with nothing to send and nothing to sum."""

    rank: int = 0
    """Number of this process; 0 leads."""
    size: int = 1
    device: torch.device | None = None
    """Of this process; None leaves the choice to the runtime."""

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes; all must call it with the same shapes."""

    def share(self, value: Any) -> Any:
        """Return the leader's value in every process."""
        return value

    def lead(self, order: Any) -> AbstractContextManager[None]:
        """Give the followers an order, which all processes carry out in the block."""
        return nullcontext()

    def orders(self) -> Iterator[Any]:
        """Yield a follower the leader's orders until it is dismissed."""
        return iter(())

    def dismiss(self) -> None:
        """Let the followers go."""

    def leave(self) -> None:
        """End what all did together, without a leader's orders; processes that do not lead end here."""


Solo = Team


class _FabricTeam(Team):
    """Several processes, started and connected by Lightning Fabric."""

    def __init__(self, fabric: Any) -> None:
        self._fabric = fabric
        self._listening = True
        self.rank, self.size, self.device = fabric.global_rank, fabric.world_size, fabric.device

    def sum(self, tensors: Sequence[Tensor]) -> None:
        flat = torch.cat([t.reshape(-1).float() for t in tensors])  # one message, in float32
        with _connected():
            flat = self._fabric.all_reduce(flat, reduce_op="sum")
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def share(self, value: Any) -> Any:
        with _connected():
            return self._fabric.broadcast(value, src=0)

    @contextmanager
    def lead(self, order: Any) -> Iterator[None]:
        self.share(order)
        self._listening = False  # after an exception in the block they no longer do
        yield
        self._listening = True

    def orders(self) -> Iterator[Any]:
        while (order := self.share(None)) is not None:
            yield order
        torch.distributed.destroy_process_group()

    def dismiss(self) -> None:
        if self._listening:  # those left in the middle of an order end when the connection does
            self.share(None)
            torch.distributed.destroy_process_group()

    def leave(self) -> None:
        torch.distributed.destroy_process_group()
        if self.rank:
            raise SystemExit(0)


_ENDED = "another process of this run has ended, with a message of its own or killed, for want of memory perhaps"
_GOES_ON = "the same command goes on from what is finished"
_GRACE = 20.0
"""Seconds that this process has to notice by itself that another has ended; on GPUs it may wait for it for ever."""


def _watch(processes: Sequence[Any], pause: float = 0.5) -> None:
    """End this process with one line, some time after one of those that it has started failed."""

    def watch() -> None:
        while not any(process.poll() for process in processes):
            time.sleep(pause)
        time.sleep(_GRACE)
        for process in processes:
            process.kill()
        os.write(2, f"error: {_ENDED}; {_GOES_ON}\n".encode())
        os._exit(2)

    if processes:
        threading.Thread(target=watch, daemon=True, name="watch-processes").start()


@contextmanager
def _connected() -> Iterator[None]:
    """Turn a broken connection, which only says that another process has ended, into one line."""
    try:
        yield
    except RuntimeError as error:
        said = one_line(str(error))
        lost = re.search("connection (was )?(closed|reset|refused)|broken pipe", said, re.IGNORECASE)
        raise UserError(f"{_ENDED}; {_GOES_ON}{'' if lost else f' ({said})'}") from None


def form(devices: int | None, num_nodes: int, accelerator: str) -> Team:
    """Start the processes and return this one's place among them.

    There are `devices` on each of the machines, one GPU each; None: as many as `torchrun` started, else 1. Without
    Fabric's own environment this starts `devices` - 1 more processes, which run the same command up to here.

    Raises:
        UserError: Lightning is not installed, or there are fewer GPUs than `devices`.
    """
    if torch.distributed.is_torchelastic_launched():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        if devices not in (None, local):
            raise UserError(f"--devices {devices}: torchrun has started {local} processes here; leave --devices out")
        devices, num_nodes = local, int(os.environ["WORLD_SIZE"]) // local
    devices = devices or 1
    if devices * num_nodes == 1:
        return Solo()
    if accelerator == "cuda" and devices > torch.cuda.device_count():
        raise UserError(f"--devices {devices}: this machine has {torch.cuda.device_count()} GPUs that PyTorch can use")
    try:
        from lightning.fabric import Fabric
        from lightning.fabric.strategies.ddp import DDPStrategy
    except ImportError:
        raise UserError("--devices: several processes need Lightning; pip install 'tailscope[ddp]'") from None
    for name in ("lightning.fabric", "lightning.pytorch"):  # it tells standard error who has joined
        logging.getLogger(name).setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    fabric = Fabric(
        accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=DDPStrategy(timeout=_PATIENCE)
    )
    # Lightning's own watch ends this process by SIGKILL, without a word, where another has ended.
    launchers: Any = importlib.import_module("lightning.fabric.strategies.launchers.subprocess_script")
    if hasattr(launchers, "_launch_process_observer"):
        launchers._launch_process_observer = _watch
    fabric.launch()
    if accelerator == "cpu":
        torch.set_num_threads(max(1, threads // devices))
    return _FabricTeam(fabric)
