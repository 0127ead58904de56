"""One run of an experiment, carried out, and what the result file tells of it.

One run of an experiment, known before anything is trained, and its evaluation.

Each experiment lists its runs in a function `runs`: the experiment works them off, a reproduction's plan counts them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailscope.device import arithmetic_of
from tailscope.experiments.settings import Settings
from tailscope.experiments.stages import Backbone, Lab, TrainingSet, for_stage2
from tailscope.groups import assign_groups
from tailscope.results import command, versions
from tailscope.spec import RunSpec, StageSpec, backbone_key


@dataclass(frozen=True, eq=False)
class Run:
    """One evaluated row of one seed: a backbone, and a classifier retrained on it or its own.

    Attributes:
        row: the row's name in the result file's provenance.
        encoder: the backbone's name for people.
        stage1, trained_on: the backbone's stage and training set.
        stage2, retrained_on: the classifier's; None where the backbone's own classifier, or none, is used.
    """

    row: str
    seed: int
    encoder: str
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


def training_sets(lab: Lab, settings: Settings, seed: int) -> dict[str, TrainingSet]:
    """Return a seed's training sets by name: lt, true, and matched where asked for."""
    subset_seed = settings.subset_seed_of(seed)
    lt = lab.long_tailed(settings.profile, settings.protocol, subset_seed)
    sets = {"lt": lt, "true": lab.true()}
    if settings.matched:
        sets["matched"] = lab.matched(list(lt.spec.counts), subset_seed)
    return sets


def evaluate(lab: Lab, run: Run, backbone: Backbone, label: str) -> NDArray[np.bool_]:
    """Return which test images [M] a run gets right; its classifier is retrained or recalled, or the backbone's own."""
    spec = run.spec()
    if spec is None or run.retrained_on is None:
        return lab.correct(backbone, backbone.weight, backbone.bias)
    encoder = for_stage2(lab, backbone, spec.stage2, run.retrained_on.rows, run.seed)
    fitted = lab.classifier(spec, encoder, run.retrained_on.rows, label)
    return lab.correct(encoder, fitted.tensors["weight"], fitted.tensors["bias"])


STAGE2_CARD = (
    "key", "profile", "subset_sha256", "counts", "parameters", "epochs", "steps", "batch", "learning_rate",
    "weight_decay", "schedule", "start", "arithmetic",
)  # fmt: skip


RunsOf = Callable[[Settings, Mapping[str, TrainingSet], int], Iterator[Run]]
"""A seed's runs, given its training sets by name."""


