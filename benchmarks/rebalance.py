"""rebalance: does the advised classifier, in the user's own network, gain what was promised? On images that nobody saw.

A trained backbone of a store becomes what a user has: a PyTorch checkpoint and images in a file. `tailscope diagnose`
and `tailscope rebalance` see nothing else. Some test images are held out and given to the diagnosis. The checkpoint
that it patched is loaded by PyTorch alone, and its gain is measured on the other test images.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from benchmarks.record import origin
from benchmarks.verdicts.run import JUDGED, Kept, fingerprint
from benchmarks.verdicts.summary import covers
from tailscope.data import sources
from tailscope.data.images import ImageSet
from tailscope.encoders.loading import StoredBackbone, find_stored
from tailscope.networks import MODELS
from tailscope.seeds import numpy_stream
from tailscope.store import Store
from tailscope.training.step import Normalizer
from tailscope.verbs import REBALANCED, diagnose, rebalance

BATCH = 500
IntArray = NDArray[np.int64]
Right = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """What a diagnosis gets beside the training images.

    Attributes:
        share: of the test images of every class, those that are held out.
        rest: whether the images that the long-tailed subset left out are given as unseen ones, and what is held out
            only scores; else what is held out does both.
    """

    share: float
    rest: bool


CASES = (Case(0.1, False), Case(0.5, False), Case(0.5, True))


def run(store: Path, data: Path, work: Path) -> list[dict[str, Any]]:
    """Return what was promised and what was gained, for every long-tailed backbone of data that are in `data`.

    What is done is kept in `work`, so that the same command goes on where it was stopped.
    """
    kept, found = Kept(work / "cases.jsonl", fingerprint((*JUDGED, "benchmarks/rebalance.py"))), []
    for key, spec in _backbones(store, data):
        user = User.of(find_stored(store, key), data / f"{spec['data']['name']}.npz", work / key[:12])
        about = {"data": spec["data"]["name"], "profile": spec["data"]["profile"], "key": key[:12]}
        about["trained"] = " + ".join([*spec["augment"], *([spec["mix"]] if spec["mix"] else [])])
        for case in CASES:
            name = f"{key[:12]} {case.share:g}{' rest' if case.rest else ''}"
            if name not in kept.records:
                kept.add({"case": name, **about, **examine(user, case)})
            print(kept.records[name], flush=True)
            if kept.records[name]["advised"] is not None:
                found.append(kept.records[name])
    return found


def _backbones(store: Path, data: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield key and spec of the backbones that were trained on a long tail of data that are here."""
    for key in Store(store).keys("stage1"):
        spec = Store(store).meta("stage1", key)["spec"]
        counts = spec["data"]["counts"]
        if max(counts) > 2 * min(counts) and (data / f"{spec['data']['name']}.npz").is_file():
            yield key, spec


@dataclass(frozen=True)
class User:
    """Somebody with a network of a long-tailed data set.

    Attributes:
        backbone: what was trained, and on which rows.
        train: the whole training split, of which they are rows.
        test: images that nobody has seen.
        normalize: how the network sees pixels.
        folder: where the checkpoint and the images are.
    """

    backbone: StoredBackbone
    train: ImageSet
    test: ImageSet
    normalize: Normalizer
    folder: Path

    @classmethod
    def of(cls, backbone: StoredBackbone, images: Path, folder: Path) -> "User":
        """Write the checkpoint as a training script does."""
        train, test = sources.read(images)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor for name, tensor in load_file(backbone.checkpoint).items() if name != "rows"}
        torch.save({"state_dict": state}, folder / "w.pth")
        return cls(backbone, train, test, Normalizer.of(train.images), folder)

    def right(self, checkpoint: str, rows: IntArray) -> Right:
        """Return which test images a checkpoint gets right, [n], with PyTorch alone: load, forward, argmax."""
        network = MODELS.make(self.backbone.model, self.test.images.shape[3], len(self.test.class_names))
        network.load_state_dict(torch.load(self.folder / checkpoint, weights_only=True)["state_dict"])
        network.eval()
        found = []
        with torch.inference_mode():
            for part in np.split(rows, range(BATCH, len(rows), BATCH)):
                images = self.test.take(part)
                found.append(network(self.normalize(images.images)).argmax(1) == images.labels)
        return torch.cat(found).double().numpy()


