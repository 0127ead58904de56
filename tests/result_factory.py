"""Synthetic results that keep the schema's promises: the report's tests need no training.

Accuracies come from simulated outcomes through `tailscope.intervals`, so intervals, shares and groups belong
together. Geometry is drawn from simple trends over class frequency, undefined where the real one is.
"""

import json
from pathlib import Path

import numpy as np

from tailscope.groups import GROUPS, assign_groups
from tailscope.intervals import attribute, summarize
from tailscope.measures.fields import COLLAPSE

CELLS = ("lt->lt", "lt->true", "true->lt", "true->true")
MATCHED = ("matched->lt", "matched->true", "lt->matched", "true->matched", "matched->matched")
AUGMENTATIONS = ("none", "mixup", "autoaugment", "autoaugment+mixup")
RUNGS = ("stage1", "stage2", "stage2_aa", "bound")
# How strongly the loss of a backbone or a classifier depends on what it was trained on.
LOSS = {"lt": 1.0, "matched": 0.45, "true": 0.0}


def counts(classes, top=500, ratio=100):
    """Exponential profile, truncated."""
    return [int(top * ratio ** (-k / max(classes - 1, 1))) for k in range(classes)]


def header(verb, *, classes, seeds, name, names, converged, top, warnings=()):
    n = counts(classes, top)
    groups, rule = assign_groups(n)
    return {
        "schema": f"tailscope.{verb}/1",
        "created": "2026-11-23T08:00:00+00:00",
        "command": f"tailscope {verb} --data {name} --profile exp:100 --seeds {seeds}",
        "spec": {"data": name, "profile": "exp:100", "recipe": "demo", "model": "resnet8"},
        "environment": {
            "versions": {"tailscope": "0.1.0", "python": "3.11.9", "torch": "2.14.1"},
            "hardware": {"cpu": "Example CPU", "cores": 2, "gpu": None},
        },
        "dataset": {
            "name": name,
            "class_names": names or [str(k) for k in range(classes)],
            "train_images": top * classes,
            "test_images": 50 * classes,
        },
        "recipe": {
            "name": "paper" if converged else "demo",
            "card": "Crops by 1 pixel, flips nothing; its AutoAugment leaves out flips and inversion.",
            "converged": converged,
        },
        "counts": n,
        "groups": groups,
        "groups_rule": rule,
        "seeds": list(range(seeds)),
        "subset_sha256": [f"{seed:064x}" for seed in range(seeds)],
        "warnings": list(warnings),
    }


def provenance(rows, seeds):
    return [
        {
            "row": row,
            "seed": seed,
            "stage1": row.split("->")[0],
            "stage2": row.split("->")[-1],
            "model": "resnet8",
            "parameters": 78042,
            "epochs": 20,
            "steps": 1240,
            "batch": 64,
            "learning_rate": 0.1,
            "weight_decay": 2e-4,
            "augmentation": "crop(1)",
            "sampler": "instance",
            "bn_mode": "frozen",
            "selection": "last epoch",
            "subset_sha256": f"{seed:064x}",
            "precision": "bf16",
            "compiled": False,
            "device": "cpu",
            "seconds": 3.25 + seed,
            "images_per_second": 5120.5,
            "key": f"{seed:016x}",
        }
        for row in rows
        for seed in range(seeds)
    ]


def outcomes(rng, cells, *, classes, seeds, per_class, representation, classifier):
    """Simulate whether each test item is right, with item and seed effects shared between the cells."""
    labels = np.repeat(np.arange(classes), per_class)
    rarity = (labels / max(classes - 1, 1)) ** 1.3
    item = rng.normal(size=len(labels)) * 0.6
    found = {}
    for cell in cells:
        b, c = (LOSS[part] for part in cell.split("->"))
        loss = (representation * b + classifier * c) * (0.25 + 1.5 * rarity)
        noise = rng.normal(size=(seeds, len(labels))) * 0.35 + rng.normal(size=(seeds, 1)) * 0.05
        found[cell] = item + noise + 1.25 - loss > 0
    return found, labels


