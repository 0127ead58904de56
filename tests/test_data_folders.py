"""Image folders, list files, Hugging Face datasets (a stand-in for the package), decoding, and what cannot be read."""

import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tailscope.data import folders, listfiles
from tailscope.data.decoding import decode, find_unreadable, refuse
from tailscope.data.imageset import ImageSet
from tailscope.data.opening import open_images
from tailscope.data.streams import MemoryImages
from tailscope.errors import UserError
from tailscope.progress import Quiet


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def tree(root: Path, classes: Iterable[str] = ("ant", "bee", "cat"), images: int = 3) -> None:
    for k, name in enumerate(classes):
        for i in range(images):
            draw(root / name / f"{i}.{'jpg' if i % 2 else 'png'}", seed=10 * k + i)


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy())


def test_a_plain_folder_agrees_with_torchvision(tmp_path: Path) -> None:
    tree(tmp_path)
    draw(tmp_path / "bee" / "deeper" / "x y.JPEG")
    (tmp_path / "bee" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    (images,) = folders.load(tmp_path).values()
    (tmp_path / ".hidden").rmdir()
    oracle = torchvision.datasets.ImageFolder(str(tmp_path))
    assert images.class_names == tuple(oracle.classes)
    assert [(str(tmp_path / p), k) for p, k in zip(images.paths, images.labels.tolist(), strict=True)] == oracle.imgs
    assert images.counts() == [3, 4, 3]
    for row in range(len(images)):
        assert torch.equal(to_tensor(images.image(row)), to_tensor(oracle[row][0]))


def test_a_folder_with_splits(tmp_path: Path) -> None:
    tree(tmp_path / "train")
    tree(tmp_path / "test", ["cat", "ant"], images=1)
    splits = folders.load(tmp_path)
    assert list(splits) == ["train", "test"]
    assert splits["test"].class_names == ("ant", "bee", "cat")
    assert splits["test"].paths == ("test/ant/0.png", "test/cat/0.png")
    assert splits["test"].labels.tolist() == [0, 2]
    assert not set(splits["train"].ids) & set(splits["test"].ids)


def test_train_may_be_a_class_among_others(tmp_path: Path) -> None:
    tree(tmp_path, ["bus", "train"])
    assert folders.load(tmp_path)["all"].class_names == ("bus", "train")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda root: None, "no class folders"),
        (lambda root: (root / "ant").mkdir(), "no images .* in class folder 'ant'"),
        (
            lambda root: [tree(root / "train"), tree(root / "test", ["dog"])],
            "test: has class 'dog', which train/ has not",
        ),
        (lambda root: [tree(root / "train"), (root / "train" / "owl").mkdir()], "in class folder 'owl'"),
        (lambda root: root.rmdir(), "no such directory"),
    ],
)
def test_bad_folders(tmp_path: Path, make, says: str) -> None:
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(UserError, match=says):
        folders.load(root)


def test_take_and_fingerprint(tmp_path: Path) -> None:
    tree(tmp_path)
    images = folders.load(tmp_path)["all"]
    picked = images.take([5, 0])
    assert picked.paths == (images.paths[5], images.paths[0])
    assert picked.labels.tolist() == [1, 0]
    before = images.fingerprint()
    assert before == folders.load(tmp_path)["all"].fingerprint()
    assert before != picked.fingerprint()
    draw(tmp_path / "ant" / "0.png", size=(50, 50))
    redrawn = images.fingerprint()
    (tmp_path / "ant" / "0.png").unlink()
    assert len({before, redrawn, images.fingerprint()}) == 3


def test_lists_with_spaces_tabs_and_a_test_list(tmp_path: Path) -> None:
    tree(tmp_path / "images")
    draw(tmp_path / "images" / "bee" / "a b.png")
    train = tmp_path / "train.txt"
    train.write_text("ant/0.png 0\n\nbee/a b.png\t1\nbee/../cat/1.jpg 2  \n")
    (tmp_path / "test.txt").write_text("cat/0.png 4\n")
    splits = listfiles.load(f"{train},{tmp_path / 'test.txt'}", tmp_path / "images")
    assert splits["train"].paths == ("ant/0.png", "bee/a b.png", "bee/../cat/1.jpg")
    assert splits["train"].labels.tolist() == [0, 1, 2]
    assert splits["train"].lines.tolist() == [1, 3, 4]
    assert splits["train"].class_names == splits["test"].class_names == tuple("01234")
    assert splits["train"].image(1).size == (12, 10)
    assert splits["train"].where(1) == "train.txt line 3: bee/a b.png"
    assert listfiles.load(str(train), None)["train"].root == tmp_path


