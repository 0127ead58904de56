"""The experiments, each a plan of runs that ends in a table, and how they are carried out.

Table 1 and Figure 2, the swap of data sets between the stages; Figure 3, the ladder of augmentations; Figures 4 to 8,
what long-tailed training does to each class in feature space. `run` chooses the device, the processes that share the
work and the data that can be read, and writes the results.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from tailscope.data import subsets
from tailscope.data.decoding import readable
from tailscope.data.sources import ImageData, load
from tailscope.device import Runtime, Solo, Team, form
from tailscope.errors import UserError, one_line
from tailscope.experiments.options import FileOptions, Request
from tailscope.experiments.runs import (
    Experiment,
    Run,
    RunsOf,
    Settings,
    evaluate,
    require_parts,
    store_root,
    training_sets,
)
from tailscope.experiments.stages import Backbone, Stages, TrainingSet, follow, require_trainable
from tailscope.experiments.traps import traps
from tailscope.groups import assign_groups
from tailscope.intervals import CELLS, attribute, summarize
from tailscope.measures import describe
from tailscope.measures.collapse import class_means, collapse
from tailscope.progress import Advance, Progress, logging_to, shown_on
from tailscope.registry import split_call
from tailscope.results import check_free, versions, write
from tailscope.store import Store, make_folder
from tailscope.training.recipes import Recipe


def swap(stages: Stages, settings: Settings) -> dict[str, Any]:
    """Train every backbone and classifier pairing for every seed and attribute the gap.

    The 2x2 trains two backbones a seed, not four: the classifiers on a backbone share its features. Where the settings
    name fewer backbones, only their cells are there, and nothing is attributed. Returns what `swap.json` holds.
    """
    cells, own = defaultdict[str, list[Any]](list), defaultdict[str, list[Any]](list)
    experiment = Experiment(stages, settings)
    for run, backbone in experiment.backbones(swap_runs):
        found, name = (own, run.encoder) if run.stage2 is None else (cells, run.row)
        found[name].append(evaluate(stages, run, backbone, f"seed {run.seed}: {run.row}"))
    outcomes = {row: np.stack(per_seed) for row, per_seed in cells.items()}
    result = experiment.header("swap")
    labels = stages.data.test.labels.numpy()
    whole = all(cell in outcomes for cell in CELLS)
    if not whole:
        result["warnings"].append(
            f"only the backbones {', '.join(settings.backbones or ())} were trained: the gap and its attribution need "
            "both lt and true"
        )
    _log_accuracies(stages, "swap", settings, {**cells, **{f"{name} stage1": right for name, right in own.items()}})
    return {
        **result,
        "cells": {row: summarize(right, labels, result["groups"]) for row, right in outcomes.items()},
        "stage1": {name: summarize(np.stack(right), labels, result["groups"]) for name, right in own.items()},
        "attribution": attribute(outcomes, labels, result["groups"]) if whole else None,
    }


def swap_runs(settings: Settings, sets: Mapping[str, TrainingSet], seed: int) -> Iterator[Run]:
    """Yield a seed's runs: of each backbone its own classifier, then one retrained on each training set."""
    recipe = settings.recipe
    for b in settings.backbones or sets:
        stage1 = recipe.backbone(sets[b].spec)
        yield Run(f"{b} stage1", seed, b, stage1, sets[b])
        for c in sets:
            yield Run(f"{b}->{c}", seed, b, stage1, sets[b], recipe.classifier(sets[c].spec), sets[c])


AUGMENTATIONS = {
    "none": {"autoaugment": False, "mix": False},
    "mixup": {"autoaugment": False, "mix": True},
    "autoaugment": {"autoaugment": True, "mix": False},
    "autoaugment+mixup": {"autoaugment": True, "mix": True},
}
"""What augments stage 1, beyond the crop and flip that are on everywhere."""