def swap(
    classes=10,
    seeds=3,
    *,
    per_class=50,
    representation=0.6,
    classifier=0.3,
    matched=False,
    name="digits",
    names=None,
    converged=False,
    top=500,
    warnings=(),
    seed=0,
    backbones=("lt", "true"),
):
    """A swap; with fewer `backbones` half of one, as `--backbones lt` leaves it."""
    result = header(
        "swap", classes=classes, seeds=seeds, name=name, names=names, converged=converged, top=top, warnings=warnings
    )
    cells = (*CELLS, *MATCHED) if matched else CELLS
    correct, labels = outcomes(
        np.random.default_rng(seed),
        cells,
        classes=classes,
        seeds=seeds,
        per_class=per_class,
        representation=representation,
        classifier=classifier,
    )
    whole = "lt" in backbones and "true" in backbones
    cells = [cell for cell in cells if cell.split("->")[0] in (*backbones, "matched")]
    result["cells"] = {cell: summarize(correct[cell], labels, result["groups"]) for cell in cells}
    result["stage1"] = {name: summarize(correct[f"{name}->{name}"], labels, result["groups"]) for name in backbones}
    result["attribution"] = attribute(correct, labels, result["groups"]) if whole else None
    result["provenance"] = provenance(cells, seeds)
    return result


def ladder(classes=10, seeds=3, *, per_class=50, name="digits", names=None, converged=False, top=500, seed=1):
    result = header("ladder", classes=classes, seeds=seeds, name=name, names=names, converged=converged, top=top)
    rng = np.random.default_rng(seed)
    result["augmentations"] = {}
    for k, augmentation in enumerate(AUGMENTATIONS):
        result["augmentations"][augmentation] = {}
        for step, rung in enumerate(RUNGS):
            correct, labels = outcomes(
                rng,
                ["lt->lt"],
                classes=classes,
                seeds=seeds,
                per_class=per_class,
                representation=0.6 - 0.06 * k,
                classifier=0.4 - 0.13 * step,
            )
            result["augmentations"][augmentation][rung] = summarize(correct["lt->lt"], labels, result["groups"])
    result["provenance"] = provenance([f"{a}/{r}" for a in AUGMENTATIONS for r in RUNGS], seeds)
    return result


def measures(rng, n, unseen, rarity, strength):
    """One class's measures: `strength` is how much the encoder memorises, `rarity` 0 for the most frequent class."""
    memory = strength * rarity
    wobble = 1 + rng.normal() * 0.04
    spread = (24 - 9 * memory) * wobble
    true = (24 + 5 * memory) * wobble
    null = 30 / np.sqrt(n)
    shift = null + 9 * memory * abs(wobble)
    known, testable = unseen > 0, unseen > 0 and n >= 5
    several = n >= 2
    quantiles = [0.45, 0.75, 1.0, 1.25, 1.7]

    def given(value, where=True):
        return float(value) if where else None

    return {
        "train_count": n,
        "unseen_count": unseen,
        "variance": given((3 + 4 * memory) * wobble),
        "covariance_norm": given((0.9 + 1.6 * memory) * wobble),
        "first_pc_share": given(0.22 + 0.2 * memory * wobble),
        "spread_train_deg": given(spread, several),
        "spread_true_deg": given(true),
        "angular_width_deg": given(2.1 * spread, several),
        "escape_rate": given(min(1.0, 0.01 + 0.25 * memory + 0.3 / n), known and several),
        "nearest_center_train_deg": given(62 * wobble),
        "nearest_center_true_deg": given((60 - 14 * memory) * wobble),
        "nearest_center_sample_train_deg": given(66 * wobble),
        "nearest_center_sample_true_deg": given((63 - 12 * memory) * wobble),
        "center_shift_deg": given(shift, known),
        "angles_train_quantiles_deg": [spread * q for q in quantiles] if several else None,
        "angles_true_quantiles_deg": [true * q for q in quantiles],
        "spread_gap_deg": given(12 * memory + rng.normal() * 0.3, testable),
        "spread_gap_p": given(0.001 if memory > 0.15 else 0.4, testable),
        "spread_gap_q": given(0.002 if memory > 0.15 else 0.45, testable),
        "center_shift_null_deg": given(null, known),
        "center_shift_excess_deg": given(shift - null, testable),
        "center_shift_p": given(0.001 if memory > 0.2 else 0.5, testable),
        "center_shift_q": given(0.003 if memory > 0.2 else 0.5, testable),
        "escape_conformal": given(min(1, 1 / (n + 1) + 0.1 * memory), known),
        "escape_rank": given(0.5 + 0.3 * memory, known and several),
        "displacement": given(0.05 + 0.7 * memory + rng.normal() * 0.02, known and several),
        "variance_ratio": given(1 - 0.4 * memory, known and several),
        "effective_rank": given(12 - 5 * memory, n >= 4),
        "covariance_norm_unbiased": given(0.8 + 1.2 * memory, n >= 4),
        "first_pc_share_low": given(0.18 + 0.15 * memory),
        "first_pc_share_high": given(0.24 + 0.25 * memory),
    }


