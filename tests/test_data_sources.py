"""Digits against scikit-learn, CIFAR in a small copy of the official layout, and every mistake in an `.npz`."""

import contextlib
import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits

from tailscope.data import sources
from tailscope.data.images import ImageSet
from tailscope.errors import UserError

Arrays = dict[str, np.ndarray]


def arrays() -> Arrays:
    """A valid data set: 3 classes, 12 training and 6 test images of 4x4 RGB."""
    generator = np.random.default_rng(0)
    return {
        "train_images": generator.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8),
        "train_labels": np.arange(12) % 3,
        "test_images": generator.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8),
        "test_labels": np.arange(6) % 3,
        "class_names": np.array(["ant", "bee", "cat"]),
    }


def save(path: Path, content: Arrays) -> str:
    np.savez(path, **content)
    return str(path)


def complaint(source: str, **options: Path) -> str:
    with pytest.raises(UserError) as caught:
        sources.load(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_are_scikit_learns_split_into_train_and_50_test_images_a_class() -> None:
    data, bunch = sources.load("digits"), load_digits()
    assert data.train.images.shape == (1297, 8, 8, 1)
    assert data.test.counts() == [50] * 10
    assert data.train.class_names == data.test.class_names == tuple("0123456789")
    np.testing.assert_array_equal(np.add(data.train.counts(), 50), np.bincount(bunch.target))
    both = torch.cat([data.train.images, data.test.images]).numpy().reshape(1797, 64)
    labels = torch.cat([data.train.labels, data.test.labels]).numpy()
    scaled = np.array([round(float(v) * 255 / 16) for v in bunch.data.ravel()]).reshape(1797, 64)
    ours = sorted(map(tuple, np.column_stack([labels, both]).tolist()))
    assert ours == sorted(map(tuple, np.column_stack([bunch.target, scaled]).tolist()))


def test_the_digits_split_is_fixed() -> None:
    assert sources.load("digits").fingerprint == sources.load("digits").fingerprint
    assert sources.load("digits").fingerprint[:16] == "62d796d32f3fef60"


def test_npz_round_trip_and_integer_dtypes(tmp_path: Path) -> None:
    content = arrays()
    content["train_labels"] = content["train_labels"].astype(np.uint8)
    content["test_labels"] = content["test_labels"].astype(np.int32)
    data = sources.load(save(tmp_path / "animals.npz", content))
    assert data.name == "animals"
    assert data.train.class_names == ("ant", "bee", "cat")
    assert data.train.labels.dtype == data.test.labels.dtype == torch.int64
    np.testing.assert_array_equal(data.train.images.numpy(), content["train_images"])
    np.testing.assert_array_equal(data.test.labels.numpy(), content["test_labels"])


def test_fingerprint_is_of_content_never_of_paths(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    base = sources.load(save(tmp_path / "a.npz", arrays())).fingerprint
    assert sources.load(save(tmp_path / "other" / "b.npz", arrays())).fingerprint == base
    changes: list[Callable[[Arrays], object]] = [
        lambda c: c.update(train_images=c["train_images"] ^ np.uint8(1)),
        lambda c: c.update(test_images=c["test_images"] ^ np.uint8(1)),
        lambda c: c.update(train_labels=c["train_labels"][::-1].copy()),
        lambda c: c.update(class_names=np.array(["ant", "bee", "cow"])),
        lambda c: c.update({k: c[k].reshape(-1, 2, 8, 3) for k in ("train_images", "test_images")}),
    ]
    hashes = {base}
    for change in changes:
        content = arrays()
        change(content)
        hashes.add(sources.load(save(tmp_path / "c.npz", content)).fingerprint)
    assert len(hashes) == len(changes) + 1


def test_grey_images_names_by_number_and_bytes(tmp_path: Path) -> None:
    grey = arrays()
    grey.update({k: grey[k][..., 0] for k in ("train_images", "test_images")})
    del grey["class_names"]
    data = sources.load(save(tmp_path / "grey.npz", grey))
    assert data.train.images.shape == (12, 4, 4, 1)
    assert data.train.class_names == ("0", "1", "2")
    grey["class_names"] = np.array([b"a", b"b", b"c"])
    assert sources.load(save(tmp_path / "bytes.npz", grey)).train.class_names == ("a", "b", "c")


def test_a_class_may_lack_test_images(tmp_path: Path) -> None:
    content = arrays()
    content["test_labels"] = np.array([0, 1, 1, 0, 1, 1])
    assert sources.load(save(tmp_path / "data.npz", content)).test.counts() == [2, 4, 0]


def test_take_counts_and_bad_construction() -> None:
    data = ImageSet(
        torch.arange(16, dtype=torch.uint8).reshape(4, 2, 2, 1), torch.tensor([0, 2, 2, 0]), ("a", "b", "c")
    )
    assert data.counts() == [2, 0, 2]
    taken = data.take(np.array([3, 1]))
    assert taken.labels.tolist() == [0, 2]
    assert torch.equal(taken.images, data.images[[3, 1]])
    assert len(data.take([])) == 0
    with pytest.raises(ValueError, match="uint8"):
        ImageSet(data.images.float(), data.labels, data.class_names)
    with pytest.raises(ValueError, match="int64"):
        ImageSet(data.images, data.labels[:3], data.class_names)


def replaced(**fields: object) -> Callable[[Arrays], object]:
    return lambda c: c.update({k: np.asarray(v) for k, v in fields.items()})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("test_labels"), "no field 'test_labels'; needs train_images, train_labels"),
        (lambda c: c.pop("train_images"), "no field 'train_images'"),
        (lambda c: c.update(train_images=c["train_images"] / 255), "train_images is float64; expected uint8"),
        (lambda c: c.update(train_images=c["train_images"][0, 0]), "train_images has shape (4, 3)"),
        (lambda c: c.update(test_images=c["test_images"].transpose(0, 3, 1, 2).repeat(2, 3)), "1 to 4 channels last"),
        (lambda c: c.update(test_images=c["test_images"][:, :3]), "train_images are (4, 4, 3)"),
        (
            lambda c: c.update(test_images=c["test_images"][:0], test_labels=c["test_labels"][:0]),
            "test_images is empty",
        ),
        (lambda c: c.update(train_labels=c["train_labels"][:-1]), "train_labels: 11 labels for 12 images"),
        (lambda c: c.update(test_labels=c["test_labels"] * 0.5), "test_labels: label 0.5 in row 1 (and 1 more) is no"),
        (lambda c: c.update(train_labels=np.eye(12)), "expected one label a row, [N] or [N, 1]"),
        (lambda c: c.update(train_labels=c["train_labels"] - 1), "label -1 in row 0 (and 3 more) is negative"),
        (replaced(train_labels=[0, 2] * 6), "class 1 (bee) of 0 to 2 has no training images"),
        (replaced(train_labels=[0, 1] * 6), "class 2 (cat) of 0 to 2 has no training images"),
        (replaced(test_labels=[0, 1, 2, 0, 1, 3]), "test_labels: class_names has 3 names, but row 5 has label 3"),
        (
            lambda c: (c.pop("class_names"), c.update(test_labels=c["test_labels"] + 1)),
            "test_labels has '3'",
        ),
        (replaced(train_labels=np.zeros(12, int)), "single class"),
        (replaced(class_names=["ant", "bee"]), "train_labels: class_names has 2 names, but row 2 has label 2"),
        (replaced(class_names=["ant", "bee", "cat", "dog"]), "class 3 (dog) of 0 to 3 has no training images"),
        (replaced(class_names=["ant", "bee", "bee"]), "'bee' 2 times"),
        (replaced(class_names=[1, 2, 3]), "expected text [C]"),
        (replaced(class_names=np.array(["a", "b", "c"], dtype=object)), "class_names holds Python objects"),
        (replaced(train_labels=np.array([0, 1, 2] * 4, dtype=object)), "train_labels holds Python objects"),
    ],
)
def test_every_mistake_in_an_npz_is_one_line_that_names_it(
    tmp_path: Path, change: Callable[[Arrays], object], says: str
) -> None:
    content = arrays()
    change(content)
    message = complaint(save(tmp_path / "bad.npz", content))
    assert says in message
    assert "bad.npz" in message


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda labels: labels[:, None].astype(np.uint8), "012"),  # as MedMNIST's files have them
        (lambda labels: labels[None], "012"),
        (lambda labels: labels * 1.0, "012"),
        (lambda labels: labels.astype(">i2") + 1, "123"),
        (lambda labels: labels * 10**15, ("0", "1000000000000000", "2000000000000000")),
        (lambda labels: np.array(["ant", "bee", "cat"])[labels], ("ant", "bee", "cat")),
        (lambda labels: np.array([b"ant", b"b\xc3\xa9e", b"cat"])[labels], ("ant", "b\xe9e", "cat")),
    ],
)
def test_labels_name_their_classes(tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], names: str) -> None:
    content = arrays()
    del content["class_names"]
    plain = sources.load(save(tmp_path / "plain.npz", content))
    labels = {k: change(content[k]) for k in ("train_labels", "test_labels")}
    data = sources.load(save(tmp_path / "named.npz", content | labels))
    assert data.train.class_names == data.test.class_names == tuple(names)
    assert torch.equal(data.train.labels, plain.train.labels)
    assert torch.equal(data.test.labels, plain.test.labels)


