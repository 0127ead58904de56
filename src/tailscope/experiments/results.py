"""What every result file of an experiment starts with, and the card of one row."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from tailscope.experiments.lab import Backbone, Lab, TrainingSet
from tailscope.experiments.runs import Run
from tailscope.experiments.settings import Settings
from tailscope.groups import assign_groups
from tailscope.origin import command, versions
from tailscope.training.runtime import arithmetic_of

STAGE2_CARD = (
    "key", "profile", "subset_sha256", "counts", "parameters", "epochs", "steps", "batch", "learning_rate",
    "weight_decay", "schedule", "start", "arithmetic",
)  # fmt: skip


def header(
    verb: str, settings: Settings, lab: Lab, lt_sets: Sequence[TrainingSet], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the fields that every result file starts with.

    Args:
        verb: the experiment.
        settings: what was asked for.
        lab: gives the data and the hardware.
        lt_sets: the long-tailed training set of each seed.
        rows: the cards of all rows.
    """
    counts = list(lt_sets[0].spec.counts)
    groups, rule = assign_groups(counts)
    return {
        "schema": f"tailscope.{verb}/1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "spec": settings.spec(lab.data),
        "environment": {"versions": versions(), "hardware": lab.runtime.describe()},
        "dataset": {
            "name": lab.data.name,
            "class_names": list(lab.data.train.class_names),
            "train_images": len(lab.data.train),
            "test_images": len(lab.data.test),
        },
        "recipe": {
            "name": settings.recipe.name,
            "card": settings.recipe.card,
            "converged": settings.recipe.converged,
        },
        "counts": counts,
        "groups": groups,
        "groups_rule": rule,
        "seeds": list(settings.seeds),
        "subset_sha256": [s.spec.indices_sha256 for s in lt_sets],
        "warnings": _warnings(settings, lab) + differing_arithmetic(rows),
        "provenance": list(rows),
    }


def _warnings(settings: Settings, lab: Lab) -> list[str]:
    """Return what a reader must know of the recipe and of the data."""
    recipe = settings.recipe
    warnings = [] if recipe.converged else [f"recipe {recipe.name}: {recipe.card}"]
    return warnings + lab.data.notes()


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
    for field, stage in (("arithmetic", "backbones"), ("stage2_arithmetic", "classifiers")):
        seeds: dict[str, dict[str, set[int]]] = {}
        for row in rows:
            for name, value in (row.get(field) or {}).items():
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
        "batch": stage1.train.batch,
        "micro_batches": stage1.train.micro_batches,
        "processes": meta.get("processes", 1),
        "learning_rate": stage1.train.learning_rate,
        "weight_decay": stage1.train.weight_decay,
        "schedule": stage1.train.schedule,
        "augmentation": " + ".join(augmentation),
        "stage2_augmentation": None if stage2 is None else " + ".join(stage2.augment),
        "sampler": stage1.sampler if stage2 is None else stage2.sampler,
        "views": None if stage2 is None else stage2.views,
        "bn_mode": None if stage2 is None else stage2.bn_mode,
        "selection": meta["selection"],
        "profile": stage1.data.profile,
        "subset_sha256": stage1.data.indices_sha256,
        "counts": list(stage1.data.counts),
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
    found: dict[str, Any] = {}
    spec = run.spec()
    if spec is not None:
        stage2 = spec.stage2
        epochs, steps = stage2.train.lengths(sum(stage2.data.counts))
        found = {
            "key": spec.key(),
            "profile": stage2.data.profile,
            "subset_sha256": stage2.data.indices_sha256,
            "counts": list(stage2.data.counts),
            "parameters": backbone.weight.numel() + backbone.bias.numel(),
            "epochs": epochs,
            "steps": steps,
            "batch": stage2.train.batch,
            "learning_rate": stage2.train.learning_rate,
            "weight_decay": stage2.train.weight_decay,
            "schedule": stage2.train.schedule,
            "start": stage2.start,
            "arithmetic": arithmetic_of(lab.store.meta("stage2", spec.key())),
        }
    return {f"stage2_{name}": found.get(name) for name in STAGE2_CARD}