def mean_of(entries):
    """Mean over seeds of the numeric fields; undefined where a seed is."""
    found = {}
    for field, value in entries[0].items():
        values = [entry[field] for entry in entries]
        if any(v is None for v in values):
            found[field] = None
        elif isinstance(value, list):
            found[field] = np.mean(values, axis=0).tolist()
        else:
            found[field] = value if isinstance(value, str | int) else float(np.mean(values))
    return found


def geometry(classes=10, seeds=3, *, name="digits", names=None, converged=False, top=500, seed=2):
    result = header("geometry", classes=classes, seeds=seeds, name=name, names=names, converged=converged, top=top)
    rng = np.random.default_rng(seed)
    n, groups = result["counts"], result["groups"]
    result["encoders"] = {}
    for encoder, strength in (("lt", 1.0), ("lt+mixup", 0.6), ("true", 0.08)):
        runs = {}
        for s in range(seeds):
            runs[str(s)] = {}
            for variant in ("paper", "calibrated"):
                entries = []
                for k in range(classes):
                    unseen = top - n[k] if variant == "paper" else 50
                    about = {"index": k, "name": result["dataset"]["class_names"][k], "group": groups[k]}
                    entries.append(about | measures(rng, n[k], unseen, k / max(classes - 1, 1), strength))
                pooled = {}
                for group, rarity in zip(GROUPS, (0.1, 0.5, 0.9), strict=True):
                    pooled[group] = measures(rng, 60, 400, rarity, strength) if group in groups else None
                runs[str(s)][variant] = {
                    "classes": entries,
                    "groups": pooled,
                    "collapse": {
                        part: {name: float(rng.uniform(0, 1)) for name in COLLAPSE} | {"nc3": None}
                        for part in ("train", "unseen")
                    },
                    "warnings": ["class 0 has no unseen samples"] if variant == "paper" else [],
                }
        mean = {
            variant: {
                "collapse": {
                    part: mean_of([run[variant]["collapse"][part] for run in runs.values()])
                    for part in ("train", "unseen")
                },
                "classes": [mean_of([run[variant]["classes"][k] for run in runs.values()]) for k in range(classes)],
                "groups": {
                    group: mean_of([run[variant]["groups"][group] for run in runs.values()])
                    if group in groups
                    else None
                    for group in GROUPS
                },
            }
            for variant in ("paper", "calibrated")
        }
        result["encoders"][encoder] = {"seeds": runs, "mean": mean}
    result["provenance"] = provenance(("lt", "lt+mixup", "true"), seeds)
    return result


def claims():
    rows = [
        ("true → lt beats lt → true", "Table 1", "A(true, lt) − A(lt, true)", 0.08, [0.05, 0.11], "holds"),
        ("variance grows towards the tail under lt", "Figure 4", "Spearman correlation", 0.4, [-0.1, 0.9], "undecided"),
        (
            "MixUp shrinks the escape rate of tail classes",
            "Figure 6",
            "difference of escape rates",
            0.02,
            None,
            "fails",
        ),
    ]
    fields = ("claim", "figure", "statistic", "estimate", "ci95", "verdict")
    return {"schema": "tailscope.claims/1", "claims": [dict(zip(fields, row, strict=True)) for row in rows]}


def write(out, **results):
    """Write the given results as a directory of result files and return it."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for verb, result in results.items():
        (out / f"{verb}.json").write_text(json.dumps(result), encoding="utf-8")
    return out
