"""An experiment from what was asked for, over its runs, to what the result file tells of them.

Each experiment lists its runs in a function `..._runs`, before anything is trained: the experiment works them off, a
reproduction's plan counts them.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tailscope.data.sources import ImageData
from tailscope.data.subsets import canonical, require_seed
from tailscope.device import arithmetic_of
from tailscope.errors import UserError, expanded, unknown
from tailscope.experiments.options import Request
from tailscope.experiments.stages import Backbone, Stages, TrainingSet
from tailscope.experiments.traps import traps
from tailscope.groups import assign_groups
from tailscope.measures.chance import MOST_PERMUTATIONS
from tailscope.methods import LOSSES, MIXINGS, SAMPLERS, TASKS, WEIGHTS
from tailscope.networks import LAST_LAYERS
from tailscope.plugins import Plugin, told
from tailscope.registry import Registry
from tailscope.results import command, versions
from tailscope.spec import BnMode, RunSpec, StageSpec, backbone_key
from tailscope.store import Store
from tailscope.training.loop import new_model
from tailscope.training.objective import Objective, mixing_of
from tailscope.training.recipes import CHOICES, Recipe, augmentations_of, recipe_by_name
from tailscope.training.step import Epochs

_MAX_SEEDS = 1_000
_MAX_DIGITS = 30
"""Limits that only a slip of the pen exceeds."""

CALLS: dict[str, Registry[Any]] = {
    "loss": LOSSES,
    "weights": WEIGHTS,
    "sampler": SAMPLERS,
    "mix": MIXINGS,
    "last_layer": LAST_LAYERS,
    "pretrain": TASKS,
    "second_sampler": SAMPLERS,
}
"""Fields of a stage that are call-strings; in keys of the store they are written in full."""


class Settings(BaseModel):
    """What decides the results of an experiment on a data set; `options` says what each field means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: str
    protocol: str
    recipe: Recipe
    seeds: tuple[int, ...]
    subset_seed: int | None = None
    matched: bool = False
    permutations: int = 999
    backbones: tuple[str, ...] | None = None

    @classmethod
    def of(cls, request: Request) -> Self:
        """Return the part of a request that decides results; raise `UserError` where an option is wrong."""
        if request.bn_mode not in get_args(BnMode):
            raise unknown("--bn-mode", request.bn_mode, get_args(BnMode))
        if not 0 <= request.permutations <= MOST_PERMUTATIONS:
            raise UserError(f"--permutations {request.permutations}: expected 0 to {MOST_PERMUTATIONS:,}")
        if request.subset_seed is not None:
            require_seed(request.subset_seed, request.protocol, "--subset-seed")
        recipe = recipe_by_name(request.recipe).with_bn_mode(cast(BnMode, request.bn_mode))
        methods = {name: getattr(request, "mix" if name == "always_mix" else name) for name in CHOICES}
        return cls(
            profile=canonical(request.profile),
            protocol=request.protocol,
            recipe=recipe.with_augment(request.augment).with_schedule(request.schedule).with_methods(**methods),
            seeds=parse_seeds(request.seeds),
            subset_seed=request.subset_seed,
            matched=request.matched,
            permutations=request.permutations,
            backbones=parse_backbones(request.backbones, matched=request.matched),
        )

    def plugins(self) -> list[Plugin]:
        """Return the code from outside the package that a result depends on, each once, by name."""
        return self.recipe.plugins()

    def spec(self, data: ImageData) -> dict[str, Any]:
        """Return what a result depends on, as result files store it.

        `backbones` is left out where all are trained, as in the files from before there was a choice, and `plugins`,
        digests of code from outside the package, where there is none.
        """
        plugins = {plugin.name: plugin.sha256 for plugin in self.plugins()}
        return {
            **self.model_dump(mode="json", exclude={"backbones"} if self.backbones is None else None),
            "profile": canonical(self.profile),
            "data": data.name,
            "fingerprint": data.fingerprint,
            **({"plugins": plugins} if plugins else {}),
        }

    def subset_seed_of(self, seed: int) -> int:
        """Return the seed that draws the subset of a run."""
        return seed if self.subset_seed is None else self.subset_seed