def test_wrong_lines_are_reported_together(tmp_path: Path) -> None:
    file = tmp_path / "train.txt"
    lines = ["a.png 0", "/etc/x.png 1", "a/../../b.png 1", "nolabel.png", "b.png one", "c.png -1", "C:\\x.png 0"]
    file.write_text("\n".join([*lines, r"..\x.png 0", "d.png 10000", f"e.png {'9' * 5000}", "f.png ²"]))
    with pytest.raises(UserError) as caught:
        listfiles.load(str(file), None)
    message = str(caught.value)
    assert message.startswith(f"{file}: 10 wrong lines: line 2: path '/etc/x.png' is absolute")
    for said in [
        "line 3: path 'a/../../b.png' climbs out",
        "line 4",
        "line 5: label 'one'",
        "line 6",
        "line 7: path 'C:",
    ]:
        assert said in message
    assert "line 8: path '..\\\\x.png' climbs out" in message
    assert "\n" not in message
    file.write_text("\n".join(f"/{i} 0" for i in range(30)))
    with pytest.raises(UserError, match=r"30 wrong lines: .* and 20 more$"):
        listfiles.load(str(file), None)


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "lists no images"), (b"\n \n", "lists no images"), (b"\xff\xfe\x00", "cannot be read")]
)
def test_bad_lists(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "train.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=says):
        listfiles.load(str(file), None)
    with pytest.raises(UserError, match="no such directory"):
        listfiles.load(str(file), tmp_path / "absent")
    with pytest.raises(UserError, match="3 files; give one"):
        listfiles.load("a,b,c", None)
    with pytest.raises(UserError, match="cannot be read"):
        listfiles.load(str(tmp_path / "absent.txt"), None)


@given(st.lists(st.sampled_from(["a", "..", ".", "", "b c"]), min_size=1, max_size=6).filter(any))
def test_no_listed_path_leaves_the_root(tmp_path_factory, parts: list[str]) -> None:
    path = "/".join(parts).strip()
    file = tmp_path_factory.mktemp("list") / "train.txt"
    file.write_text(f"{path} 0\n")
    depth = [0]
    for part in path.split("/"):
        depth.append(depth[-1] + {"..": -1, ".": 0, "": 0}.get(part, 1))
    if path.startswith("/") or min(depth) < 0:
        with pytest.raises(UserError):
            listfiles.load(str(file), None)
    else:
        assert listfiles.load(str(file), None)["train"].paths == (path,)


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
@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_all_unreadable_images_are_found_with_their_lines(tmp_path: Path, workers: int) -> None:
    images = listfiles.load(str(with_damage(tmp_path)), None)["train"]
    found = find_unreadable(images, workers=workers, progress=Quiet())
    assert [bad.row for bad in found] == [1, 2, 4]
    message = str(refuse(images, found))
    assert message.startswith("list: 3 images cannot be read: list.txt line 2: ant/1.jpg (cannot be decoded, ")
    assert message.endswith("list.txt line 5: cat/9.png (missing)")
    assert find_unreadable(images.take([0, 3, 5]), workers=workers, progress=Quiet()) == []


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_decoding_keeps_the_order_whatever_the_workers(tmp_path: Path) -> None:
    images = listfiles.load(str(with_damage(tmp_path)), None)["train"]
    batches = [[5, 0], [1, 3], [2, 4]]
    for workers in (0, 2):
        decoded = list(decode(images, to_tensor, batches, workers=workers))
        assert [batch.rows.tolist() for batch in decoded] == [[5, 0], [3], []]
        assert [[bad.row for bad in batch.unreadable] for batch in decoded] == [[], [1], [2, 4]]
        assert torch.equal(decoded[0].images[1], to_tensor(images.image(0)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_in_memory_decode_to_their_pixels(channels: int) -> None:
    pixels = torch.randint(256, (5, 6, 7, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stream = MemoryImages.of("mine", "train", ImageSet(pixels, torch.tensor([0, 1, 1, 0, 1]), ("a", "b")))
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
    with pytest.raises(UserError, match="unknown data set"):
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

    def load_dataset(name: str, split: str) -> FakeDataset:
        if name != "org/pets":
            raise RuntimeError("Dataset 'x' doesn't exist\non the Hub")
        assert split == "train"
        return FakeDataset([7, 8, 9], features)

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


@pytest.mark.parametrize(
    ("source", "features", "says"),
    [
        ("hf:org/pets:train", {"fine": COLUMNS["fine"]}, "no column of type Image; its columns are fine"),
        ("hf:org/pets:train", {"img": COLUMNS["img"]}, "no column of type ClassLabel; its columns are img"),
        ("hf:nobody:train", COLUMNS, "cannot be loaded .Dataset 'x' doesn't exist on the Hub"),
        ("hf:pets", COLUMNS, "expected hf:NAME:SPLIT"),
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
