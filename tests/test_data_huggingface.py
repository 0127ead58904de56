"""Hugging Face sets: saved by `save_to_disk` (written here by pyarrow alone), their columns, labels and images."""

import io
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tailscope.data import sources
from tailscope.data.huggingface import load
from tailscope.data.images import ImageError
from tailscope.data.sources import open_images
from tailscope.errors import UserError

pa = pytest.importorskip("pyarrow")

FUZZ = int(os.environ.get("TAILSCOPE_FUZZ", "50"))
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)


def png(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", **options)
    return file.getvalue()


def image(content: bytes | None, path: str | None = None) -> dict:
    return {"bytes": content, "path": path}


IMAGE = {"_type": "Image"}
PETS = {"names": ["cat", "dog"], "_type": "ClassLabel"}
ROWS = [image(png(p)) for p in PIXELS]


def save(folder: Path, columns: dict, features: dict, *, shards: int = 1, **state) -> str:
    """Write what `save_to_disk` writes, as its documentation and its files have it."""
    folder.mkdir(parents=True)
    kinds = {"Image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "ClassLabel": pa.int64()}
    types = {name: kinds.get(feature.get("_type")) for name, feature in features.items()}
    table = pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})
    files = [f"data-{k:05}-of-{shards:05}.arrow" for k in range(shards)]
    for k, file in enumerate(files):
        part = table.slice(k * len(table) // shards, (k + 1) * len(table) // shards - k * len(table) // shards)
        with pa.OSFile(str(folder / file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(part)
    state = {"_data_files": [{"filename": f} for f in files], "_fingerprint": "f00", "_split": None, **state}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return str(folder)


def pets(folder: Path, labels=(0, 1, 1, 0, 1), **more) -> str:
    return save(folder, {"img": ROWS[: len(labels)], "pet": list(labels)}, {"img": IMAGE, "pet": PETS}, **more)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_saved_set_is_read_without_the_package(tmp_path: Path, monkeypatch, shards: int) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    opened = open_images(f"hf:{pets(tmp_path / 'pets', shards=shards)}")
    split, images = opened.split(None)
    assert split == "train"
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [0, 1, 1, 0, 1]
    for row in range(5):
        assert (np.asarray(images.image(row)) == PIXELS[row]).all()
    picked = images.take(np.array([4, 2]))
    assert picked.ids == ("train:4", "train:2")
    assert (np.asarray(picked.image(0)) == PIXELS[4]).all()
    assert picked.take(np.array([1])).labels.tolist() == [1]
    assert len({images.fingerprint(), picked.fingerprint(), images.take(np.array([2, 4])).fingerprint()}) == 3
    assert images.fingerprint() == open_images(f"hf:{tmp_path / 'pets'}").split(None)[1].fingerprint()


def test_a_saved_set_of_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        pets(tmp_path / split, _split=split)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert list(load(str(tmp_path))) == ["train", "test"]
    assert list(load(f"{tmp_path}:test")) == ["test"]
    with pytest.raises(UserError, match="no split 'validation'; it has train, test"):
        load(f"{tmp_path}:validation")
    assert list(load(str(tmp_path / "test"))) == ["test"]
    with pytest.raises(UserError, match="no split 'train'; it has test"):
        load(f"{tmp_path / 'test'}:train")


def splits(folder: Path, **columns: tuple[list, list]) -> str:
    """Save a set with the splits train and test, of a column of images and one of labels that are their own names."""
    for split, (images, labels) in columns.items():
        save(folder / split, {"img": images, "kind": labels}, {"img": IMAGE, "kind": {}}, _split=split)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(columns)}))
    return f"hf:{folder},label=kind"


def test_an_experiment_numbers_the_classes_of_both_splits_alike(tmp_path: Path) -> None:
    source = splits(tmp_path / "a", train=(ROWS, list("cabca")), validation=(ROWS[:3], list("cbc")))
    data = sources.load(source)
    assert data.name == "a"
    assert data.train.class_names == data.test.class_names == ("a", "b", "c")
    assert (data.train.counts(), data.test.labels.tolist()) == ([2, 1, 2], [2, 1, 2])
    again = splits(tmp_path / "elsewhere" / "a", train=(ROWS, list("cabca")), validation=(ROWS[:3], list("cbc")))
    assert sources.load(again).fingerprint == data.fingerprint  # of no paths
    with pytest.raises(UserError, match="has class 'd', of which b has no image to train on"):
        sources.load(splits(tmp_path / "b", train=(ROWS, list("cabca")), test=(ROWS[:1], ["d"])))
    with pytest.raises(UserError, match=r"give hf:NAME with the splits train and test.*; this has only test"):
        sources.load(splits(tmp_path / "c", test=(ROWS[:1], ["d"])))


