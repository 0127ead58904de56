"""Decoding, what cannot be read, and opening any source; Hugging Face datasets by a stand-in for the package."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from image_trees import to_tensor, tree
from tailscope.data import folders
from tailscope.data.decoding import decode, find_unreadable, refuse
from tailscope.data.images import ImageSet
from tailscope.data.sources import load, open_images
from tailscope.errors import UserError
from tailscope.progress import Quiet


def with_damage(root: Path) -> Path:
    tree(root)
    (root / "ant" / "1.jpg").write_bytes(b"")
    content = (root / "bee" / "1.jpg").read_bytes()
    (root / "bee" / "1.jpg").write_bytes(content[: len(content) // 2])
    file = root / "list.txt"
    names = ["ant/0.png", "ant/1.jpg", "bee/1.jpg", "bee/2.png", "cat/9.png", "cat/0.png"]
    file.write_text("".join(f"{name} {i // 2}\n" for i, name in enumerate(names)))
    return file


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning", "ignore:This DataLoader will create")
def test_all_unreadable_images_are_found_with_their_lines(tmp_path: Path, workers: int) -> None:
    images = folders.load_lists(str(with_damage(tmp_path)), None)["train"]
    found = find_unreadable(images, workers=workers, progress=Quiet())
    assert [bad.row for bad in found] == [1, 2, 4]
    message = str(refuse(images, found))
    assert message.startswith(
        "list: 3 images cannot be read: list.txt line 2: ant/1.jpg (empty); list.txt line 3: bee/1.jpg (cannot"
    )
    assert message.endswith("list.txt line 5: cat/9.png (missing)")
    assert find_unreadable(images.take([0, 3, 5]), workers=workers, progress=Quiet()) == []


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning", "ignore:This DataLoader will create")
def test_decoding_keeps_the_order_whatever_the_workers(tmp_path: Path) -> None:
    images = folders.load_lists(str(with_damage(tmp_path)), None)["train"]
    batches = [[5, 0], [1, 3], [2, 4]]
    for workers in (0, 2):
        decoded = list(decode(images, to_tensor, batches, workers=workers))
        assert [batch.rows.tolist() for batch in decoded] == [[5, 0], [3], []]
        assert [[bad.row for bad in batch.unreadable] for batch in decoded] == [[], [1], [2, 4]]
        assert torch.equal(decoded[0].images[1], to_tensor(images.image(0)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_in_memory_decode_to_their_pixels(channels: int) -> None:
    pixels = torch.randint(256, (5, 6, 7, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stream = ImageSet(pixels, torch.tensor([0, 1, 1, 0, 1]), ("a", "b")).of_split("mine", "train")
    for row in range(5):
        assert np.asarray(stream.image(row)).reshape(6, 7, channels).tolist() == pixels[row].tolist()
    picked = stream.take([3, 1])
    assert picked.ids == ("train:3", "train:1")
    assert picked.labels.tolist() == [0, 1]
    assert stream.fingerprint() != picked.fingerprint()


def test_opening_says_which_splits_there_are(tmp_path: Path) -> None:
    digits = open_images("digits")
    assert list(digits.splits) == ["train", "test"]
    assert len(digits.split("test")[1].labels) == 500
    with pytest.raises(UserError, match="digits has the splits train, test; say which with --split"):
        digits.split(None)
    with pytest.raises(UserError, match="--split val: digits has train, test"):
        digits.split("val")
    tree(tmp_path)
    assert open_images(f"folder:{tmp_path}").split(None)[0] == "all"
    (tmp_path / "l.txt").write_text("ant/0.png 0\n")
    assert open_images(f"list:{tmp_path / 'l.txt'}").split(None)[0] == "train"
    with pytest.raises(UserError, match=r"unknown data set.*PATH.npz, folder:PATH, list:.*, hf:NAME"):
        open_images("nothing")


class FakeDataset:
    """The part of datasets.Dataset that is used."""

    def __init__(self, rows: list[int], features: dict) -> None:
        self.rows, self.features, self._fingerprint = rows, features, "abc"

    def __getitem__(self, key):
        if isinstance(key, str):
            return [r % 2 for r in self.rows]
        return {"img": Image.new("RGB", (4, 4), (self.rows[key], 0, 0)), "fine": self.rows[key] % 2}

    def select(self, indices: list[int]) -> "FakeDataset":
        return FakeDataset([self.rows[i] for i in indices], self.features)


def fake_datasets(monkeypatch: pytest.MonkeyPatch, **features) -> None:
    module = ModuleType("datasets")

    def load_dataset(name: str, split: str | None) -> FakeDataset | dict[str, FakeDataset]:
        if name != "org/pets":
            raise RuntimeError("Dataset 'x' doesn't exist\non the Hub")
        found = {"train": FakeDataset([7, 8, 9], features), "validation": FakeDataset([5, 4], features)}
        return found if split is None else found[split]

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


COLUMNS = {"img": type("Image", (), {})(), "fine": type("ClassLabel", (SimpleNamespace,), {})(names=["cat", "dog"])}


def test_hugging_face_images(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, **COLUMNS)
    split, images = open_images("hf:org/pets:train").split(None)
    assert split == "train"
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [1, 0, 1]
    assert images.image(1).getpixel((0, 0)) == (8, 0, 0)
    picked = images.take(np.array([2]))
    assert picked.ids == ("train:2",)
    assert picked.image(0).getpixel((0, 0)) == (9, 0, 0)
    assert picked.fingerprint() != images.fingerprint()
    assert open_images("hf:org/pets").split("val")[1].labels.tolist() == [1, 0]
    data = load("hf:org/pets")
    assert (data.name, data.in_memory) == ("org/pets", False)
    assert (data.train.counts(), data.test.counts()) == ([1, 2], [1, 1])


@pytest.mark.parametrize(
    ("source", "features", "says"),
    [
        ("hf:org/pets:train", {"fine": COLUMNS["fine"]}, "no column of type Image; its columns are fine"),
        ("hf:org/pets:train", {"img": COLUMNS["img"]}, "no column of type ClassLabel; its columns are img"),
        ("hf:nobody:train", COLUMNS, "cannot be loaded .Dataset 'x' doesn't exist on the Hub"),
    ],
)
def test_bad_hugging_face_sources(monkeypatch: pytest.MonkeyPatch, source: str, features: dict, says: str) -> None:
    fake_datasets(monkeypatch, **features)
    with pytest.raises(UserError, match=says):
        open_images(source)


def test_hugging_face_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'tailscope\[hf\]'"):
        open_images("hf:org/pets:train")
