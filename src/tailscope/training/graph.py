"""Whole training steps as CUDA graphs.

A small network spends its time on launching kernels; a graph launches all of a step's at once.

A graph goes on using the memory that it found: its own, and the workspaces that cuBLAS keeps for a stream. Where two
graphs were captured on one stream they share these, and in some versions of PyTorch the end of one graph frees them for
both. So every training has a stream that no other training has at the same time: all of its work runs there, before,
during and after a capture, and its graphs end together, when the last of them has been replayed.
"""

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tailscope.seeds import alone

WARM_UP = 3
"""Steps before the capture: they compile, choose algorithms and create what the optimiser remembers."""

_log = logging.getLogger(__name__)

Step = Callable[..., Tensor]
Replay = Callable[[], None]


_PREPARING = threading.Lock()
"""Compiling, capturing and dealing out streams are done for one thread at a time; replaying is not."""

_IDLE: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)
"""Streams that no training has now. PyTorch deals out the same 32 in turn: two trainings could get one otherwise."""


@contextmanager
def capturing(device: torch.device) -> Iterator["CudaCapture | None"]:
    """Give the block, a whole training, a CUDA stream of its own and what captures steps on it; nothing on a CPU.

    What was captured ends with the block.
    """
    if device.type != "cuda":
        yield None
        return
    with _PREPARING:
        stream = _IDLE[device].pop() if _IDLE[device] else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
    capture = CudaCapture(stream)
    try:
        with torch.cuda.stream(stream):
            yield capture
    finally:
        with _PREPARING:
            stream.synchronize()
            capture.release()
            _IDLE[device].append(stream)


class CudaCapture:
    """How steps run before a capture, and how one is captured: as PyTorch's notes on CUDA graphs ask for.

    The stream is the current one already.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def warm_up(self, step: Step, *given: Tensor | None) -> Tensor:
        """Run a step, while no other thread compiles or captures."""
        with _PREPARING, alone():  # the compiler saves and restores the default generator's state
            return step(*given)

    def record(self, work: Callable[[], None]) -> Replay:
        """Capture `work`, which computes nothing meanwhile, and return what runs it."""
        graph = torch.cuda.CUDAGraph()
        # Another training may use the GPU from another thread of this process.
        with _PREPARING, torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        self._graphs.append(graph)
        return graph.replay

    def release(self) -> None:
        """Free what was captured; none of it can be replayed any more."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


class GraphedStep:
    """A step of fixed shapes that is captured once and replayed: (tensors) -> loss.

    A graph reads and writes fixed places in memory: what is given is copied to them, and the loss from them. All that
    changes from step to step has to come in a tensor, the learning rate too. Where the capture fails, steps go on as
    they are, after a warning.
    """

    def __init__(self, step: Step, capture: CudaCapture) -> None:
        self._step, self._capture = step, capture
        self._calls = 0
        self._replay: Replay | None = None
        self._inputs: tuple[Tensor | None, ...] = ()
        self._loss = torch.empty(0)

    def __call__(self, *given: Tensor | None) -> Tensor:
        """Take a step; the arguments' shapes, and which are None, are the same every time."""
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._capture.warm_up(self._step, *given)
        if self._calls == WARM_UP + 1:
            self._record(given)
        if self._replay is None:
            return self._step(*given)
        for place, new in zip(self._inputs, given, strict=True):
            if place is not None and new is not None:
                place.copy_(new)
        self._replay()
        return self._loss.clone()

    def _record(self, given: tuple[Tensor | None, ...]) -> None:
        self._inputs = tuple(None if tensor is None else tensor.clone() for tensor in given)

        def work() -> None:
            self._loss = self._step(*self._inputs)

        try:
            self._replay = self._capture.record(work)
        except RuntimeError as error:
            _log.warning("the step is not captured as a CUDA graph, training will be slower: %s", error)