class Bomb:
    """Leaves a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "unpickled"
    content = arrays()
    content["train_images"] = np.array([Bomb(mark)] * 12, dtype=object)
    assert "never unpickled" in complaint(save(tmp_path / "bomb.npz", content))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb(mark)))
    assert "not a readable .npz" in complaint(str(tmp_path / "pickle.npz"))
    assert "unsafely" not in complaint(str(tmp_path / "pickle.npz"))
    assert not mark.exists()


def test_files_that_are_not_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    assert "no such file" in complaint(str(path))
    path.write_bytes(b"")
    assert "the file is empty" in complaint(str(path))
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    path.write_bytes(buffer.getvalue())
    assert "single array" in complaint(str(path))
    path.unlink()
    path.mkdir()
    assert "a folder, not a file" in complaint(str(path))


@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_and_damaged_files(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "data.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays())
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        assert "truncated" in complaint(str(path))
    for at in range(60, len(whole) // 2, 41):  # flipped bytes: an error for the user, or harmless
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with contextlib.suppress(UserError):
            sources.load(str(path))


def test_unknown_data_sets_list_the_known() -> None:
    known = "cifar10, cifar100, digits, PATH.npz, folder:PATH, list:TRAIN.txt[,TEST.txt], hf:NAME[:SPLIT]"
    assert complaint("cifar") == f"unknown data set 'cifar'; did you mean 'cifar10'? known: {known}"


@pytest.fixture
def tiny_official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 in the official layout with 20 images a file; the class knows their checksums; no network."""
    root = tmp_path / "official"
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def write(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name: str) -> list[str]:
        pixels = generator.integers(0, 256, (20, 3072), dtype=np.uint8)
        return write(name, {"data": pixels, "labels": [i % 10 for i in range(20)]})

    names = [f"class {k}" for k in range(10)]
    meta = write("batches.meta", {"label_names": names})
    tiny = type(
        "TinyCIFAR10",
        (torchvision.datasets.CIFAR10,),
        {
            "train_list": [batch("data_batch_1"), batch("data_batch_2")],
            "test_list": [batch("test_batch")],
            "meta": {"filename": meta[0], "key": "label_names", "md5": meta[1]},
            "url": (tmp_path / "nowhere.tar.gz").as_uri(),
        },
    )
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", tiny)
    return root


