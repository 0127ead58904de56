"""Image folders and list files."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from image_trees import draw, to_tensor, tree
from tailscope.data import folders, sources
from tailscope.data.sources import open_images
from tailscope.errors import UserError
from tailscope.tables.table import FeatureTable


def test_a_plain_folder_agrees_with_torchvision(tmp_path: Path) -> None:
    tree(tmp_path)
    draw(tmp_path / "bee" / "deeper" / "x y.JPEG")
    (tmp_path / "bee" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    (images,) = folders.load_folder(tmp_path).values()
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
    splits = folders.load_folder(tmp_path)
    assert list(splits) == ["train", "test"]
    assert splits["test"].class_names == ("ant", "bee", "cat")
    assert splits["test"].paths == ("test/ant/0.png", "test/cat/0.png")
    assert splits["test"].labels.tolist() == [0, 2]
    assert not set(splits["train"].ids) & set(splits["test"].ids)


def test_train_may_be_a_class_among_others(tmp_path: Path) -> None:
    tree(tmp_path, ["bus", "train"])
    assert folders.load_folder(tmp_path)["all"].class_names == ("bus", "train")


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
        folders.load_folder(root)


NAMES = {
    "train": ["train", "Train", "TRAINING", "training_set", "trainset"],
    "val": ["val", "Valid", "validation", "VALIDATION", "dev", "val-set"],
    "test": ["test", "Test", "testing", "TEST SET", "held", "held-out", "Hold_Out", "holdout"],
}


@pytest.mark.parametrize(("split", "name"), [(split, name) for split, names in NAMES.items() for name in names])
def test_splits_go_by_their_usual_names(tmp_path: Path, split: str, name: str) -> None:
    others = {"train": "test", "val": "train", "test": "train"}
    tree(tmp_path / others[split], ["ant", "bee"])
    tree(tmp_path / name, ["ant", "bee"], images=1)
    splits = folders.load_folder(tmp_path)
    assert set(splits) == {split, others[split]}
    assert splits[split].paths == (f"{name}/ant/0.png", f"{name}/bee/0.png")
    assert splits[split].notes == ()
    assert open_images(f"folder:{tmp_path}").split(name)[0] == split
    data = sources.load(f"folder:{tmp_path}")
    assert data.test.counts() == ([3, 3] if split == "train" else [1, 1])


def test_the_test_split_is_preferred_to_the_validation_split(tmp_path: Path) -> None:
    for k, split in enumerate(("train", "valid", "test"), start=1):
        tree(tmp_path / split, ["ant", "bee"], images=k)
    data = sources.load(f"folder:{tmp_path}")
    assert (data.train.counts(), data.test.counts()) == ([1, 1], [3, 3])
    shutil.rmtree(tmp_path / "train")
    splits = folders.load_folder(tmp_path)
    assert list(splits) == ["val", "test"]
    with pytest.raises(UserError, match=r"give folder:PATH with train/ and test/ .*; this has only val, test"):
        sources.load(f"folder:{tmp_path}")
    tree(tmp_path / "test", ["cow"])
    assert folders.load_folder(tmp_path)["val"].class_names == ("ant", "bee", "cow")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            ["train/ant", "test/ant", "unlabelled/ant"],
            "holds 'test', 'train', by name a split, beside 'unlabelled', which",
        ),
        (
            ["test/ant", "ant", "bee"],
            "holds 'test', by name a split, beside 'ant', 'bee', which is none; splits are called",
        ),
        (["train/ant", "val/ant", "valid/ant"], "'val', 'valid' are both names of the split val; keep one"),
        (["train/ant", "Train_set/ant"], "are both names of the split train"),
        (["training/ant", "Test/ant", "Test/dog"], "/Test: has class 'dog', which training/ has not"),
    ],
)
def test_what_may_be_a_split_or_a_class_is_refused(tmp_path: Path, make: list[str], says: str) -> None:
    for folder in make:
        draw(tmp_path / folder / "0.png")
    with pytest.raises(UserError, match=says) as caught:
        folders.load_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_folders_without_images_beside_splits_do_not_matter(tmp_path: Path) -> None:
    tree(tmp_path / "train", ["ant"])
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "a.xml").write_text("<a/>")
    tree(tmp_path / "test", ["ant"], images=1)
    draw(tmp_path / "test" / "owl" / ".hidden.png")
    loaded = folders.load_folder(tmp_path)
    assert {split: images.counts() for split, images in loaded.items()} == {
        "train": [3],
        "test": [1],
    }


def test_names_of_splits_as_classes_are_said(tmp_path: Path) -> None:
    tree(tmp_path, ["bus", "train"])
    (note,) = folders.load_folder(tmp_path)["all"].notes
    assert note == "'train' taken as class folders, not as splits: no class folders in them"
    for split in ("seg_train", "seg_test"):
        tree(tmp_path / "wrapped" / split, ["ant", "bee"])
    (note,) = folders.load_folder(tmp_path / "wrapped")["all"].notes
    assert note.startswith(
        "'seg_test', 'seg_train' taken as classes, with folders like 'ant', 'bee' inside; if these are"
    )
    tree(tmp_path / "zip" / "photos", ["ant", "bee"])
    (note,) = folders.load_folder(tmp_path / "zip")["all"].notes
    assert note.startswith("'photos' taken as the only class, with folders like 'ant', 'bee' inside; if these are the")
    assert note.endswith(f"give folder:{tmp_path / 'zip' / 'photos'}")


def test_test_images_without_classes_are_no_split(tmp_path: Path) -> None:
    tree(tmp_path / "train")
    draw(tmp_path / "test" / "0.png")
    splits = folders.load_folder(tmp_path)
    assert list(splits) == ["train"]
    assert splits["train"].notes == (f"folder:{tmp_path}/test: no class folders in it, so it is no split (1 image)",)
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(UserError, match="no class folders in it, but 1 image; put these into a folder a class"):
        folders.load_folder(tmp_path / "test")


STRAY = [
    "__MACOSX/ant/x.png", "train/ant/.ipynb_checkpoints/0.png", "train/@eaDir/x.png", "train/ant/deep/@eaDir/x.png",
    "train/.DS_Store", "train/ant/Thumbs.db", "train/bee/._0.png", "$RECYCLE.BIN/x.png", "lost+found/x.png",
    "train/ant/deep/.hidden.jpg", "test/__macosx/x.png", ".git/x.png", "System Volume Information/x.png",
]  # fmt: skip


def test_hidden_and_system_files_count_nowhere_at_any_depth(tmp_path: Path) -> None:
    for root in (tmp_path / "clean", tmp_path / "stray"):
        tree(root / "train", ["ant", "bee"])
        draw(root / "train" / "ant" / "deep" / "1.png")
        tree(root / "test", ["ant", "bee"])
    for name in STRAY:
        draw(tmp_path / "stray" / name, format="PNG")
    clean, stray = (folders.load_folder(tmp_path / name) for name in ("clean", "stray"))
    for split, images in clean.items():
        assert stray[split].paths == images.paths
        assert stray[split].fingerprint() == images.fingerprint()
        assert images.notes == ()
        (note,) = stray[split].notes
        assert note.startswith(f"hidden or system files and folders left out: {len(STRAY)} ('$RECYCLE.BIN', '.git', ")
    assert sources.load(f"folder:{tmp_path / 'stray'}").notes() == [note]


def test_files_of_other_kinds_and_in_no_class_are_counted_and_named(tmp_path: Path) -> None:
    tree(tmp_path, ["ant", "bee"])
    for name in ("ant/b.heic", "ant/deep/c.HEIC", "bee/d.gif", "bee/e.svg", "bee/README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("beside the classes, and no image")
    draw(tmp_path / "cover.png")
    images = folders.load_folder(tmp_path)["all"]
    assert images.counts() == [3, 3]
    assert images.notes == (
        f"folder:{tmp_path}: 5 files of kinds that are not read left out: .heic 2, .gif 1, .svg 1, without suffix 1",
        f"folder:{tmp_path}: 1 image in no class folder left out: 'cover.png'",
    )
    for file in (tmp_path / "bee").iterdir():
        file.rename(file.with_suffix(".mp4"))
    with pytest.raises(UserError, match=r"in class folder 'bee', only .mp4 6; convert or remove what is there"):
        folders.load_folder(tmp_path)


def test_a_class_that_the_held_out_split_lacks_is_warned_about(tmp_path: Path) -> None:
    tree(tmp_path / "train", "0123", images=4)
    tree(tmp_path / "held", "023", images=4)
    splits = folders.load_folder(tmp_path)
    assert splits["test"].class_names == tuple("0123")
    assert splits["test"].counts() == [4, 0, 4, 4]
    assert splits["test"].notes == (f"folder:{tmp_path}/held: no images of class '1'",)
    assert splits["train"].notes == ()


def test_features_of_two_trees_are_matched_by_the_names_of_folders(tailscope_, tmp_path: Path) -> None:
    """Folders called 0, 2, 3 are names: in a tree that lacks 1 they still mean what they mean in the other."""
    tree(tmp_path / "train", "0123", images=4)
    tree(tmp_path / "held", "023", images=4)
    fixed = ("--model", "resnet8", "--normalize", "cifar", "--image-size", 16, "--device", "cpu")
    for name in ("train", "held"):
        out = tmp_path / f"{name}.npz"
        assert tailscope_("features", *fixed, "--data", f"folder:{tmp_path / name}", "--out", out).code == 0
    assert FeatureTable.load(tmp_path / "train.npz").class_names == tuple("0123")
    assert FeatureTable.load(tmp_path / "held.npz").class_names == tuple("023")


def test_links_that_lead_up_are_not_followed_round_and_round(tmp_path: Path) -> None:
    tree(tmp_path / "data", ["ant", "bee"])
    tree(tmp_path / "elsewhere", ["cow"])
    (tmp_path / "data" / "ant" / "up").symlink_to("..")
    (tmp_path / "data" / "cow").symlink_to(tmp_path / "elsewhere" / "cow")
    images = folders.load_folder(tmp_path / "data")["all"]
    assert images.class_names == ("ant", "bee", "cow")
    assert images.counts() == [3, 3, 3]
    assert images.notes == ("hidden or system files and folders left out: 1 ('ant/up')",)


def test_a_folder_that_may_not_be_listed_is_named(tmp_path: Path, monkeypatch) -> None:
    tree(tmp_path)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root may list everything
    with pytest.raises(UserError, match=r"bee: cannot be listed \(Permission denied\); mend its permissions"):
        folders.load_folder(tmp_path)
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: no folder$"):
        folders.load_folder(tmp_path / "file")


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "parquet"])
def test_names_that_are_no_utf8_reach_every_file(tailscope_, tmp_path: Path, suffix: str) -> None:
    root = tmp_path / os.fsdecode(b"da\xffta")
    try:
        tree(root, [os.fsdecode(b"b\xff"), "ant", "café"], images=2)
    except OSError:
        pytest.skip("this file system has no such names")
    (root / "ant" / "0.png").rename(root / "ant" / os.fsdecode(b"\xfe.png"))
    fixed = ("--model", "resnet8", "--normalize", "cifar", "--image-size", 16, "--device", "cpu", "--json")
    ended = tailscope_("features", *fixed, "--data", f"folder:{root}", "--out", tmp_path / f"f.{suffix}")
    assert ended.code == 0
    table = FeatureTable.load(tmp_path / f"f.{suffix}")
    assert table.class_names == ("ant", "b\\xff", "café")
    assert table.ids.tolist() == [
        "ant/1.jpg",
        "ant/\\xfe.png",
        "b\\xff/0.png",
        "b\\xff/1.jpg",
        "café/0.png",
        "café/1.jpg",
    ]
    assert json.loads(ended.out)["rows"] == 6


def test_a_subset_of_a_folder_whose_name_is_no_utf8(tailscope_, tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"da\xffta")
    for split in ("train", "test"):
        tree(root / split, [os.fsdecode(b"b\xff"), "ant"])
    ended = tailscope_("subset", "--data", f"folder:{root}", "--profile", "full", "--out", tmp_path / "out")
    assert (ended.code, ended.err) == (0, "")
    assert "b\\xff" in ended.out
    found = json.loads((tmp_path / "out" / "subset.json").read_text())
    assert found["dataset"] == {"name": "da\\xffta", "class_names": ["ant", "b\\xff"]}
    refused = tailscope_("subset", "--data", "digits", "--profile", "full", "--out", root)
    assert (refused.code, refused.err) == (
        2,
        f"error: --out {tmp_path}/da\\xffta: its name is no UTF-8; choose another folder\n",
    )


def test_take_and_fingerprint(tmp_path: Path) -> None:
    tree(tmp_path)
    images = folders.load_folder(tmp_path)["all"]
    picked = images.take([5, 0])
    assert picked.paths == (images.paths[5], images.paths[0])
    assert picked.labels.tolist() == [1, 0]
    before = images.fingerprint()
    assert before == folders.load_folder(tmp_path)["all"].fingerprint()
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
    splits = folders.load_lists(f"{train},{tmp_path / 'test.txt'}", tmp_path / "images")
    assert splits["train"].paths == ("ant/0.png", "bee/a b.png", "bee/../cat/1.jpg")
    assert splits["train"].labels.tolist() == [0, 1, 2]
    assert splits["train"].lines.tolist() == [1, 3, 4]
    assert splits["train"].class_names == splits["test"].class_names == tuple("01234")
    assert splits["train"].image(1).size == (12, 10)
    assert splits["train"].where(1) == "train.txt line 3: bee/a b.png"
    assert folders.load_lists(str(train), None)["train"].root == tmp_path


def test_wrong_lines_are_reported_together(tmp_path: Path) -> None:
    file = tmp_path / "train.txt"
    lines = ["a.png 0", "/etc/x.png 1", "a/../../b.png 1", "nolabel.png", "b.png one", "c.png -1", "C:\\x.png 0"]
    file.write_text("\n".join([*lines, r"..\x.png 0", "d.png 10000", f"e.png {'9' * 5000}", "f.png ²"]))
    with pytest.raises(UserError) as caught:
        folders.load_lists(str(file), None)
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
        folders.load_lists(str(file), None)


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "lists no images"), (b"\n \n", "lists no images"), (b"\xff\xfe\x00", "cannot be read")]
)
def test_bad_lists(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "train.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=says):
        folders.load_lists(str(file), None)
    with pytest.raises(UserError, match="no such directory"):
        folders.load_lists(str(file), tmp_path / "absent")
    with pytest.raises(UserError, match="3 files; give one"):
        folders.load_lists("a,b,c", None)
    with pytest.raises(UserError, match="cannot be read"):
        folders.load_lists(str(tmp_path / "absent.txt"), None)


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
            folders.load_lists(str(file), None)
    else:
        assert folders.load_lists(str(file), None)["train"].paths == (path,)
