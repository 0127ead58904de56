"""Every mistake of a user is one line on standard error and exit code 2, and leaves nothing behind."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from experiment_setups import timeless
from tailscope.training.loop import Training

EXPERIMENT_VERBS = ("swap", "ladder", "geometry")


def arrays(**changes):
    """Return a valid data set's arrays with some of them changed, or left out where None."""
    valid = {
        "train_images": np.zeros((12, 8, 8, 1), np.uint8),
        "train_labels": np.repeat([0, 1, 2], 4),
        "test_images": np.zeros((6, 8, 8, 1), np.uint8),
        "test_labels": np.repeat([0, 1, 2], 2),
    }
    return {name: value for name, value in {**valid, **changes}.items() if value is not None}


def objects(*values):
    """Return an array of Python objects."""
    found = np.empty(len(values), object)
    found[:] = values
    return found


BAD_ARRAYS = {
    "no field": (arrays(test_labels=None), "no field 'test_labels'"),
    "lengths differ": (arrays(train_labels=np.repeat([0, 1, 2], 3)), "train_labels: 9 labels for 12 images"),
    "a negative label": (arrays(train_labels=np.repeat([0, -1, 2], 4)), "label -1"),
    "a test label outside": (
        arrays(test_labels=np.repeat([0, 1, 3], 2)),
        "test_labels has '3', which train_labels",
    ),
    "labels beyond the names": (arrays(class_names=np.array(["a", "b"])), "class_names has 2 names"),
    "a class without images": (arrays(train_labels=np.repeat([0, 1, 3], 4)), "test_labels has '2'"),
    "float images": (arrays(train_images=np.zeros((12, 8, 8, 1))), "train_images is float64; expected uint8"),
    "float labels": (arrays(train_labels=np.repeat([0.0, 0.5, 2.0], 4)), "no whole number"),
    "objects": (arrays(train_labels=objects(*range(12))), "Python objects, which are never unpickled"),
    "no images": (arrays(train_images=np.zeros((0, 8, 8, 1), np.uint8), train_labels=np.zeros(0, int)), "is empty"),
    "channels first": (arrays(train_images=np.zeros((12, 1, 8, 8), np.uint8)), "channels last"),
    "one class": (arrays(train_labels=np.zeros(12, int), test_labels=np.zeros(6, int)), "at least two"),
    "shapes differ": (arrays(test_images=np.zeros((6, 9, 8, 1), np.uint8)), "test_images"),
    "a huge label": (arrays(train_labels=np.repeat([0, 1, 2**62], 4)), "test_labels has '2'"),
    "names twice": (arrays(class_names=np.array(["a", "a", "b"])), "names must differ"),
}


def assert_refused(ended, says, *, out=None):
    assert ended.code == 2
    assert ended.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", ended.err)
    assert says in ended.err
    assert "Traceback" not in ended.err
    if out is not None:
        assert not out.exists()


