"""classes: a diagnosis of ten thousand classes whose truth is known: time, memory, files, and whether it is right.

Classes are Gaussian, so that the best classifier of the true distribution is known: the nearest mean, of means that
`bound_at` samples of every class give (the truth of docs/verdicts.md, D*, in closed form). Of some classes the features
are weak: they come in pairs whose means lie close together. Of others the classifier in use is bad: its bias is so low
that most of their samples go to other classes. The rest is sound. Kinds are drawn at random, whatever a class's count.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import Options, origin

Floats = NDArray[np.float32]
IntArray = NDArray[np.int64]
APART, CLOSE = 0.8, 1.0  # deviation of the means along each feature; distance of a weak pair's means
LOST = 0.6  # of the samples of a class whose classifier is bad
TESTED = 10  # fresh samples of a class, on which truth is measured
WEAK, BAD, SOUND = "representation", "classifier", "neither"
MOST_MINUTES, MOST_GIB, MOST_PAGE = 15, 4, 5_000_000


@dataclass(frozen=True)
class World:
    """How large, and which shares of the classes have weak features and a bad classifier."""

    classes: int
    features: int = 64
    most: int = 60
    least: int = 4
    held_out: int = 30
    weak: float = 0.15
    bad: float = 0.45

    @property
    def counts(self) -> IntArray:
        """Training samples of each class, the most frequent first: exponential, as CIFAR-LT's."""
        share = np.arange(self.classes) / max(1, self.classes - 1)
        return np.round(self.most * (self.least / self.most) ** share).astype(np.int64)


SIZES = {"full": (World(10_000),), "quick": (World(1_000),), "tiny": (World(60, 8),)}