@dataclass
class Journal:
    """Carries out an experiment's runs and keeps what its result file says of them.

    Attributes:
        lab: trains and evaluates.
        settings: what was asked for.
        lt_sets: the long-tailed training set of each seed so far.
        cards: of the runs so far.
    """

    lab: Lab
    settings: Settings
    lt_sets: list[TrainingSet] = field(default_factory=list)
    cards: list[dict[str, Any]] = field(default_factory=list)

    def carry_out(self, runs: RunsOf) -> Iterator[tuple[Run, Backbone]]:
        """Yield each run of each seed with its backbone, trained or recalled."""
        for seed in self.settings.seeds:
            sets = training_sets(self.lab, self.settings, seed)
            self.lt_sets.append(sets["lt"])
            for run in runs(self.settings, sets, seed):
                label = f"seed {seed}: backbone on {run.encoder}"
                backbone = self.lab.backbone(run.stage1, run.trained_on.rows, seed, label)
                yield run, backbone
                self.cards.append(provenance(self.lab, run, backbone))

    def header(self, verb: str) -> dict[str, Any]:
        """Return the fields that every result file starts with, `verb` being the experiment's name."""
        lab, recipe, counts = self.lab, self.settings.recipe, list(self.lt_sets[0].spec.counts)
        groups, rule = assign_groups(counts)
        warnings = [] if recipe.converged else [f"recipe {recipe.name}: {recipe.card}"]
        return {
            "schema": f"tailscope.{verb}/1",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command(),
            "spec": self.settings.spec(lab.data),
            "environment": {"versions": versions(), "hardware": lab.runtime.describe()},
            "dataset": {
                "name": lab.data.name,
                "class_names": list(lab.data.train.class_names),
                "train_images": len(lab.data.train),
                "test_images": len(lab.data.test),
            },
            "recipe": {"name": recipe.name, "card": recipe.card, "converged": recipe.converged},
            "counts": counts,
            "groups": groups,
            "groups_rule": rule,
            "seeds": list(self.settings.seeds),
            "subset_sha256": [lt.spec.indices_sha256 for lt in self.lt_sets],
            "warnings": warnings + lab.data.notes() + differing_arithmetic(self.cards),
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


def provenance(lab: Lab, run: Run, backbone: Backbone) -> dict[str, Any]:
    """Return the card of one row: everything a reader needs to compare it with another system's.

    Args:
        lab: whose store holds the classifier.
        run: what was evaluated.
        backbone: its trained encoder.

    Returns:
        The card. Fields without prefix are stage 1's, but for `sampler` and `bn_mode`, which are stage 2's where there
        is one; `key` is the store's key of the backbone, `stage2_key` of the classifier.
    """
    meta, stage1, stage2 = backbone.meta, run.stage1, run.stage2
    augmentation = [*stage1.augment, *([stage1.mix] if stage1.mix else [])]
    return {
        "row": run.row,
        "seed": run.seed,
        "stage1": run.trained_on.name,
        "stage2": None if run.retrained_on is None else run.retrained_on.name,
        "model": stage1.model,
        "parameters": meta["parameters"],
        "epochs": meta["epochs"],
        "steps": meta["steps"],
        "micro_batches": stage1.train.micro_batches,
        "processes": meta.get("processes", 1),
        "augmentation": " + ".join(augmentation),
        "stage2_augmentation": None if stage2 is None else " + ".join(stage2.augment),
        "sampler": stage1.sampler if stage2 is None else stage2.sampler,
        "views": None if stage2 is None else stage2.views,
        "bn_mode": None if stage2 is None else stage2.bn_mode,
        "selection": meta["selection"],
        **_stage_card(stage1),
        **_stage2_card(lab, run, backbone),
        "precision": meta["precision"],
        "compiled": meta["compiled"],
        "fused": meta.get("fused", False),
        "device": meta["device"]["gpu"] or meta["device"]["cpu"],
        "seconds": meta["seconds"],
        "images_per_second": meta["images_per_second"],
        "key": backbone.key,
        "arithmetic": arithmetic_of(meta),
    }


def _stage2_card(lab: Lab, run: Run, backbone: Backbone) -> dict[str, Any]:
    """Return what a retrained classifier was trained on and how; every field is None without one."""
    spec = run.spec()
    if spec is None:
        return {f"stage2_{name}": None for name in STAGE2_CARD}
    epochs, steps = spec.stage2.train.lengths(sum(spec.stage2.data.counts))
    found = {
        "key": spec.key(),
        "parameters": backbone.weight.numel() + backbone.bias.numel(),
        "epochs": epochs,
        "steps": steps,
        "start": spec.stage2.start,
        "arithmetic": arithmetic_of(lab.store.meta("stage2", spec.key())),
        **_stage_card(spec.stage2),
    }
    return {f"stage2_{name}": found[name] for name in STAGE2_CARD}


def _stage_card(stage: StageSpec) -> dict[str, Any]:
    """Return what the cards say of both stages alike."""
    return {
        "profile": stage.data.profile,
        "subset_sha256": stage.data.indices_sha256,
        "counts": list(stage.data.counts),
        "batch": stage.train.batch,
        "learning_rate": stage.train.learning_rate,
        "weight_decay": stage.train.weight_decay,
        "schedule": stage.train.schedule,
    }