def examine(user: User, case: Case) -> dict[str, Any]:
    """Diagnose the network on what a user has, patch its checkpoint, and measure what that gains on other images.

    `advised` is None where no classifier gains anything by the diagnosis, so that nothing is promised.
    """
    labels = user.test.labels.numpy()
    held_out = _held_out(labels, case.share)
    out, images = user.folder / ("rest" if case.rest else "out"), user.folder / "images.npz"
    subset = user.folder / "subset.json" if case.rest else None
    if subset is not None:
        subset.write_text(json.dumps({"indices": [user.backbone.rows.tolist()]}))
    _write(images, user.train if case.rest else user.train.take(user.backbone.rows), user.test.take(held_out))
    model, checkpoint, patched = user.backbone.model, user.folder / "w.pth", user.folder / "patched.pth"
    said = diagnose(
        model=model, checkpoint=checkpoint, data=str(images), subset=subset, normalize=_as_option(user.normalize),
        out=out, batch=BATCH, device="cpu", overwrite=True, report=False, permutations=0,
    )  # fmt: skip
    if not (out / REBALANCED).exists():
        return {"advised": None}
    patched.unlink(missing_ok=True)
    rebalance(out, model, checkpoint, to=patched)
    others = np.setdiff1d(np.arange(len(labels)), held_out)
    before, after = (user.right(name, others) for name in ("w.pth", "patched.pth"))
    counted = np.isin(labels[others], _judged(user, case))
    promised = said["verdict"]["rebalancing_gap"]
    return {
        "held_out": len(held_out) // len(user.test.class_names),
        "unseen": "left-out training images" if case.rest else "held-out images",
        "advised": said["accuracy"]["rebalanced"]["layer"],
        "promised": {"points": promised["points"], "ci95": promised["ci95"]},
        "left_out": [user.test.class_names[k] for k in np.setdiff1d(labels, labels[others][counted])],
        "gain": _gain(before[counted], after[counted], promised),
        "of_all_classes": _gain(before, after, promised),
    }


def _judged(user: User, case: Case) -> IntArray:
    """Return the classes that the diagnosis has unseen samples of."""
    labels = np.delete(user.train.labels.numpy(), user.backbone.rows) if case.rest else user.test.labels.numpy()
    return np.flatnonzero(np.bincount(labels) > 1)


def _gain(before: Right, after: Right, promised: dict[str, Any]) -> dict[str, Any]:
    """Return a measured gain, and whether the promise holds it once its own error is counted, too."""
    gain = after - before
    error = float(gain.std(ddof=1) / np.sqrt(len(gain)))
    low, high = promised["ci95"]
    return {
        "images": len(gain),
        "before": float(before.mean()),
        "after": float(after.mean()),
        "points": float(gain.mean()),
        "error": error,
        "within": bool(low <= gain.mean() <= high),
        "within_errors": covers(promised["ci95"], promised["points"], float(gain.mean()), error),
    }


def _held_out(labels: IntArray, share: float) -> IntArray:
    """Draw a share of every class."""
    stream, found = numpy_stream(0, "benchmarks", "rebalance"), []
    for k in range(int(labels.max()) + 1):
        members = stream.permutation(np.flatnonzero(labels == k))
        found.append(members[: round(share * len(members))])
    return np.sort(np.concatenate(found))


def _write(path: Path, train: ImageSet, test: ImageSet) -> None:
    """Write an image file, as the command line takes it."""
    splits = {"train": train, "test": test}
    arrays = {f"{name}_{what}": getattr(s, what).numpy() for name, s in splits.items() for what in ("images", "labels")}
    np.savez(path, **arrays)


def _as_option(normalize: Normalizer) -> str:
    mean, std = (",".join(f"{value / 255:.9g}" for value in t.tolist()) for t in (normalize.mean, normalize.std))
    return f"{mean}/{std}"


def table(document: dict[str, Any]) -> str:
    """Return the result as a Markdown table, in points, with a line about the machine below."""
    lines = [
        "| trained with | held out a class | unseen | advised | promised | gained, on other images | in the interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in document["cases"]:
        gain, (low, high) = case["gain"], (100 * end for end in case["promised"]["ci95"])
        promised = f"{100 * case['promised']['points']:+.1f} [{low:.1f}, {high:.1f}]"
        gained = f"{100 * gain['points']:+.1f} ± {196 * gain['error']:.1f}"
        if case["left_out"]:
            every = case["of_all_classes"]
            gained += f"; {100 * every['points']:+.1f} with {', '.join(case['left_out'])}"
        kept = "yes" if gain["within"] else "with both errors" if gain["within_errors"] else "**no**"
        cells = [case["trained"], case["held_out"], case["unseen"], f"`{case['advised']}`", promised, gained, kept]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", f"{origin(document)}."])
