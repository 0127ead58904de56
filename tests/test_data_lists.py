"""List files as people have them: marks, headers, separators, quotes, other systems' paths; mistakes by their line."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_trees import draw
from tailscope.data import folders, sources
from tailscope.errors import UserError

FUZZ = int(os.environ.get("TAILSCOPE_FUZZ", "50"))
PLAIN = "img/0.png 0\nimg/1.png 1\nimg/a b.png 0\n"
QUOTED = '"img/0.png",0\n"img/1.png",1\n"img/a b.png",0\n'


def read(tmp_path: Path, content: bytes | str, name: str = "train.txt") -> folders.ImageFiles:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return folders.load_lists(str(file), None)["train"]


SPELLINGS = {
    "plain": PLAIN,
    "mark": b"\xef\xbb\xbf" + PLAIN.encode(),
    "windows": b"\xef\xbb\xbf" + PLAIN.replace("\n", "\r\n").encode(),
    "old mac": PLAIN.replace("\n", "\r"),
    "utf-16": PLAIN.encode("utf-16"),
    "utf-16 be": b"\xfe\xff" + PLAIN.encode("utf-16-be"),
    "tabs": PLAIN.replace(".png ", ".png\t"),
    "spaces": PLAIN.replace(".png ", ".png    ").replace("img/0", "  img/0"),
    "commas": PLAIN.replace(".png ", ".png,"),
    "commas and spaces": PLAIN.replace(".png ", ".png, "),
    "semicolons": PLAIN.replace(".png ", ".png;"),
    "backslashes": PLAIN.replace("/", "\\"),
    "quotes": PLAIN.replace("img/a b.png", '"img/a b.png"'),
    "quotes and commas": QUOTED,
    "no line feed at the end": PLAIN.strip(),
    "blank lines": "\n\n" + PLAIN.replace("\n", "\n  \n") + "\n\n\n",
    "zeros before": PLAIN.replace(" 1\n", " 001\n"),
    "kaggle": "image,label\n" + PLAIN.replace(".png ", ".png,"),
    "label first": "label,image\n0,img/0.png\n1,img/1.png\n0,img/a b.png\n",
    "index and more": ',id,Image Path,CLASS,fold\n0,9,img/0.png,0,a\n1,8,img/1.png,1,"b,c"\n2,7,img/a b.png,0,a\n',
    "tsv": "file_name\tlabel\n" + PLAIN.replace(".png ", ".png\t"),
    "header of words": "path label\n" + PLAIN,
    "unknown name beside image": "image,breed\n" + PLAIN.replace(".png ", ".png,"),
    "unknown name beside label": "pic,label\n" + PLAIN.replace(".png ", ".png,"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_list_in_every_spelling(tmp_path: Path, spelling: str) -> None:
    found = read(tmp_path, SPELLINGS[spelling])
    assert found.paths == ("img/0.png", "img/1.png", "img/a b.png")
    assert found.labels.tolist() == [0, 1, 0]
    assert found.class_names == ("0", "1")
    assert found.notes == ()
    text = SPELLINGS[spelling]
    lines = (text if isinstance(text, str) else text.decode("utf-16" if b"\0" in text else "utf-8-sig")).splitlines()
    assert ["img" in lines[k - 1] for k in found.lines] == [True] * 3
    assert "1.png" in lines[found.lines[1] - 1]


def test_the_fingerprint_is_that_of_the_plain_list(tmp_path: Path) -> None:
    """What was read rightly before keeps its key; other spellings of it are the same data."""
    for name in ("img/0.png", "img/1.png", "img/a b.png"):
        draw(tmp_path / name)
    assert len({read(tmp_path, content).fingerprint() for content in SPELLINGS.values()}) == 1


def test_commas_semicolons_quotes_and_backslashes_in_names(tmp_path: Path) -> None:
    assert read(tmp_path, 'a,b.png 3\nc;d.png 1\n5,e.png,2\n"q ""x"".png",0\n').paths == (
        "a,b.png", "c;d.png", "5,e.png", 'q "x".png',
    )  # fmt: skip
    draw(tmp_path / "a\\b.png")  # a name on this system
    assert read(tmp_path, "a\\b.png 0\nc\\d.png 1\n").paths == ("a\\b.png", "c/d.png")


def test_labels_may_be_names_under_a_header(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("image,label\nd.png,bee\n")
    (tmp_path / "train.csv").write_text("image,label\na.png,cat\nb.png,ant\nc.png,bee\n")
    splits = folders.load_lists(f"{tmp_path / 'train.csv'},{tmp_path / 'test.csv'}", None)
    assert splits["train"].class_names == splits["test"].class_names == ("ant", "bee", "cat")
    assert splits["train"].labels.tolist() == [2, 0, 1]
    assert splits["test"].labels.tolist() == [1]
    assert splits["test"].notes == (f"{tmp_path / 'test.csv'}: no images of class 'ant', 'cat'",)
    (tmp_path / "test.csv").write_text("image,label\na.png,cat\nd.png,dog\n")
    with pytest.raises(UserError, match=r"test.csv: line 3: label 'dog', which .*train.csv has not"):
        folders.load_lists(f"{tmp_path / 'train.csv'},{tmp_path / 'test.csv'}", None)
    (tmp_path / "test.csv").write_text("image,label\nd.png,0\n")
    with pytest.raises(UserError, match=r"train.csv: its labels are names, those of .*test.csv numbers"):
        folders.load_lists(f"{tmp_path / 'train.csv'},{tmp_path / 'test.csv'}", None)


def test_repeated_and_shared_images_and_absent_classes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a.png 0\nb.png 1\n./a.png 0\nb.png 2\nc.png 2\n")
    (tmp_path / "b.txt").write_text("x/../c.png 2\nd.png 0\n")
    splits = folders.load_lists(f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}", None)
    assert len(splits["train"]) == 5  # said, not mended
    assert splits["train"].notes == (
        f"{tmp_path / 'a.txt'}: lines that repeat an image: 2, 1 of them with another label; the first is line 3",
    )
    assert splits["test"].notes == (
        f"{tmp_path / 'b.txt'}: images that stand in {tmp_path / 'a.txt'} too: 1 of 2",
        f"{tmp_path / 'b.txt'}: no images of class '1'",
    )


@pytest.mark.parametrize(("labels", "names"), [((1, 2), ("1", "2")), ((0, 10), ("0", "10")), ((0, 1), ("0", "1"))])
def test_an_experiment_takes_the_numbers_that_are_there(tmp_path: Path, labels, names) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{k}.png {k}\n" for k in labels))
    data = sources.load(f"list:{tmp_path / 'train.txt'},{tmp_path / 'test.txt'}")
    assert data.train.class_names == data.test.class_names == names
    assert data.train.counts() == [1, 1]
    assert data.test.labels.tolist() == [0, 1]
    with (tmp_path / "test.txt").open("a") as file:
        file.write("more.png 5\n")
    with pytest.raises(UserError, match="test: has class '5', of which train has no image to train on"):
        sources.load(f"list:{tmp_path / 'train.txt'},{tmp_path / 'test.txt'}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a.png 0\nb.png,x\n", "1 wrong lines: line 2: expected 'path label'"),
        ("picture,kind\na.png,0\n", "line 1: expected 'path label'"),
        ("image,path2,foo\na.png,0,1\n", "line 1: the columns image, path2, foo do not say which is the image"),
        ("image,label,class\na.png,0,ant\n", "line 1: the columns image, label, class do not say"),
        ("image,label\na.png,0\nb.png\n", "line 3: expected 'path label'"),
        ('image,label\na.png,0\n"b.png,1\n', "line 3: expected 'path label'"),
        ("image,label\na.png,0\nb.png,cat\n", "line 3: label 'cat' is not an integer"),
        ("image,label\na.png,cat\nb.png,\n", "line 3: expected 'path label'"),
        ("image,label\n../a.png,cat\n", "line 2: path '../a.png' climbs out"),
        ("image,label\n/a.png,cat\n", "line 2: path '/a.png' is absolute"),
        ("\\\\server\\a.png 0\n", "line 1: path '.*server.*' is absolute"),
        ("a\\..\\..\\b.png 0\n", "line 1: path .* climbs out of the root"),
        ("a\0b.png 0\n", "line 1: path .* holds a zero byte"),
        ("image,label\n", "lists no images"),
        (b"a.png 0\nb\xff.png 1\n", r"cannot be read as text \(line 2 is no UTF-8\)"),
        (PLAIN.encode("utf-16")[:-1], "no UTF-16"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(tmp_path: Path, content: bytes | str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read(tmp_path, content)
    assert str(tmp_path / "train.txt") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, says in [("pipe", "a pipe"), ("zero", "a device"), (".", "a folder"), ("no", "missing")]:
        with pytest.raises(UserError, match=f"cannot be read as text .{says}"):
            folders.load_lists(str(tmp_path / name), None)


@pytest.mark.parametrize("name", ["bom.txt", "kaggle.csv", "windows.txt"])
def test_by_command_line(tailscope_, tmp_path: Path, name: str) -> None:
    for i in range(4):
        draw(tmp_path / "img" / f"{i}.png", seed=i)
    plain = "".join(f"img/{i}.png {i % 2}\n" for i in range(4))
    content = {
        "bom.txt": b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode(),
        "kaggle.csv": b"image,label\n" + plain.replace(" ", ",").encode(),
        "windows.txt": plain.replace("/", "\\").encode(),
    }
    (tmp_path / name).write_bytes(content[name])
    fixed = ("--model", "resnet8", "--normalize", "cifar", "--image-size", 16, "--device", "cpu", "--json")
    ended = tailscope_("features", *fixed, "--data", f"list:{tmp_path / name}", "--out", tmp_path / "f.npz")
    assert ended.code == 0
    assert '"rows": 4' in ended.out
    assert '"classes": 2' in ended.out


CELLS = st.text(st.sampled_from("ab09.,;\t \"'\\/\r\n\0é#") | st.characters(), max_size=12)
LINES = st.lists(
    st.lists(CELLS, max_size=4).flatmap(lambda c: st.sampled_from([",", " ", ";", "\t"]).map(lambda s: s.join(c)))
)
HEADERS = st.sampled_from(
    ["", "image,label\n", "label;path\n", "\ufeff", "path label\n", "id\tclass\n", "image,image,label\n"]
)


@settings(max_examples=FUZZ)
@given(HEADERS, LINES, st.binary(max_size=6), st.booleans())
def test_any_list_is_read_or_refused(tmp_path_factory, header: str, lines: list[str], raw: bytes, valid: bool) -> None:
    folder = tmp_path_factory.mktemp("lists")
    text = (header + "\n".join(lines)).encode("utf-8", "replace")
    (folder / "train.txt").write_bytes(text if valid else text + raw)
    try:
        found = folders.load_lists(str(folder / "train.txt"), None)["train"]
    except UserError as error:
        refused = str(error)
        found = None
    if found is None:
        assert "\n" not in refused
        assert "train.txt" in refused
        return
    assert len(found.paths) == len(found.labels) == len(found.lines) > 0
    for path in found.paths:
        assert not os.path.normpath(path.replace("\\", "/")).startswith(("..", "/"))
        assert len(found.fingerprint()) == 64