def ladder(stages: Stages, settings: Settings) -> dict[str, Any]:
    """Train a long-tailed backbone per augmentation and seed, and evaluate four classifiers on each.

    `stage1` is the backbone's own classifier; `stage2` cRT: a new one with class-balanced resampling of D_LT;
    `stage2_aa` the same with AutoAugment in stage 2; `bound` a new one trained on D*. Returns what `ladder.json` holds.

    Raises:
        UserError: AutoAugment cannot take the images.
    """
    channels = stages.data.train.channels
    if channels not in (1, 3):
        raise UserError(f"{stages.data.name}: images have {channels} channels; the ladder's AutoAugment takes 1 or 3")
    correct: dict[str, dict[str, list[Any]]] = {}
    experiment = Experiment(stages, settings)
    for run, backbone in experiment.backbones(ladder_runs):
        name, rung = run.row.split(": ")
        right = evaluate(stages, run, backbone, f"seed {run.seed}: {name}, {rung}")
        correct.setdefault(name, {}).setdefault(rung, []).append(right)
    result = experiment.header("ladder")
    labels = stages.data.test.labels.numpy()
    rungs = {f"{name}: {rung}": right for name, of_name in correct.items() for rung, right in of_name.items()}
    _log_accuracies(stages, "ladder", settings, rungs)
    return {
        **result,
        "augmentations": {
            name: {rung: summarize(np.stack(right), labels, result["groups"]) for rung, right in rungs.items()}
            for name, rungs in correct.items()
        },
    }


def ladder_runs(settings: Settings, sets: Mapping[str, TrainingSet], seed: int) -> Iterator[Run]:
    """Yield a seed's runs: the four classifiers of each augmentation's backbone.

    Raises:
        UserError: the recipe does everywhere what rows differ in.
    """
    recipe, lt, true = settings.recipe, sets["lt"], sets["true"]
    _require_plain(recipe, "ladder")
    if split_call(recipe.autoaugment)[0] in [split_call(call)[0] for call in recipe.augment]:
        raise UserError(f"ladder: its rows add {recipe.autoaugment}, which --augment has already; leave it out there")
    classifiers = {
        "stage2": (recipe.classifier(lt.spec, sampler="class_balanced"), lt),
        "stage2_aa": (recipe.classifier(lt.spec, sampler="class_balanced", autoaugment=True), lt),
        "bound": (recipe.classifier(true.spec), true),
    }
    for name, augmentation in AUGMENTATIONS.items():
        encoder = "lt" if name == "none" else f"lt+{name}"
        stage1 = recipe.backbone(lt.spec, **augmentation)
        yield Run(f"{name}: stage1", seed, encoder, stage1, lt)
        for rung, (stage2, data) in classifiers.items():
            yield Run(f"{name}: {rung}", seed, encoder, stage1, lt, stage2, data)


def _require_plain(recipe: Recipe, experiment: str) -> None:
    """Refuse a recipe that mixes every backbone."""
    if recipe.always_mix:
        raise UserError(
            f"{experiment}: its rows are backbones with and without mixing, and the recipe {recipe.name} mixes all of"
            f" them ({recipe.always_mix}); take another recipe"
        )


def _log_accuracies(stages: Stages, verb: str, settings: Settings, correct: Mapping[str, Sequence[Any]]) -> None:
    """Give loggers the accuracy of every row: a step for each seed, as which test images [M] it gets right says."""
    for k, seed in enumerate(settings.seeds):
        numbers = {f"accuracy/{row}": float(right[k].mean()) for row, right in correct.items()}
        last = k + 1 == len(settings.seeds)
        stages.runtime.progress.log(f"{stages.data.name} {verb}", seed, numbers, last=last)


ENCODERS = {"lt": ("lt", False), "lt+mixup": ("lt", True), "true": ("true", False)}
"""Each encoder's training set and whether stage 1 mixes."""


