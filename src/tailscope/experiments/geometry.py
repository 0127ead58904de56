"""Figures 4 to 8: what long-tailed training does to each class in feature space."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from tailscope.experiments.runs import Experiment, Run, Settings
from tailscope.experiments.stages import Backbone, Stages, TrainingSet
from tailscope.measures import describe
from tailscope.progress import Advance

ENCODERS = {"lt": ("lt", False), "lt+mixup": ("lt", True), "true": ("true", False)}
"""Each encoder's training set and whether stage 1 mixes."""


def geometry(stages: Stages, settings: Settings) -> dict[str, Any]:
    """Describe every class under three encoders, for every seed.

    The seen samples are always D_LT. `paper` takes as unseen D* without D_LT, which the true encoder has trained on;
    `calibrated` the test images, which no encoder has trained on. Returns what `geometry.json` holds.
    """
    encoders: dict[str, dict[str, Any]] = {name: {"seeds": {}} for name in ENCODERS}
    experiment = Experiment(stages, settings)
    for run, backbone in experiment.backbones(runs):
        label = f"seed {run.seed}: {run.encoder}"
        measured = _measure(stages, settings, backbone, experiment.lt_sets[-1], label)
        encoders[run.encoder]["seeds"][str(run.seed)] = measured
    for encoder in encoders.values():
        encoder["mean"] = {variant: _mean_over_seeds(encoder["seeds"], variant) for variant in ("paper", "calibrated")}
    result = experiment.header("geometry")
    if not settings.recipe.converged:
        result["warnings"].append("geometry not converged: within-class variance keeps shrinking in longer training")
    return {**result, "encoders": encoders}


def runs(settings: Settings, sets: Mapping[str, TrainingSet], seed: int) -> Iterator[Run]:
    """Yield a seed's runs: a backbone for each encoder, without a classifier of its own."""
    for name, (data, mix) in ENCODERS.items():
        yield Run(name, seed, name, settings.recipe.backbone(sets[data].spec, mix=mix), sets[data])


def _measure(stages: Stages, settings: Settings, backbone: Backbone, lt: TrainingSet, label: str) -> dict[str, Any]:
    """Return the `paper` and the `calibrated` description of one encoder."""
    data = stages.data
    train, test = stages.clean_features(backbone, "train"), stages.clean_features(backbone, "test")
    labels, seen = data.train.labels, torch.from_numpy(lt.rows)
    is_unseen = torch.ones(len(labels), dtype=torch.bool)
    is_unseen[seen] = False
    unseen = {"paper": (train[is_unseen], labels[is_unseen]), "calibrated": (test, data.test.labels)}
    described = {}
    for variant, (features, classes) in unseen.items():
        with stages.runtime.progress.task(f"{label}, geometry ({variant})", data.train.num_classes) as advance:
            described[variant] = describe(
                train[seen],
                labels[seen],
                features,
                classes,
                data.train.class_names,
                permutations=settings.permutations,
                progress=partial(_advance_by_one, advance),
            ).to_json()
    return described


def _advance_by_one(advance: Advance, *_: int) -> None:
    advance(1)


def _mean_over_seeds(runs: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """Return the mean over seeds of every number of every class and group."""
    per_seed = [run[variant] for run in runs.values()]
    groups = {}
    for name in per_seed[0]["groups"]:
        entries = [run["groups"][name] for run in per_seed if run["groups"][name] is not None]
        groups[name] = mean_entry(entries) if entries else None
    classes = [mean_entry(entries) for entries in zip(*(run["classes"] for run in per_seed), strict=True)]
    return {"classes": classes, "groups": groups}


def mean_entry(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the field-wise mean of entries; None where a field is undefined in any of them.

    What is no measurement (names, counts, the number of the nearest class, flags) is kept where all agree, else None.
    A mean of p or q values is descriptive only: it is no p or q value itself.

    >>> mean_entry([{"name": "a", "nearest": 1, "x": 1.0, "y": None}, {"name": "a", "nearest": 4, "x": 3.0, "y": 1.0}])
    {'name': 'a', 'nearest': None, 'x': 2.0, 'y': None}
    """
    found: dict[str, Any] = {}
    for field, first in entries[0].items():
        values = [entry[field] for entry in entries]
        if any(value is None for value in values):
            found[field] = None
        elif isinstance(first, list):
            found[field] = np.mean(values, axis=0).tolist()
        elif isinstance(first, float):
            found[field] = float(np.mean(values))
        else:
            found[field] = first if all(value == first for value in values) else None
    return found
