"""Which engine takes the steps of a training the fastest: measured once on a machine, and then remembered.

Two shapes of the same step are timed in turn, on a throw-away copy of the network: PyTorch's own operations (`eager`)
and our kernel for batch norm, shortcut and ReLU between them (`fused`, on a CPU). The least time of each counts, since
whatever else the machine does can only add to it. `torch.compile` (`compiled`) takes up to a minute before its first
step, so it is tried where the whole training is much longer than that, and is taken where it repays it. The times are
kept in the user's cache for each network, batch, precision, processor, number of threads and version of PyTorch. No
engine changes a result beyond rounding, so none of this is in any key; what a stage was trained with is in its
description.
"""

import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from tailscope.errors import UserError, one_line
from tailscope.kernels import norm_act
from tailscope.kernels.build import cache_folder
from tailscope.store.files import write_json
from tailscope.training.runtime import Engine, can_compile

SECONDS = 3.0
"""How long all timing takes, compiling aside."""

ROUNDS = 12
"""How often each engine takes its turn at most: small networks need no three seconds."""

TIMED_FROM_PIXELS = 100_000_000
"""From how many pixels on a training is worth timing: 100,000 CIFAR images, a minute or two on two cores."""

COMPILED_FROM_SECONDS = 1_200.0
"""How long a training takes at least for which compiling is tried: compiling takes about 5 % of that."""

_TIMING = threading.Lock()
"""Trainings that begin at the same time in threads: one measures, the others find its times."""

_log = logging.getLogger(__name__)
_clock = time.perf_counter

Prepare = Callable[[Engine], Callable[[], object]]
"""Returns, for an engine, what takes a step on a copy of the network and waits for it."""


@dataclass(frozen=True)
class Work:
    """A training as far as its engine is concerned.

    Attributes:
        alike: what decides how long a step takes; trainings that are alike share their times.
        images: shape of a step's images, [B, H, W, C].
        steps: planned.
    """

    alike: Mapping[str, object]
    images: tuple[int, ...]
    steps: int

    @property
    def pixels(self) -> int:
        """That all steps together see."""
        return self.steps * math.prod(self.images[:3])


@dataclass(frozen=True)
class Times:
    """What was measured: the seconds of a step with each engine, and how long compiling took."""

    step: dict[Engine, float] = field(default_factory=dict)
    compiling: float = 0.0

    def whole(self, engine: Engine, steps: int) -> float:
        """Return the seconds of a whole training."""
        return steps * self.step[engine] + (self.compiling if engine == "compiled" else 0.0)


def possible(network: nn.Module, device: torch.device, *, compiles: bool = True) -> list[Engine]:
    """Return the engines that can train a network here; `compiles`: whether the training's steps can be compiled."""
    fused = device.type == "cpu" and norm_act.fits(network)
    there: dict[Engine, bool] = {"eager": True, "fused": fused, "compiled": compiles and can_compile()}
    return [engine for engine, usable in there.items() if usable]


def choose(engines: Sequence[Engine], work: Work, prepare: Prepare, tell: Callable[[str], object] = str) -> Engine:
    """Return the engine that finishes a training first; one too short to be timed takes the one that usually does.

    Args:
        engines: the possible ones.
        work: the training.
        prepare: for timing.
        tell: receives a line on what was measured just now.
    """
    plain = [engine for engine in engines if engine != "compiled"]
    if len(engines) == 1:
        return plain[-1]
    with _TIMING:
        known = times = _recall(work)
        if not times.step.keys() >= set(plain):
            long = work.pixels >= TIMED_FROM_PIXELS
            times = Times(_in_turn({engine: prepare(engine) for engine in plain}, SECONDS * 3 / 4) if long else {})
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


def _with_compiled(times: Times, best: Engine, prepare: Prepare) -> Times:
    """Return the times with those of compiled steps, in turn with the best others; without, where that fails."""
    plain, compiled = prepare(best), prepare("compiled")
    started = _clock()
    try:
        compiled()
    except RuntimeError as error:  # of the many that the compiler raises, all are of this kind
        _log.warning("torch.compile fails here, training goes on without: %s", one_line(str(error)))
        return times
    compiling = _clock() - started
    least = _in_turn({best: plain, "compiled": compiled}, SECONDS / 4)
    if not least:
        return times
    # Relative to the others, so that times from two different minutes are not compared.
    return Times({**times.step, "compiled": times.step[best] * least["compiled"] / least[best]}, compiling)


def _file(work: Work) -> Path:
    name = hashlib.sha256(json.dumps(work.alike, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "engines" / f"{name}.json"


def _recall(work: Work) -> Times:
    """Return the times of before; none where there are none that can be read."""
    try:
        kept = json.loads(_file(work).read_text())
        step: dict[Engine, float] = {e: float(kept["step"][e]) for e in get_args(Engine) if e in kept["step"]}
        times = Times(step, float(kept["compiling"]))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # the last where nobody has a home
        return Times()
    return times if min(times.step.values(), default=0.0) > 0 else Times()


def _keep(work: Work, times: Times) -> None:
    """Keep the times for later trainings, if the cache can be written."""
    try:
        path = _file(work)
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"alike": work.alike, "step": times.step, "compiling": times.compiling})
    except (OSError, UserError, RuntimeError) as error:
        _log.debug("times of engines are not kept: %s", error)