def geometry(stages: Stages, settings: Settings) -> dict[str, Any]:
    """Describe every class under three encoders, for every seed.

    The seen samples are always D_LT. `paper` takes as unseen D* without D_LT, which the true encoder has trained on;
    `calibrated` the test images, which no encoder has trained on. Returns what `geometry.json` holds.
    """
    encoders: dict[str, dict[str, Any]] = {name: {"seeds": {}} for name in ENCODERS}
    experiment = Experiment(stages, settings)
    for run, backbone in experiment.backbones(geometry_runs):
        label = f"seed {run.seed}: {run.encoder}"
        measured = _measure(stages, settings, backbone, experiment.lt_sets[-1], label)
        encoders[run.encoder]["seeds"][str(run.seed)] = measured
    for encoder in encoders.values():
        encoder["mean"] = {variant: _mean_over_seeds(encoder["seeds"], variant) for variant in ("paper", "calibrated")}
    result = experiment.header("geometry")
    if not settings.recipe.converged:
        result["warnings"].append("geometry not converged: within-class variance keeps shrinking in longer training")
    return {**result, "encoders": encoders}


def geometry_runs(settings: Settings, sets: Mapping[str, TrainingSet], seed: int) -> Iterator[Run]:
    """Yield a seed's runs: a backbone for each encoder, without a classifier of its own.

    Raises:
        UserError: the recipe does everywhere what rows differ in.
    """
    _require_plain(settings.recipe, "geometry")
    for name, (data, mix) in ENCODERS.items():
        yield Run(name, seed, name, settings.recipe.backbone(sets[data].spec, mix=mix), sets[data])


def _measure(stages: Stages, settings: Settings, backbone: Backbone, lt: TrainingSet, label: str) -> dict[str, Any]:
    """Return the `paper` and the `calibrated` description of one encoder, beside the classifier that came with it."""
    data = stages.data
    train, test = stages.clean_features(backbone, "train"), stages.clean_features(backbone, "test")
    labels, seen = data.train.labels, torch.from_numpy(lt.rows)
    is_unseen = torch.ones(len(labels), dtype=torch.bool)
    is_unseen[seen] = False
    unseen = {"paper": (train[is_unseen], labels[is_unseen]), "calibrated": (test, data.test.labels)}
    means = class_means(train[seen], labels[seen], data.train.num_classes)
    classifier = (backbone.weight, backbone.bias, means)
    collapsed, described = collapse(train[seen], labels[seen], *classifier), {}
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
        described[variant]["collapse"] = {"train": collapsed, "unseen": collapse(features, classes, *classifier)}
    return described


def _advance_by_one(advance: Advance, *_: int) -> None:
    advance(1)