def parse_seeds(given: str | int | Sequence[int]) -> tuple[int, ...]:
    """Return the seeds that `N` (0 ... N-1) or a list `0,3` means.

    >>> parse_seeds("3"), parse_seeds("0,3"), parse_seeds("7,"), parse_seeds([7])
    ((0, 1, 2), (0, 3), (7,), (7,))

    Raises:
        UserError: there is no seed or a great many, or one is negative, repeated or not a whole number.
    """
    text = str(given) if isinstance(given, str | int) else ",".join(map(str, given)) + ","
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and len(part) <= _MAX_DIGITS for part in parts):
        raise UserError(f"--seeds {text}: expected a number of seeds of at least 1, or a list like 0,3")
    values = tuple(map(int, parts))
    if "," not in text:
        if values[0] < 1:
            raise UserError(f"--seeds {text}: at least one seed is needed")
        if values[0] > _MAX_SEEDS:
            raise UserError(
                f"--seeds {text}: more than {_MAX_SEEDS:,} seeds; for the seed {text} itself write `{text},`"
            )
        return tuple(range(values[0]))
    if len(set(values)) < len(values):
        raise UserError(f"--seeds {text}: a seed is given twice")
    return values


def parse_backbones(text: str | None, *, matched: bool = False) -> tuple[str, ...] | None:
    """Return the backbones that a list like `lt` or `lt,true` names, in order; None where that is all of them.

    >>> parse_backbones("lt"), parse_backbones("true,lt"), parse_backbones(None)
    (('lt',), None, None)

    Raises:
        UserError: one is unknown, or there is none.
    """
    if text is None:
        return None
    known = ("lt", "true", "matched") if matched else ("lt", "true")
    asked = [part.strip() for part in text.split(",") if part.strip()]
    if not asked:
        raise UserError(f"--backbones {text}: expected some of {', '.join(known)}, separated by commas")
    if others := [name for name in asked if name not in known]:
        raise unknown("--backbones", others[0], known)
    chosen = tuple(name for name in known if name in asked)
    return None if chosen == known else chosen


def store_root(out: Path | str | None, store: Path | str | None) -> Path:
    """Return the folder of trained stages: `store`, else `$TAILSCOPE_STORE`, else OUT/store, else the user's cache."""
    if store is not None:
        return Path(store)
    if out is not None and not os.environ.get("TAILSCOPE_STORE"):
        return Path(out) / "store"
    return expanded(os.environ.get("TAILSCOPE_STORE") or "~/.cache/tailscope/store")


@dataclass(frozen=True, eq=False)
class Run:
    """One evaluated row of one seed: a backbone, and a classifier retrained on it or, without stage 2, its own."""

    row: str
    """Its name in the result file's provenance."""
    seed: int
    encoder: str
    """The backbone's name for people."""
    stage1: StageSpec
    trained_on: TrainingSet
    stage2: StageSpec | None = None
    retrained_on: TrainingSet | None = None

    @property
    def backbone_key(self) -> str:
        """The store's key of the backbone."""
        return backbone_key(self.stage1, self.seed)

    def spec(self) -> RunSpec | None:
        """Return what the retrained classifier is stored under; None without one."""
        return RunSpec(stage1=self.stage1, stage2=self.stage2, seed=self.seed) if self.stage2 else None