def test_a_swap_on_a_saved_set(tailscope_, tmp_path: Path) -> None:
    stream = np.random.default_rng(0)
    drawn = {
        split: ([image(png(stream.integers(60 * k, 60 * k + 60, (9, 9, 3), np.uint8))) for k in labels], labels)
        for split, labels in (("train", [0, 1, 2] * 12), ("test", [0, 1, 2] * 3))
    }
    drawn["train"][0][4] = image(b"no image")
    recipe = "imagenet(size=20, width=4, epochs=1, batch=8, views=1)"
    arguments = ("--data", splits(tmp_path / "grey", **drawn), "--profile", "exp:3", "--recipe", recipe)
    ended = tailscope_("swap", *arguments, "--seeds", 1, "--out", tmp_path / "out", "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert result["dataset"] == {
        "name": "grey", "class_names": ["0", "1", "2"], "train_images": 35, "test_images": 9,
    }  # fmt: skip
    assert result["counts"] == [11, 6, 3]
    assert any("1 image cannot be read and took no part: hf:grey row train:4" in line for line in result["warnings"])


def test_two_label_columns_are_refused_until_one_is_chosen(tmp_path: Path) -> None:
    columns = {
        "img": ROWS,
        "fine": [0, 1, 1, 0, 1],
        "coarse": [0, 0, 1, 0, 0],
        "word": ["b", "a", "a", "c", "b"],
        "n": [7, 9, 7, 7, 9],
    }
    source = save(tmp_path / "s", columns, {"img": IMAGE, "fine": PETS, "coarse": PETS, "word": {}, "n": {}})
    with pytest.raises(
        UserError, match="the columns fine, coarse are all of type ClassLabel; choose one, with ,label=fine"
    ):
        load(source)
    for wish, names, labels in [
        ("fine", ("cat", "dog"), [0, 1, 1, 0, 1]),
        ("coarse", ("cat", "dog"), [0, 0, 1, 0, 0]),
        ("word", ("a", "b", "c"), [1, 0, 0, 2, 1]),
        ("n", ("7", "9"), [0, 1, 0, 0, 1]),
    ]:
        found = load(f"{source},label={wish},image=img")["train"]
        assert (found.class_names, found.labels.tolist()) == (names, labels)
    for options, says in [
        (",label=breed", "no column 'breed'; its columns are img, fine, coarse, word, n"),
        (",label=fine,image=photo", "no column 'photo'; its columns are img"),
        (",labels=fine", "behind the comma label=COLUMN and image=COLUMN are known"),
        (",label=", "behind the comma label=COLUMN and image=COLUMN are known"),
        (",label=img", "expected integers or text"),
    ]:
        with pytest.raises(UserError, match=says):
            load(source + options)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (
            [0, None, 1, None, 0],
            "column 'pet': 2 of 5 rows have no label .null or -1., the first is row 1; drop these rows",
        ),
        ([0, 1, -1, 0, 0], "1 of 5 rows have no label .null or -1., the first is row 2"),
        ([0, 1, 2, 0, 0], "labels beyond its 2 classes"),
        ([], "column 'pet': no rows"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, labels: list, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(pets(tmp_path / "pets", labels))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (5, "no list of texts"),
        (True, "no list of texts"),
        ({"0": "a", "1": "b"}, "no list of texts"),
        ("ab", "no list of texts"),
        (["a", 1], "no list of texts"),
        (["a", None], "no list of texts"),
        (["a", "a"], "names have 'a' 2 times; names must differ"),
        ([], "labels beyond its 0 classes"),
    ],
)
def test_class_names_that_are_none_are_refused_when_the_set_is_opened(tmp_path: Path, names, says: str) -> None:
    features = {"img": IMAGE, "pet": {"_type": "ClassLabel", "names": names}}
    folder = save(tmp_path / "set", {"img": ROWS, "pet": [0, 1, 1, 0, 1]}, features)
    with pytest.raises(UserError, match=f"^hf:.*: column 'pet': .*{says}"):
        load(folder)


