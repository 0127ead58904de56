"""The runs of an experiment over all seeds: the plan counts them, and the claims recall their outcomes."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailscope.experiments import geometry, ladder, swap
from tailscope.experiments.lab import Lab
from tailscope.experiments.runs import Run, evaluate, training_sets
from tailscope.experiments.settings import Settings
from tailscope.progress import Quiet

Outcomes = dict[str, NDArray[np.bool_]]
"""Of each row, [S, M]: seeds by test items, whether top-1 was right."""

_RUNS = {"swap": swap.runs, "ladder": ladder.runs, "geometry": geometry.runs}


def runs(lab: Lab, settings: Settings, experiment: str) -> Iterator[Run]:
    """Yield the runs of `swap`, `ladder` or `geometry`, those of a backbone together."""
    for seed in settings.seeds:
        yield from _RUNS[experiment](settings, training_sets(lab, settings, seed), seed)


def outcomes(lab: Lab, settings: Settings, experiment: str) -> Outcomes:
    """Return which test images each row of `swap` or `ladder` gets right; everything must have been trained."""
    quiet = copy.copy(lab)
    quiet.runtime = replace(lab.runtime, progress=Quiet())
    found: dict[str, list[Any]] = {}
    for run in runs(lab, settings, experiment):
        backbone = quiet.backbone(run.stage1, run.trained_on.rows, run.seed, run.encoder)
        found.setdefault(run.row, []).append(evaluate(quiet, run, backbone, run.row))
    return {row: np.stack(per_seed) for row, per_seed in found.items()}