def spelled(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return changes of a stage with every call-string in full; `UserError` for an unknown name.

    >>> spelled({"loss": "focal", "bn_mode": "shifted"})
    {'loss': 'focal(gamma=2.0)', 'bn_mode': 'shifted'}
    """
    return {name: CALLS[name].canonical(v) if name in CALLS and v else v for name, v in changes.items()}


def require_parts(data: ImageData, runs: Iterable[Run]) -> None:
    """Make every part that stages of runs name, once: what refuses a value does so now, not after hours of training.

    Raises:
        UserError: one of them does.
    """
    models: dict[tuple[Any, ...], Any] = {}
    seen: set[tuple[Any, ...]] = set()
    for run in runs:
        network = (run.stage1.model, run.stage1.last_layer, run.stage1.branches)
        for stage in filter(None, (run.stage1, run.stage2)):
            alike = (network, stage.data.profile, stage.model_dump_json(exclude={"data"}))  # whatever was drawn
            if alike not in seen:
                seen.add(alike)
                if network not in models:
                    models[network] = _new_model(data, run.stage1)
                _make_parts(stage, models[network])


def _new_model(data: ImageData, stage: StageSpec) -> Any:
    assert stage.model is not None
    return new_model(stage.model, data.train.channels, data.train.num_classes, 0, stage.last_layer, stage.branches)


def _make_parts(stage: StageSpec, model: Any) -> None:
    """Make what a stage names, but for its network, and forget it."""
    counts = torch.tensor(stage.data.counts)
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    Epochs(stage, len(labels), stage.data.profile)
    Objective(stage, stage.data.counts, model.feature_dim, 0, torch.device("cpu"))
    mixing_of(stage, stage.data.counts, model)
    for call in filter(None, (stage.sampler, stage.second_sampler)):
        SAMPLERS.make(call, labels, len(counts))
    for call in stage.augment:
        augmentations_of(stage.augment).make(call)
    if stage.pretrain is not None:
        TASKS.make(stage.pretrain)


def training_sets(stages: Stages, settings: Settings, seed: int) -> dict[str, TrainingSet]:
    """Return a seed's training sets by name: lt, true, and matched where asked for."""
    subset_seed = settings.subset_seed_of(seed)
    lt = stages.long_tailed(settings.profile, settings.protocol, subset_seed)
    sets = {"lt": lt, "true": stages.true()}
    if settings.matched:
        sets["matched"] = stages.matched(list(lt.spec.counts), subset_seed)
    return sets


def evaluate(stages: Stages, run: Run, backbone: Backbone, label: str) -> NDArray[np.bool_]:
    """Return which test images [M] a run gets right; its classifier is retrained or recalled, or the backbone's own."""
    return stages.correct(*fitted(stages, run, backbone, label))


def fitted(stages: Stages, run: Run, backbone: Backbone, label: str) -> tuple[Backbone, Tensor, Tensor]:
    """Return the backbone as a run's classifier sees it, and that classifier's weight and bias."""
    spec = run.spec()
    if spec is None or run.retrained_on is None:
        return backbone, backbone.weight, backbone.bias
    rows = run.retrained_on.rows
    encoder = stages.for_stage2(backbone, spec.stage2, rows, run.seed)
    found = stages.classifier(spec, encoder, rows, label)
    return encoder, found.tensors["weight"], found.tensors["bias"]


RunsOf = Callable[[Settings, Mapping[str, TrainingSet], int], Iterator[Run]]
"""A seed's runs, given its training sets by name."""


@dataclass
class Experiment:
    """An experiment under way: what its runs need, and what its result file says of those that are done."""

    stages: Stages
    settings: Settings
    lt_sets: list[TrainingSet] = field(default_factory=list)
    """The long-tailed training set of each seed so far."""
    cards: list[dict[str, Any]] = field(default_factory=list)
    """Of the runs so far."""
    specs: list[StageSpec] = field(default_factory=list)
    """The stages of the runs so far."""

    def backbones(self, runs: RunsOf) -> Iterator[tuple[Run, Backbone]]:
        """Yield each run of each seed with its backbone, trained or recalled."""
        for seed in self.settings.seeds:
            sets = training_sets(self.stages, self.settings, seed)
            self.lt_sets.append(sets["lt"])
            for run in list(runs(self.settings, sets, seed)):  # parts that do not fit are refused before any training
                label = f"seed {seed}: backbone on {run.encoder}"
                backbone = self.stages.backbone(run.stage1, run.trained_on.rows, run.seed, label)
                self.specs += [stage for stage in (run.stage1, run.stage2) if stage is not None]
                yield run, backbone
                self.cards.append(_card(self.stages.store, run, backbone))

    def header(self, verb: str) -> dict[str, Any]:
        """Return the fields that every result file starts with, `verb` being the experiment's name."""
        data, recipe, counts = self.stages.data, self.settings.recipe, list(self.lt_sets[0].spec.counts)
        groups, rule = assign_groups(counts)
        warnings = [] if recipe.converged else [f"recipe {recipe.name}: {recipe.card}"]
        return {
            "schema": f"tailscope.{verb}/1",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command(),
            "spec": self.settings.spec(data),
            "environment": {
                "versions": versions(),
                "hardware": self.stages.runtime.describe(),
                **told(self.settings.plugins()),
            },
            "dataset": {
                "name": data.name,
                "class_names": list(data.train.class_names),
                "train_images": len(data.train),
                "test_images": len(data.test),
            },
            "recipe": {"name": recipe.name, "card": recipe.card, "converged": recipe.converged},
            "counts": counts,
            "groups": groups,
            "groups_rule": rule,
            "seeds": list(self.settings.seeds),
            "subset_sha256": [lt.spec.indices_sha256 for lt in self.lt_sets],
            "warnings": [
                *warnings,
                *data.notes(),
                *traps(data, self.settings.profile, counts, recipe, self.specs),
                *differing_arithmetic(self.cards),
            ],
            "provenance": self.cards,
        }


def differing_arithmetic(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a warning for each stage whose stored results were not all computed by the same arithmetic.

    Neither a key nor a result's spec says which it was, and after a training it differs by more than rounding. What a
    stage does not say, because it was stored before stages said it, differs from nothing.

    >>> cards = [{"row": "lt->lt", "seed": k, "arithmetic": {"processor": p}} for k, p in enumerate(["A", "A", "B"])]
    >>> differing_arithmetic(cards)  # doctest: +NORMALIZE_WHITESPACE
    ["backbones were trained by different arithmetic, under the same keys (processor: 'A' of seeds 0 1, 'B' of seed 2):
    part of what differs between them may be due to that"]
    """
    warnings = []
    for card_field, stage in (("arithmetic", "backbones"), ("stage2_arithmetic", "classifiers")):
        seeds: dict[str, dict[str, set[int]]] = {}
        for row in rows:
            for name, value in (row.get(card_field) or {}).items():
                if value is not None:
                    seeds.setdefault(name, {}).setdefault(value, set()).add(row["seed"])
        told = [f"{name}: {_by_seeds(values)}" for name, values in seeds.items() if len(values) > 1]
        if told:
            warnings.append(
                f"{stage} were trained by different arithmetic, under the same keys ({'; '.join(told)}): part of what"
                " differs between them may be due to that"
            )
    return warnings


def _by_seeds(values: Mapping[str, set[int]]) -> str:
    return ", ".join(
        f"{value!r} of seed{'s' * (len(seeds) > 1)} {' '.join(map(str, sorted(seeds)))}"
        for value, seeds in values.items()
    )


_STAGE2_CARD = (
    "key", "profile", "subset_sha256", "counts", "parameters", "epochs", "steps", "batch", "learning_rate",
    "weight_decay", "schedule", "start", "arithmetic",
)  # fmt: skip


def _card(store: Store, run: Run, backbone: Backbone) -> dict[str, Any]:
    """Return the card of one row: everything a reader needs to compare it with another system's.

    Fields without prefix are stage 1's, but for `sampler` and `bn_mode`, which are stage 2's where there is one; `key`
    is the store's key of the backbone, `stage2_key` of the classifier.
    """
    meta, stage1, stage2 = backbone.meta, run.stage1, run.stage2
    return {
        "row": run.row,
        "seed": run.seed,
        "stage1": run.trained_on.name,
        "stage2": None if run.retrained_on is None else run.retrained_on.name,
        "model": stage1.model,
        **{name: meta[name] for name in ("parameters", "epochs", "steps")},
        "micro_batches": stage1.train.micro_batches,
        "processes": meta.get("processes", 1),
        "augmentation": " + ".join([*stage1.augment, *([stage1.mix] if stage1.mix else [])]),
        "stage2_augmentation": None if stage2 is None else " + ".join(stage2.augment),
        "sampler": (stage2 or stage1).sampler,
        "views": stage2 and stage2.views,
        "bn_mode": stage2 and stage2.bn_mode,
        "selection": meta["selection"],
        **_stage_card(stage1),
        **_stage2_card(store, run, backbone),
        **{name: meta[name] for name in ("precision", "compiled")},
        "fused": meta.get("fused", False),
        "device": meta["device"]["gpu"] or meta["device"]["cpu"],
        **{name: meta[name] for name in ("seconds", "images_per_second")},
        **_pretraining_card(stage1, meta),
        "key": backbone.key,
        "arithmetic": arithmetic_of(meta),
    }


def _pretraining_card(stage1: StageSpec, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a backbone was pre-trained on, and for how long; nothing where it was not."""
    if stage1.pretrain is None:
        return {}
    return {"pretrain": stage1.pretrain, "pretraining_seconds": meta["pretraining_seconds"]}


def _stage2_card(store: Store, run: Run, backbone: Backbone) -> dict[str, Any]:
    """Return what a retrained classifier was trained on and how; every field is None without one."""
    spec, found = run.spec(), dict[str, Any]()
    if spec is not None:
        epochs, steps = spec.stage2.train.lengths(sum(spec.stage2.data.counts))
        found = {
            "key": spec.key(),
            "parameters": backbone.weight.numel() + backbone.bias.numel(),
            "epochs": epochs,
            "steps": steps,
            "start": spec.stage2.start,
            "arithmetic": arithmetic_of(store.meta("stage2", spec.key())),
            **_stage_card(spec.stage2),
        }
    return {f"stage2_{name}": found.get(name) for name in _STAGE2_CARD}


def _stage_card(stage: StageSpec) -> dict[str, Any]:
    """Return what the cards say of both stages alike."""
    return {
        "profile": stage.data.profile,
        "subset_sha256": stage.data.indices_sha256,
        "counts": list(stage.data.counts),
        **{name: getattr(stage.train, name) for name in ("batch", "learning_rate", "weight_decay", "schedule")},
    }