@dataclass(frozen=True)
class Truth:
    """A world's classes.

    Attributes:
        means: [C, d].
        kinds: [C], what is the bottleneck of each class.
        weight: [C, d] of the classifier in use.
        bias: [C].
    """

    means: Floats
    kinds: NDArray[np.str_]
    weight: Floats
    bias: Floats

    @classmethod
    def of(cls, world: World, stream: np.random.Generator) -> "Truth":
        """Draw the means and kinds, and make the classifier in use."""
        means = (APART * stream.normal(size=(world.classes, world.features))).astype(np.float32)
        order = stream.permutation(world.classes)
        weak, bad = 2 * round(world.weak * world.classes / 2), round(world.bad * world.classes)
        kinds = np.full(world.classes, SOUND, dtype="<U14")
        first, second = order[: weak // 2], order[weak // 2 : weak]
        towards = stream.normal(size=(len(first), world.features))
        means[second] = means[first] + CLOSE * towards / np.linalg.norm(towards, axis=1, keepdims=True)
        kinds[order[:weak]], kinds[order[weak : weak + bad]] = WEAK, BAD
        bias = -0.5 * (means**2).sum(axis=1)
        truth = cls(means, kinds, means, bias)
        rows, labels = truth.draw(np.full(world.classes, 20), stream)
        lead = np.concatenate([truth._lead(*part) for part in blocks(rows, labels, world.classes)])
        spoilt = np.quantile(lead.reshape(world.classes, 20), LOST, axis=1)
        return cls(means, kinds, means, (bias - np.where(kinds == BAD, spoilt, 0)).astype(np.float32))

    def draw(self, counts: IntArray, stream: np.random.Generator) -> tuple[Floats, IntArray]:
        """Draw so many samples of each class."""
        labels = np.repeat(np.arange(len(counts)), counts)
        noise = stream.normal(size=(len(labels), self.means.shape[1]))
        return self.means[labels] + noise.astype(np.float32), labels

    def _lead(self, rows: Floats, labels: IntArray) -> Floats:
        """Return by how much the logit of its class leads the largest other one."""
        logits, each = rows @ self.weight.T + self.bias, np.arange(len(rows))
        own = logits[each, labels]
        logits[each, labels] = -np.inf
        lead: Floats = own - logits.max(axis=1)
        return lead

    def accuracies(self, world: World, stream: np.random.Generator) -> dict[str, float]:
        """Return what the classifier in use, and one fitted to D*, get right of fresh samples."""
        rows, labels = self.draw(np.full(world.classes, TESTED), stream)
        found = self.means + (stream.normal(size=self.means.shape) / world.most**0.5).astype(np.float32)
        layers = {"current": (self.weight, self.bias), "bound": (found, -0.5 * (found**2).sum(axis=1))}
        return {
            name: float(
                np.mean(
                    np.concatenate([
                        (part @ weight.T + bias).argmax(axis=1) == own
                        for part, own in blocks(rows, labels, world.classes)
                    ])
                )
            )
            for name, (weight, bias) in layers.items()
        }  # fmt: skip


def blocks(rows: Floats, labels: IntArray, classes: int) -> list[tuple[Floats, IntArray]]:
    """Cut rows into parts whose logits fit in 64 MB."""
    ends = np.arange(0, len(rows), max(1, 2**24 // classes))[1:]
    return list(zip(np.split(rows, ends), np.split(labels, ends), strict=True))


def furnish(world: World, folder: Path, seed: int = 0) -> tuple[Truth, dict[str, float]]:
    """Write train.npz, unseen.npz and classifier.npz, and return the truth and its accuracies."""
    stream = np.random.default_rng(seed)
    truth = Truth.of(world, stream)
    names = np.array([f"class {k:05d}" for k in range(world.classes)])
    for part, counts in (("train", world.counts), ("unseen", np.full(world.classes, world.held_out))):
        features, labels = truth.draw(counts, stream)
        np.savez(folder / f"{part}.npz", features=features, labels=labels, class_names=names)
    np.savez(folder / "classifier.npz", weight=truth.weight, bias=truth.bias, class_names=names)
    return truth, truth.accuracies(world, stream)


def diagnose(folder: Path, threads: int) -> dict[str, Any]:
    """Diagnose what lies in a folder as a user does, and return seconds by phase, peaks of memory and sizes of files.

    Raises:
        RuntimeError: the command fails.
    """
    out, phases = folder / "out", folder / "phases.json"
    parts = [f"--{part}={folder / part}.npz" for part in ("train", "unseen", "classifier")]
    command = [sys.executable, "-m", "benchmarks.arms.phases", "diagnose", *parts, f"--out={out}"]
    environment = {**os.environ, "TAILSCOPE_PHASES": str(phases), "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, env=environment, cwd=Path(__file__).resolve().parents[1]) as child:
        peaks = watch(child)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)}: ended with {child.returncode}")
    return {
        "seconds": json.loads(phases.read_text()),
        "peak_bytes": peaks,
        "page_bytes": (out / "report.html").stat().st_size,
        "json_bytes": (out / "diagnosis.json").stat().st_size,
        "result": json.loads((out / "diagnosis.json").read_text(encoding="utf-8")),
    }


def watch(child: "subprocess.Popen[bytes]") -> dict[str, int]:
    """Wait for a process and return the most memory it had: anonymous, mapped from files, and both at one time."""
    peaks = {"anonymous": 0, "mapped": 0, "both": 0}
    while child.poll() is None:
        try:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        except OSError:
            break
        sizes = {line.partition(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Rss")}
        anonymous, mapped = sizes.get("RssAnon", 0), sizes.get("RssFile", 0) + sizes.get("RssShmem", 0)
        found = {"anonymous": anonymous, "mapped": mapped, "both": anonymous + mapped}
        peaks = {name: max(peaks[name], size) for name, size in found.items()}
        time.sleep(0.2)
    child.wait()
    return peaks


def compared(result: dict[str, Any], truth: Truth, accuracies: dict[str, float]) -> dict[str, Any]:
    """Return what a diagnosis says beside what is true, overall and of the classes that have a verdict."""
    said, bound = result["verdict"], result["accuracy"]["classifier_bound"]["extrapolated"]
    gaps = accuracies["bound"] - accuracies["current"], 1 - accuracies["bound"]
    decided = [(part["bottleneck"], truth.kinds[k]) for k, part in enumerate(said["classes"])]
    by_kind = {
        kind: {say: sum(one == say for one, true in decided if true == kind) for say in (WEAK, BAD, "undecided")}
        for kind in (WEAK, BAD, SOUND)
    }
    return {
        "bottleneck": {"true": BAD if gaps[0] > gaps[1] else WEAK, "said": said["bottleneck"]},
        "bound": {"true": accuracies["bound"], "said": bound and bound["mean"], "ci95": bound and bound["ci95"]},
        "current": {"true": accuracies["current"], "said": result["accuracy"]["current"]["mean"]},
        "gaps": {"classifier": gaps[0], "representation": gaps[1]},
        "groups": {name: part and part["bottleneck"] for name, part in said["groups"].items()},
        "classes": by_kind,
    }


def run(options: Options, threads: int = 2) -> dict[str, Any]:
    """Furnish each world in a folder that is deleted afterwards, diagnose it, and compare."""
    rows = []
    for world in SIZES[options.size]:
        with tempfile.TemporaryDirectory() as name:
            truth, accuracies = furnish(world, Path(name))
            found = diagnose(Path(name), threads)
        result = found.pop("result")
        rows.append(
            {
                "classes": world.classes,
                "features": world.features,
                "train": int(world.counts.sum()),
                "unseen": world.classes * world.held_out,
                "threads": threads,
                "weak_classes": int((truth.kinds == WEAK).sum()),
                "badly_classified": int((truth.kinds == BAD).sum()),
                **found,
                "verdict": compared(result, truth, accuracies),
                "warnings": result["warnings"],
            }
        )
    return {"worlds": rows}


def table(document: dict[str, Any]) -> str:
    """Return the result as a Markdown table, with a line about the machine below."""
    lines = ["| | measured | goal |", "|---|---|---|"]
    for world in document["worlds"]:
        rows = f"{world['train'] + world['unseen']:,} rows of {world['features']} features"
        lines.append(f"| **{world['classes']:,} classes, {rows}** | | |")
        for phase, (clock, used) in world["seconds"].items():
            goal = f"≤ {MOST_MINUTES} minutes" if phase == "all" else ""
            lines.append(f"| {phase} | {clock:,.0f} s, of the processors {used:,.0f} s | {goal} |")
        peaks = {name: size / 2**30 for name, size in world["peak_bytes"].items()}
        memory = f"{peaks['both']:.2f} GiB, {peaks['anonymous']:.2f} of it anonymous"
        lines.append(f"| peak memory | {memory} | ≤ {MOST_GIB} GiB |")
        lines.append(f"| report.html | {world['page_bytes'] / 1e6:.1f} MB | ≤ {MOST_PAGE / 1e6:.0f} MB |")
        lines.append(f"| diagnosis.json | {world['json_bytes'] / 1e6:.1f} MB | |")
        lines += _verdict(world["verdict"])
    return "\n".join([*lines, "", f"{origin(document)}."])


def _verdict(found: dict[str, Any]) -> list[str]:
    bound, bottleneck = found["bound"], found["bottleneck"]
    told = "unknown" if bound["said"] is None else "{:.1%} [{:.1%}, {:.1%}]".format(bound["said"], *bound["ci95"])
    lines = [
        f"| bottleneck | {bottleneck['said']} | {bottleneck['true']} |",
        f"| classifier bound | {told} | {bound['true']:.1%} |",
    ]
    for kind, said in found["classes"].items():
        text = ", ".join(f"{number:,} {name}" for name, number in said.items())
        lines.append(f"| classes said to be held back by | {text} | {sum(said.values()):,} {kind} |")
    return lines
