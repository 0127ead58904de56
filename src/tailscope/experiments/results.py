"""Result files: the header that all share, and writing them without ever losing one silently."""

import json
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tailscope.errors import UserError
from tailscope.experiments.lab import Backbone, Lab, TrainingSet
from tailscope.experiments.settings import Settings
from tailscope.groups import assign_groups
from tailscope.spec import StageSpec
from tailscope.store import write_json

PACKAGES = ("tailscope", "torch", "torchvision", "numpy", "scikit-learn", "altair")


def header(verb: str, settings: Settings, lab: Lab, lt_sets: Sequence[TrainingSet]) -> dict[str, Any]:
    """Return the fields that every result file starts with.

    Args:
        verb: the experiment.
        settings: what was asked for.
        lab: gives the data and the hardware.
        lt_sets: the long-tailed training set of each seed.
    """
    counts = list(lt_sets[0].spec.counts)
    groups, rule = assign_groups(counts)
    return {
        "schema": f"tailscope.{verb}/1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv[1:]),
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
        "warnings": [] if settings.recipe.converged else [f"recipe {settings.recipe.name}: {settings.recipe.card}"],
        "provenance": [],
    }


def command_line(arguments: Sequence[str]) -> str:
    """Return the command with absolute paths cut to their last part: the rest means nothing on another machine.

    >>> command_line(["swap", "--data", "cifar10", "--data-root", "/data/cifar", "--out=/data/here"])
    'tailscope swap --data cifar10 --data-root cifar --out=here'
    """
    shown = []
    for argument in arguments:
        option, equals, value = argument.rpartition("=")
        shown.append(f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else argument)
    return shlex.join(["tailscope", *shown])


def provenance(
    row: str, seed: int, backbone: Backbone, stage1: StageSpec, stage2: StageSpec | None, names: tuple[str, str | None]
) -> dict[str, Any]:
    """Return the card of one row: everything a reader needs to compare it with another system's.

    Args:
        row: the row's name in its result file.
        seed: of the run.
        backbone: the trained encoder.
        stage1: its stage.
        stage2: the classifier's stage; None where stage 1's own classifier was evaluated.
        names: what stage 1 and stage 2 were trained on: lt, true or matched.
    """
    meta = backbone.meta
    augmentation = [*stage1.augment, *([stage1.mix] if stage1.mix else [])]
    return {
        "row": row,
        "seed": seed,
        "stage1": names[0],
        "stage2": names[1],
        "model": stage1.model,
        "parameters": meta["parameters"],
        "epochs": meta["epochs"],
        "steps": meta["steps"],
        "batch": stage1.train.batch,
        "learning_rate": stage1.train.learning_rate,
        "weight_decay": stage1.train.weight_decay,
        "schedule": stage1.train.schedule,
        "augmentation": " + ".join(augmentation),
        "stage2_augmentation": None if stage2 is None else " + ".join(stage2.augment),
        "sampler": stage1.sampler if stage2 is None else stage2.sampler,
        "views": None if stage2 is None else stage2.views,
        "bn_mode": "frozen",
        "selection": meta["selection"],
        "subset_sha256": stage1.data.indices_sha256,
        "counts": list(stage1.data.counts),
        "precision": meta["precision"],
        "compiled": meta["compiled"],
        "device": meta["device"]["gpu"] or meta["device"]["cpu"],
        "seconds": meta["seconds"],
        "images_per_second": meta["images_per_second"],
        "key": backbone.key,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def check_free(out: Path, verb: str, spec: dict[str, Any], *, overwrite: bool) -> None:
    """Refuse to replace a result of another spec; call it before any work.

    Raises:
        UserError: OUT holds a result of this verb from another spec, or one that cannot be read.
    """
    path = out / f"{verb}.json"
    if path.is_dir():
        raise UserError(f"{path}: is a folder; use another --out")
    if overwrite or not path.exists():
        return
    try:
        stored = dict(json.loads(path.read_text())["spec"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: exists but is no readable result; use another --out or --overwrite") from None
    if stored != spec:
        differing = sorted(k for k in {*stored, *spec} if stored.get(k) != spec.get(k))
        raise UserError(
            f"{path}: holds a result of another spec ({', '.join(differing)} differ); use another --out or --overwrite"
        )


def write(out: Path, verb: str, result: dict[str, Any]) -> Path:
    """Write OUT/VERB.json atomically and return its path."""
    path = out / f"{verb}.json"
    write_json(path, result)
    return path
