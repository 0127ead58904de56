"""Image folders and list files."""

from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from image_trees import draw, to_tensor, tree
from tailscope.data import folders, listfiles
from tailscope.errors import UserError


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