def test_cifar_in_torchvisions_layout(tiny_official: Path) -> None:
    data = sources.load("cifar10", data_root=tiny_official)
    assert (len(data.train), len(data.test), data.train.class_names[3]) == (40, 20, "class 3")
    batch = pickle.loads((tiny_official / "cifar-10-batches-py" / "test_batch").read_bytes())
    np.testing.assert_array_equal(data.test.images.numpy(), batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert data.test.labels.tolist() == batch["labels"]


def test_cifar_from_the_environments_root(tiny_official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILSCOPE_DATA", str(tiny_official))
    assert len(sources.load("cifar10").train) == 40


def test_damaged_cifar_is_not_unpickled_and_a_failed_download_says_what_to_do(tiny_official: Path) -> None:
    mark = tiny_official / "unpickled"
    (tiny_official / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(Bomb(mark)))
    message = complaint("cifar10", data_root=tiny_official)
    assert "cifar10.npz" in message
    assert "download failed" in message
    assert not mark.exists()
    assert "no such directory" in complaint("cifar10", data_root=tiny_official / "missing")


def test_cifar_from_an_npz_in_the_root(cifar100_npz: Path) -> None:
    data = sources.load("cifar100", data_root=cifar100_npz.parent)
    assert data.train.counts() == [500] * 100
    assert data.test.counts() == [100] * 100
    assert data.train.images.shape == (50_000, 32, 32, 3)