def test_images_that_are_none_are_unreadable_and_nothing_else_is_opened(tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    Image.fromarray(PIXELS[0]).save(outside)
    rows = [None, image(None), image(png(PIXELS[0])[:40]), image(b"no image"), image(None, str(outside))]
    source = save(tmp_path / "s", {"img": rows, "pet": [0, 1, 0, 1, 0]}, {"img": IMAGE, "pet": PETS})
    images = load(source)["train"]
    reasons = []
    for row in range(5):
        with pytest.raises(ImageError) as caught:
            images.image(row)
        reasons.append(str(caught.value))
    assert reasons[:2] == ["column 'img' holds nothing"] * 2
    assert [reason.split(",")[0] for reason in reasons[2:4]] == ["cannot be decoded"] * 2
    assert reasons[4] == "its bytes are not in the saved set, only a path"


def test_orientation_and_depth_follow_the_rules_of_all_sources(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = (np.linspace(0, 1, 24).reshape(4, 6) * 65535).astype(np.uint16)
    rows = [image(png(PIXELS[0], exif=exif)), image(png(deep))]
    images = load(save(tmp_path / "s", {"img": rows, "pet": [0, 1]}, {"img": IMAGE, "pet": PETS}))["train"]
    assert (np.asarray(images.image(0)) == np.rot90(PIXELS[0], -1)).all()
    assert np.abs(np.asarray(images.image(1))[..., 0] - deep / 257).max() <= 0.5


def damage(folder: Path, file: str, content: bytes | None) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)


ARROW = "data-00000-of-00001.arrow"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("state.json", b"[" * 100_000, "state.json: not a JSON object"),
        ("dataset_info.json", None, "dataset_info.json: missing"),
        ("dataset_info.json", b"{}", "do not name Arrow files and features"),
        ("state.json", b'{"_data_files": [{"filename": "../../x.arrow"}]}', "do not name Arrow files and features"),
        ("state.json", b'{"_data_files": 3}', "do not name Arrow files"),
        ("state.json", b'{"_data_files": [{"filename": "x.arrow"}]}', "x.arrow: missing"),
        ("state.json", b'{"_indices_data_files": [1]}', "old version of datasets"),
        (ARROW, b"nothing", "no readable Arrow file"),
        (ARROW, None, f"{ARROW}: missing"),
    ],
)
def test_damaged_saved_sets(tmp_path: Path, file: str, content: bytes | None, says: str) -> None:
    source = pets(tmp_path / "pets")
    damage(tmp_path / "pets", file, content)
    with pytest.raises(UserError, match=says) as caught:
        load(source)
    assert "\n" not in str(caught.value)


def test_a_home_that_is_not_there(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:~nosuchuser/pets:train: needs the package datasets"):
        load("~nosuchuser/pets:train")
    with pytest.raises(UserError, match=r"hf:~nosuchuser/pets: needs the package datasets"):
        load("~nosuchuser/pets")


def test_a_truncated_arrow_file(tmp_path: Path) -> None:
    source = pets(tmp_path / "pets")
    content = (tmp_path / "pets" / ARROW).read_bytes()
    damage(tmp_path / "pets", ARROW, content[: len(content) // 2])
    with pytest.raises(UserError, match="no readable Arrow file"):
        load(source)


@settings(max_examples=FUZZ)
@given(st.lists(st.tuples(st.integers(0, 2**12), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_arrow_files_are_read_or_refused(tmp_path_factory, changes: list[tuple[int, int]]) -> None:
    folder = tmp_path_factory.mktemp("saved") / "pets"
    source = pets(folder)
    raw = bytearray((folder / ARROW).read_bytes())
    for place, value in changes:
        raw[place % len(raw)] = value
    damage(folder, ARROW, bytes(raw))
    with suppress(UserError):
        for images in load(source).values():
            for row in range(len(images.ids)):
                with suppress(ImageError):
                    assert images.image(row).mode == "RGB"


def test_the_package_reads_the_same(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "pet": datasets.ClassLabel(names=["cat", "dog"])})
    made = datasets.Dataset.from_dict({"img": ROWS, "pet": [0, 1, 1, 0, 1]}, features=features)
    made.select([4, 0, 2]).save_to_disk(str(tmp_path / "saved"))
    images = load(str(tmp_path / "saved"))["train"]
    assert images.labels.tolist() == [1, 0, 1]
    assert [(np.asarray(images.image(k)) == PIXELS[row]).all() for k, row in enumerate([4, 0, 2])] == [True] * 3
    for name in ("cat", "dog"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "0.png").write_bytes(png(PIXELS[0]))
    by_name = load(f"{tmp_path / 'tree'}:train")["train"]
    assert by_name.class_names == ("cat", "dog")
    assert (np.asarray(by_name.take(np.array([1])).image(0)) == PIXELS[0]).all()