@pytest.mark.parametrize("command", ["subset", "swap --recipe demo"])
@pytest.mark.parametrize(("fields", "says"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_bad_arrays(tailscope_, tmp_path, command, fields, says):
    np.savez(tmp_path / "bad.npz", **fields)
    data = ("--data", tmp_path / "bad.npz", "--profile", "balanced")
    ended = tailscope_(*command.split(), *data, "--out", tmp_path / "out")
    assert_refused(ended, says, out=tmp_path / "out")
    assert "bad.npz" in ended.err


BAD_FILES = {
    "missing": (None, "no such file"),
    "empty": (lambda good: b"", "the file is empty"),
    "truncated": (lambda good: good[: len(good) // 2], "truncated"),
    "cut inside a field": (lambda good: good[:300] + bytes(~b & 255 for b in good[300:400]) + good[400:], "damaged"),
    "text": (lambda good: b"train_images,train_labels\n1,2\n", "not a readable .npz"),
    "a pickle": (lambda good: b"cposix\nsystem\n(S'true'\ntR.", "not a readable .npz"),
    "a folder": ("folder", "a folder, not a file"),
}


@pytest.mark.parametrize("command", ["subset", "geometry --recipe demo"])
@pytest.mark.parametrize(("content", "says"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tailscope_, tmp_path, command, content, says):
    path = tmp_path / "bad.npz"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        np.savez(path, **arrays())
        path.write_bytes(content(path.read_bytes()))
    ended = tailscope_(*command.split(), "--data", path, "--profile", "balanced", "--out", tmp_path / "out")
    assert_refused(ended, says, out=tmp_path / "out")


BAD_OPTIONS = [
    (("--data", "imagenet"), "known: cifar10, cifar100, digits, PATH.npz"),
    (("--data", ""), "known: cifar10"),
    (("--recipe", "quick"), "known: demo, fast, paper, paper-as-printed"),
    (("--profile", "pareto:6"), "known: exp:IF, step:IF"),
    (("--profile", "exp:0.5"), "the imbalance factor must be at least 1"),
    (("--profile", "exp:nan"), "expected a number"),
    (("--profile", "exp:1e9"), "the largest imbalance factor possible is 124"),
    (("--profile", "counts:1,2"), "2 counts for 10 classes"),
    (("--profile", "counts:" + ",".join(["999"] * 10)), "asks for 999 images of class 0"),
    (("--profile", "none.json"), "no such counts file"),
    (("--protocol", "random"), "known: nested, ldam"),
    (("--seeds", "0"), "at least one seed"),
    (("--seeds", "-3"), "expected a number of seeds"),
    (("--seeds", "two"), "expected a number of seeds"),
    (("--seeds", "99999999999"), "more than 1,000 seeds"),
    (("--subset-seed", "-1"), "error: --subset-seed -1: must be at least 0\n"),
    (("--subset-seed", "4294967296", "--protocol", "ldam"), "--subset-seed 4294967296: protocol 'ldam' takes 0 to"),
    (("--subset-seed", "x"), "--subset-seed"),
    (("--protocol", "ldam", "--seeds", "4294967296,"), "seed 4294967296"),
    (("--device", "tpu"), "known: auto, cpu"),
    (("--device", "cuda:9000"), "--device cuda:9000"),
    (("--data", "cifar10", "--data-root", "none/here"), "--data-root none/here: no such directory"),
    (("--colour", "red"), "No such option"),
    (("--out",), "requires an argument"),
    (("extra",), "unexpected extra argument"),
]


@pytest.mark.parametrize(("options", "says"), BAD_OPTIONS, ids=[" ".join(o)[:40] for o, _ in BAD_OPTIONS])
def test_bad_options(tailscope_, tmp_path, options, says):
    """The last of an option given twice counts, so each case adds its mistake to a good command."""
    for verb in EXPERIMENT_VERBS:
        good = (verb, "--data", "digits", "--recipe", "demo", "--out", tmp_path / "out")
        assert_refused(tailscope_(*good, *options), says, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("swop",), "No such command 'swop'"),
        (("swap",), "Missing option '--data'"),
        (("subset", "--data", "digits", "--seed", "-1"), "error: --seed -1: must be at least 0\n"),
        (("subset", "--data", "digits", "--seed", "x"), "--seed"),
        (("subset", "--data", "digits", "--profile", "exp:125"), "largest imbalance factor possible is 124"),
        (("geometry", "--data", "digits", "--permutations", "-1"), "--permutations"),
        (("demo", "--seeds", "0"), "at least one seed"),
        (("demo", "--device", "tpu"), "known: auto"),
        (("report",), "Missing argument 'DIR'"),
        (("report", "none/here"), "none/here"),
        (("methods", "extra"), "unexpected extra argument"),
        (("--nonsense",), "No such option"),
    ],
)
def test_bad_commands(tailscope_, tmp_path, monkeypatch, command, says):
    monkeypatch.chdir(tmp_path)
    assert_refused(tailscope_(*command), says)
    assert list(tmp_path.iterdir()) == []


BAD_PARTS = [
    ("swap", "--loss", "focal(gamma=-1)", "gamma=-1"),
    ("swap", "--stage2-loss", "focal(gamma=-1)", "gamma=-1"),
    ("swap", "--sampler", "drs(start=2)", "start=2"),
    ("ladder", "--sampler", "effective_number(beta=7)", "beta=7"),
    ("swap", "--stage2-sampler", "effective_number(beta=7)", "beta=7"),
    ("swap", "--schedule", "onecycle(peak=2)", "peak=2"),
    ("swap", "--weights", "drw(start=5)", "start=5"),
    ("swap", "--mix", "mixup(alpha=-1)", "alpha=-1"),
    ("swap", "--pretrain", "rotation(length=-1)", "length=-1"),
    ("geometry", "--augment", "cutout(size=-1)", "size=-1"),
    ("geometry", "--permutations", "1000001", "--permutations 1000001: expected 0 to 1,000,000"),
    ("compare", "--methods", "ce; focal(gamma=-1)", "gamma=-1"),
    ("compare --tune cut", "--methods", "focal; mixup(alpha=-1)", "alpha=-1"),
    ("compare", "--methods", "ce; sampler:effective_number(beta=7)", "beta=7"),
    ("memorization", "--mix", "mixup(alpha=-1)", "alpha=-1"),
]


@pytest.mark.parametrize(("verb", "option", "value", "says"), BAD_PARTS)
def test_values_that_a_part_refuses_start_no_training(tailscope_, tmp_path, monkeypatch, verb, option, value, says):
    monkeypatch.setattr(Training, "run", lambda _: pytest.fail("trains"))
    run = (*verb.split(), "--data", "digits", "--recipe", "demo", "--profile", "exp:20", option, value)
    assert_refused(tailscope_(*run, "--out", tmp_path / "out"), says, out=tmp_path / "out")
    if verb in ("swap", "compare", "memorization"):
        assert_refused(tailscope_(*run, "--plan"), says)
    if verb == "swap":
        assert_refused(tailscope_("check", *run[1:]), says)


@pytest.mark.parametrize("verb", ["demo", "subset", *EXPERIMENT_VERBS])
def test_folders_that_cannot_be_written(tailscope_, tmp_path, verb):
    (tmp_path / "file").touch()
    data = () if verb == "demo" else ("--data", "digits")
    for out in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / ("x" * 300)):
        assert_refused(tailscope_(verb, *data, "--out", out), "cannot be written")
    if verb != "subset":
        store = ("--store", tmp_path / "file" / "store")
        assert_refused(tailscope_(verb, *data, "--out", tmp_path / "out", *store), "--store")
        assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "folder" / f"{'swap' if verb == 'demo' else verb}.json").mkdir(parents=True)
    refused = tailscope_(verb, *data, "--out", tmp_path / "folder", "--overwrite")
    assert_refused(refused, "is a folder; use another --out")
    assert len(list((tmp_path / "folder").iterdir())) == 1


def test_the_demo_starts_nothing_where_one_of_its_results_would_be_lost(tailscope_, tmp_path):
    for verb in ("subset", "geometry"):
        folder = tmp_path / verb
        folder.mkdir()
        (folder / f"{verb}.json").write_text('{"spec": {"seed": 5}}')
        assert_refused(tailscope_("demo", "--out", folder), f"{verb}.json: holds a result of another spec")
        assert [path.name for path in folder.iterdir()] == [f"{verb}.json"]


def test_images_too_small_for_the_networks(tailscope_, tmp_path):
    small = np.zeros((12, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "small.npz", **arrays(train_images=small, test_images=small[:6]))
    ended = tailscope_("swap", "--data", tmp_path / "small.npz", "--profile", "balanced", "--out", tmp_path / "out")
    assert_refused(ended, "small: images of 4 x 4 pixels are too small")
    assert not (tmp_path / "out" / "swap.json").exists()


def test_a_damaged_stage_is_named_and_made_again(tailscope_, tmp_path, monkeypatch, caplog):
    from tailscope import report

    monkeypatch.setattr(report, "build", lambda *_, **__: None)
    command = ("swap", "--data", "digits", "--recipe", "demo", "--seeds", "1", "--out", tmp_path, "--json")
    assert tailscope_(*command).code == 0
    before = timeless(json.loads((tmp_path / "swap.json").read_text()))
    damaged = next((tmp_path / "store" / "stage2").glob("*/tensors.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:20])
    assert tailscope_(*command).code == 0
    assert f"{damaged}: damaged (its bytes do not fit its digest); it is made again" in caplog.text
    assert timeless(json.loads((tmp_path / "swap.json").read_text())) == before
    assert tailscope_("store", "verify", "--store", tmp_path / "store").code == 0


def test_the_process_itself_exits_with_2_and_no_traceback():
    command = [sys.executable, "-c", "from tailscope.cli import main; main()", "swap", "--data", "imagenet"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert re.fullmatch(r"error: unknown data set 'imagenet'; known: [^\n]+, folder:PATH, list:[^\n]+\n", ended.stderr)