def _mean_over_seeds(runs: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """Return the mean over seeds of every number of every class and group, and of all classes together."""
    per_seed = [run[variant] for run in runs.values()]
    groups = {}
    for name in per_seed[0]["groups"]:
        entries = [run["groups"][name] for run in per_seed if run["groups"][name] is not None]
        groups[name] = mean_entry(entries) if entries else None
    classes = [mean_entry(entries) for entries in zip(*(run["classes"] for run in per_seed), strict=True)]
    together = {part: mean_entry([run["collapse"][part] for run in per_seed]) for part in ("train", "unseen")}
    return {"classes": classes, "groups": groups, "collapse": together}


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


EXPERIMENTS: dict[str, Callable[[Stages, Any], dict[str, Any]]] = {
    "swap": swap,
    "ladder": ladder,
    "geometry": geometry,
}
"""Each takes the stages and its settings; `experiments.compare` brings one of its own, with more settings."""

RUNS: dict[str, RunsOf] = {"swap": swap_runs, "ladder": ladder_runs, "geometry": geometry_runs}
"""What each of them trains."""

Waves = Callable[[Stages, Any], Iterator[list[Run]]]
"""What an experiment needs, as far as it is known when what came before is stored."""


def waves_of(verbs: Sequence[str]) -> Waves:
    """Return all that these experiments need, in one wave."""

    def waves(stages: Stages, settings: Settings) -> Iterator[list[Run]]:
        sets = {seed: training_sets(stages, settings, seed) for seed in settings.seeds}
        of = [RUNS[verb] for verb in verbs if verb in RUNS]
        yield [run for seed in settings.seeds for runs in of for run in runs(settings, sets[seed], seed)]

    return waves


@dataclass(frozen=True)
class Processes:
    """The processes that work on a data set, and this one that leads them."""

    data: ImageData
    runtime: Runtime
    team: Team
    options: FileOptions

    def recipe(self, recipe: Recipe) -> Recipe:
        """Return the recipe with its batches cut for the team.

        Raises:
            UserError: the recipe does not suit the data, or the team.
        """
        recipe = recipe.with_micro_batches(self.options.micro_batches or self.team.size)
        require_trainable(self.data, self.team, recipe.stage1, recipe.augment)
        return recipe

    def stages(self, store: Store, progress: Progress, tell: Callable[[str], object] = str) -> Stages:
        """Return the stages on the images that can be read; with `verify`, `tell` gets a line for each that cannot.

        Raises:
            UserError: as `decoding.readable`.
        """
        data, workers = self.data, self.options.workers
        if not data.in_memory:
            verify = self.options.verify
            data = readable(data, store, verify=verify, workers=workers, progress=progress, tell=tell)
        return Stages(data, store, replace(self.runtime, progress=progress), self.team, workers)


def check_file_options(data: ImageData, options: FileOptions) -> None:
    """Refuse options for images in files where these are in memory, with a `UserError`."""
    if data.in_memory and any(getattr(options, option.name) != option.default for option in fields(FileOptions)):
        raise UserError(
            f"{data.name}: --devices, --num-nodes, --micro-batches, --workers and --verify are for images in files"
            " (folder:, list: or hf:)"
        )


@contextmanager
def start_processes(data: ImageData, options: FileOptions, runtime: Runtime) -> Iterator[Processes]:
    """Start the processes that the options ask for; only their leader comes back from here, the others serve it.

    Raises:
        UserError: the options are for images in files and these are in memory; or as `form`.
    """
    check_file_options(data, options)
    if data.in_memory:
        yield Processes(data, runtime, Solo(), options)
        return
    team = form(options.devices, options.num_nodes, runtime.device.type)
    runtime = replace(runtime, device=team.device or runtime.device)
    if team.rank > 0:
        follow(team, runtime, options.workers)
    try:
        yield Processes(data, runtime, team, options)
    finally:
        team.dismiss()


def run(
    request: Request,
    verbs: Sequence[str],
    settings: Settings | None = None,
    experiments: Mapping[str, Callable[[Stages, Any], dict[str, Any]]] = EXPERIMENTS,
    waves: Waves | None = None,
    possible: Callable[[Stages, Any], Iterable[Run]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run experiments that share a store, and the verb `subset`; write their results where the request names an OUT.

    Everything that can be refused is refused before the first training. Settings are those of the request, unless
    they are given. Where the request names a place, what `waves` tell is made there first, and then recalled;
    `possible` are all runs that may come, where the first wave does not say so. Returns the results by verb.

    Raises:
        UserError: an option, the data or OUT is not usable.
    """
    request.check_place()
    console = request.console or Console(quiet=True)
    notes = partial(Console(stderr=True, quiet=console.quiet).out, highlight=False)
    settings = settings or Settings.of(request)
    data = load(request.data, data_root=request.data_root)
    runtime = Runtime.choose(request.own_device(request.device), engine=request.engine)
    with (
        start_processes(data, request, runtime) as processes,
        shown_on(console) as shown,
        logging_to(shown, request.logger, request.out) as progress,
    ):
        settings = settings.model_copy(update={"recipe": processes.recipe(settings.recipe)})
        for note in data.notes():
            notes(f"warning: {one_line(note)}")
        for seed in settings.seeds:
            subsets.draw(data.train, settings.profile, settings.protocol, settings.subset_seed_of(seed))
        waves = waves or waves_of(verbs)
        seen = Stages(data, Store(Path(), create=False), runtime)  # to list runs, which asks no store
        require_parts(data, possible(seen, settings) if possible else next(waves(seen, settings)))
        if request.out is not None:
            make_folder(request.out, "--out")
        if data.in_memory:  # which files can be read, and so the spec, is known later
            _check_free(data, settings, request, verbs)
        stages = processes.stages(Store(store_root(request.out, request.store)), progress, notes)
        drawn = _check_free(stages.data, settings, request, verbs)
        if request.elsewhere:
            from tailscope.experiments.trainings import make_ahead  # here because most runs do without it

            make_ahead(stages, waves(stages, settings), request, request.device, notes)
        results = _run(stages, settings, request, verbs, experiments, drawn)
    if stages.trained == 0 < stages.recalled:
        console.print(f"Nothing was trained: all {stages.recalled} stages were in the store.")
    return results


def _run(
    stages: Stages,
    settings: Settings,
    request: Request,
    verbs: Sequence[str],
    experiments: Mapping[str, Callable[[Stages, Any], dict[str, Any]]],
    drawn: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Run the experiments and write their results, and the subset that was drawn."""
    results: dict[str, dict[str, Any]] = {}
    for verb in verbs:
        result = drawn if verb == "subset" else experiments[verb](stages, settings)
        if verb != "subset":
            results[verb] = result
        if request.out is not None:
            check_free(request.out, verb, result["spec"], overwrite=request.overwrite)  # another may have been faster
            write(request.out, verb, result)
    return results


def _check_free(data: ImageData, settings: Settings, request: Request, verbs: Sequence[str]) -> dict[str, Any]:
    """Refuse to replace results of another spec in OUT; return the subset of the first seed."""
    drawn = describe_subset(data, settings.profile, settings.protocol, settings.subset_seed_of(settings.seeds[0]))
    if request.out is not None:
        for verb in verbs:
            spec = drawn["spec"] if verb == "subset" else settings.spec(data)
            check_free(request.out, verb, spec, overwrite=request.overwrite)
    return drawn


def find_traps(request: Request) -> list[str]:
    """Return what `traps` finds in the trainings of `swap`, `ladder` and `geometry`, with the first seed.

    Raises:
        UserError: an option or the data is not usable.
    """
    settings, data = Settings.of(request), load(request.data, data_root=request.data_root)
    check_file_options(data, request)
    store = Store(store_root(request.out, request.store), create=False)
    stages = Stages(data, store, Runtime.choose("cpu"))
    sets = training_sets(stages, settings, settings.seeds[0])
    runs = list(RUNS["swap"](settings, sets, 0))
    require_parts(data, runs)
    for verb in ("ladder", "geometry"):
        with suppress(UserError):  # they refuse some of what `swap` takes
            runs += list(RUNS[verb](settings, sets, 0))
    specs = [stage for run in runs for stage in (run.stage1, run.stage2) if stage is not None]
    return traps(data, settings.profile, list(sets["lt"].spec.counts), settings.recipe, specs)


def describe_subset(data: ImageData, profile: str, protocol: str, seed: int) -> dict[str, Any]:
    """Draw a long-tailed subset and return it as `subset.json` holds it.

    Raises:
        UserError: the profile, protocol or seed does not fit the data.
    """
    drawn = subsets.draw(data.train, profile, protocol, seed)
    groups, rule = assign_groups(drawn.counts)
    return {
        "schema": "tailscope.subset/1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "spec": {
            "data": data.name,
            "fingerprint": data.fingerprint,
            "profile": subsets.canonical(profile),
            "protocol": protocol,
            "seed": seed,
        },
        "environment": {"versions": versions()},
        "dataset": {"name": data.name, "class_names": list(data.train.class_names)},
        "counts": drawn.counts,
        "groups": groups,
        "groups_rule": rule,
        "warnings": data.notes(),
        "sha256": drawn.sha256,
        "indices": [kept.tolist() for kept in drawn.indices],
    }
