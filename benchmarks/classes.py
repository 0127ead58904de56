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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import Spread
from benchmarks.record import Options, Record, Row

Floats = NDArray[np.float32]
IntArray = NDArray[np.int64]
CLOSE = 1.0  # distance of a weak pair's means, in deviations of the samples
LOST = 0.6  # of the samples of a class whose classifier is bad
TESTED = 10  # fresh samples of a class, on which truth is measured
WEAK, BAD, SOUND = "representation", "classifier", "neither"
MOST_MINUTES, MOST_GIB, MOST_PAGE = 15, 4, 5_000_000


@dataclass(frozen=True)
class World:
    """How large, which shares of classes are weak and badly classified, and the means' deviation along a feature."""

    classes: int
    features: int = 64
    most: int = 60
    least: int = 4
    held_out: int = 30
    weak: float = 0.15
    bad: float = 0.45
    apart: float = 0.8

    @property
    def rows(self) -> int:
        """Of both files."""
        return int(self.counts.sum()) + self.classes * self.held_out

    @property
    def counts(self) -> IntArray:
        """Training samples of each class, the most frequent first: exponential, as CIFAR-LT's."""
        share = np.arange(self.classes) / max(1, self.classes - 1)
        return np.round(self.most * (self.least / self.most) ** share).astype(np.int64)


SIZES = {"full": (World(10_000),), "quick": (World(1_000),), "tiny": (World(60, 8, apart=2.2),)}


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
        means = (world.apart * stream.normal(size=(world.classes, world.features))).astype(np.float32)
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


def run(options: Options) -> Record:
    """Furnish each world in a folder that is deleted afterwards, diagnose it, compare, and return the rows.

    Threads are as many as $OMP_NUM_THREADS says, else two.
    """
    record, threads = Record("classes", options), int(os.environ.get("OMP_NUM_THREADS") or 2)
    for world in SIZES[options.size]:
        with tempfile.TemporaryDirectory() as name:
            truth, accuracies = furnish(world, Path(name))
            found = diagnose(Path(name), threads)
        result = found.pop("result")
        found |= {"verdict": compared(result, truth, accuracies), "warnings": result["warnings"], "threads": threads}
        what = f"{world.classes:,} classes"
        record.rows += _rows(what, found, f"{int(world.counts.sum()):,} training and {world.rows:,} rows in all")
        record.raw[what] = {**asdict(world), **found}
    return record


def _rows(what: str, found: dict[str, Any], note: str) -> list[Row]:
    threads = found["threads"]
    used = f"{note}; {threads} thread{'s' if threads > 1 else ''}"
    clock, processor = (Spread.of([value]) for value in found["seconds"]["all"])
    share = Spread.of([found["seconds"]["all"][1] / (60 * MOST_MINUTES)])
    both = found["peak_bytes"]["both"]
    rows = [
        Row(f"{what}: on the clock", clock, "s", note=used),
        Row(f"{what}: of the processor", processor, "s", share, f"of {MOST_MINUTES} minutes", 1, at_most=True),
        *(
            Row(f"— {phase}", Spread.of([seconds[1]]), "s", note="of the processor")
            for phase, seconds in found["seconds"].items()
            if phase != "all"
        ),
        _limited(f"{what}: peak memory", both / 2**20, "MiB", MOST_GIB * 1024, f"of {MOST_GIB} GiB", _peaks(found)),
        _limited(f"{what}: report.html", found["page_bytes"] / 1e6, "MB", MOST_PAGE / 1e6, "of 5 MB"),
        Row(f"{what}: diagnosis.json", Spread.of([found["json_bytes"] / 1e6]), "MB"),
    ]
    verdict = found["verdict"]
    told, bound = verdict["bottleneck"], verdict["bound"]
    said = None if bound["said"] is None else Spread(100 * bound["said"], *(100 * end for end in bound["ci95"]))
    right = f"said: {told['said']}, true: {told['true']}"
    rows.append(Row(f"{what}: verdict is right", Spread.of([float(told["said"] == told["true"])]), "", note=right))
    if said is not None:
        rows.append(Row(f"{what}: classifier bound", said, "%", note=f"true: {bound['true']:.1%}"))
    for kind, by in verdict["classes"].items():
        sides = ", ".join(f"{number:,} {say}" for say, number in by.items())
        rows.append(Row(f"{what}: truly held back by {kind}", Spread.of([sum(by.values())]), "classes", note=sides))
    return rows


def _limited(what: str, value: float, unit: str, limit: float, ratio_is: str, note: str = "") -> Row:
    return Row(what, Spread.of([value]), unit, Spread.of([value / limit]), ratio_is, 1, at_most=True, note=note)


def _peaks(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {found['peak_bytes'][name] / 2**20:,.0f} MiB" for name in ("anonymous", "mapped"))
