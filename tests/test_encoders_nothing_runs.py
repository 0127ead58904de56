"""Nothing that a file names is run: stores, checkpoints, feature files and results from a stranger."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tailscope.encoders import run_features
from tailscope.errors import UserError
from tailscope.networks import MODELS
from tailscope.store import Store

COMMAND = "os:system('touch pwned')"
MODULE = "evil:touch"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a module that leaves a trace when imported, and when called."""
    (tmp_path / "evil.py").write_text("open('pwned', 'w').close()\ndef touch(*_, **__): open('pwned', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stored(root: Path, **changes) -> None:
    """Write by hand what looks like an entry of a store."""
    torch.manual_seed(0)
    model = MODELS.make("resnet8", 1, 10).state_dict() | {"rows": torch.arange(10)}
    spec = {"data": {"name": "digits", "profile": "full", "counts": [1] * 10}, "model": "resnet8"}
    spec |= {"augment": ["crop(padding=1)"], "mix": None} | changes
    Store(root).get_or_make("stage1", "ab12", lambda _: (model, {"spec": spec, "seed": 0}))


def foreign(root: Path) -> None:
    """Write a store with no code of ours."""
    folder = root / "stage1" / ("0" * 32)
    folder.mkdir(parents=True)
    spec = {"model": COMMAND, "data": {"name": "digits", "profile": "full", "counts": [1] * 10}}
    (folder / "meta.json").write_text(json.dumps({"spec": {**spec, "augment": ["crop"], "mix": None}, "seed": 0}))
    header = json.dumps({"rows": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (folder / "tensors.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    (folder / "DONE").touch()


@pytest.mark.parametrize(
    "model",
    [
        COMMAND,
        MODULE,
        "evil:touch()",
        "builtins:eval(\"open('pwned', 'w')\")",
        "torchvision:resnet18",
        "timm:resnet18",
        "test_resnet",
        "store:ab12",
        "resnet8(width=__import__('os').system('touch pwned'))",
        7,
        None,
        ["resnet8"],
    ],
)
def test_a_store_names_only_networks_of_ours(here: Path, model) -> None:
    stored(here / "store", model=model)
    with pytest.raises(UserError, match=r"store/stage1/ab12/meta.json: .*; names in a file are only looked up"):
        run_features("store:ab", "digits", here / "f.npz", split="train", store=here / "store")
    assert sorted(path.name for path in here.iterdir()) == ["evil.py", "store"]


def test_a_strangers_store_by_command_line(here: Path, tailscope_) -> None:
    foreign(here / "store")
    done = tailscope_("features", "--model", "store:0", "--store", "store", "--data", "digits", "--split", "train",
                      "--out", "f.npz")  # fmt: skip
    assert done.code == 2
    assert "meta.json: model \"os:system('touch pwned')\": expected a name" in done.err
    assert done.err.count("\n") == 1
    assert not (here / "pwned").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "resnet32(width=1000000000)"}, "cannot be built|does not fit"),
        ({"model": "resnet8(width=100000)"}, "does not fit resnet8.width=100000.: .* of another shape"),
        ({"model": "resnet56"}, "does not fit resnet56: keys: .* missing"),
        ({"augment": ["resized_crop(size=1000000)"]}, "images of 1000000 pixels; at most 1024"),
        ({"augment": ["resized_crop(size=0)"]}, "images of 0 pixels"),
        ({"augment": ["resized_crop(size='a')"]}, "expected int"),
        ({"augment": [["crop"]]}, "expected a name or a call"),
        ({"augment": None}, "is no backbone that tailscope stored"),
        ({"data": {"counts": "many"}}, "is no backbone that tailscope stored"),
        ({"data": None}, "is no backbone that tailscope stored"),
    ],
)
def test_a_store_cannot_ask_for_more_than_it_holds(here: Path, changes: dict, says: str) -> None:
    stored(here / "store", **changes)
    with pytest.raises(UserError, match=says) as caught:
        run_features("store:ab", "digits", here / "f.npz", split="train", store=here / "store")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", ["1e999", "-1e999", "NaN", "null", '"many"', "[]"])
def test_counts_of_a_strangers_store_that_are_no_numbers(here: Path, count: str) -> None:
    foreign(here / "store")
    path = here / "store" / "stage1" / ("0" * 32) / "meta.json"
    path.write_text(path.read_text().replace("[1,", f"[{count},"))
    with pytest.raises(UserError, match="is no backbone that tailscope stored") as caught:
        run_features("store:0", "digits", here / "f.npz", split="train", store=here / "store")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("meta", ["[]", "{}", '{"spec": 3}', '{"spec": {"model": "resnet8"}}'])
def test_descriptions_that_are_none(here: Path, meta: str) -> None:
    stored(here / "store")
    (here / "store" / "stage1" / "ab12" / "meta.json").write_text(meta)
    for key in ("ab", "cd"):
        with pytest.raises(UserError, match="store"):
            run_features(f"store:{key}", "digits", here / "f.npz", split="train", store=here / "store")


class Bomb:
    """Unpickling it would run a command."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self):
        return {
            "os": (os.system, ("touch pwned",)),
            "subprocess": (subprocess.Popen, (["touch", "pwned"],)),
            "eval": (eval, ("open('pwned', 'w')",)),
            "import": (__import__, ("evil",)),
        }[self.how]


@pytest.mark.parametrize("how", ["os", "subprocess", "eval", "import"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_runs_nothing(here: Path, how: str, legacy: bool) -> None:
    state = MODELS.make("resnet8", 1, 10).state_dict()
    content = {"state_dict": state, "config": Bomb(how)}
    torch.save(content, here / "c.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="only tensors are unpickled"):
        run_features("resnet8", "digits", here / "f.npz", split="train", checkpoint=here / "c.pth")
    assert not (here / "pwned").exists()


class Dtype:
    """NumPy's dtype as a file may claim it to be: a code, and a state that does not belong to it."""

    def __init__(self, code: str, order: str, flags: int) -> None:
        self.code, self.state = code, (3, order, None, None, None, -1, -1, flags)

    def __reduce__(self):
        return np.dtype, (self.code, False, True), self.state


class Numpy:
    """NumPy's number or array of such a type, of bytes that a real one would take for pointers."""

    def __init__(self, kind: str, dtype: Dtype, raw: object = b"\x41" * 32) -> None:
        self.kind, self.dtype, self.raw = kind, dtype, raw

    def __reduce__(self):
        if self.kind == "scalar":
            return np.float64(0).__reduce__()[0], (self.dtype, self.raw)
        return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, (4,), self.dtype, False, self.raw)


@pytest.mark.parametrize(
    "crafted",
    [
        Numpy("scalar", Dtype("O", "|", 0)),
        Numpy("scalar", Dtype("O", "|", 63)),
        Numpy("array", Dtype("O", "|", 0)),
        Numpy("array", Dtype("f8", "<", 63)),
        Numpy("scalar", Dtype("f8", "<", 63)),
        Numpy("array", Dtype("f8", "<", 63), [1.0, 2.0, 3.0, 4.0]),
        Numpy("array", Dtype("S1", "|", 0), "text"),
    ],
    ids=lambda it: f"{it.kind} {it.dtype.code} {it.dtype.state[-1]} {type(it.raw).__name__}",
)
@pytest.mark.parametrize("legacy", [False, True])
def test_numbers_of_a_checkpoint_are_no_pointers(here: Path, crafted: Numpy, legacy: bool) -> None:
    content = {"state_dict": {"w": torch.ones(3)}, "best": crafted}
    torch.save(content, here / "c.pth", _use_new_zipfile_serialization=not legacy)
    code = (
        "from pathlib import Path\nimport numpy as np\nfrom tailscope.encoders.checkpoints import read\n"
        "from tailscope.errors import UserError\n"
        "try: print([sorted(each.state) for each in read(Path('c.pth')).containers])\n"
        "except UserError as error: print(error)\n"
        "assert not np.dtype('f8').hasobject and np.dtype('f8').isnative"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    spoilt = not isinstance(crafted.raw, bytes)
    assert done.stdout.startswith("c.pth: not a readable checkpoint" if spoilt else "[['w']]")
    assert done.stdout.count("\n") == 1


class Strange(dict):
    """An object whose class the reader does not import."""


def test_classes_of_a_checkpoint_are_not_imported(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = MODELS.make("resnet8", 1, 10).state_dict()
    monkeypatch.setattr(Strange, "__module__", "evil")
    monkeypatch.setitem(__import__("sys").modules, "evil", __import__("types").SimpleNamespace(Strange=Strange))
    torch.save({"state_dict": state, "config": Strange(a=1)}, here / "c.pth")
    monkeypatch.delitem(__import__("sys").modules, "evil")
    done = run_features("resnet8", "digits", here / "f.npz", split="train", checkpoint=here / "c.pth")
    assert done.classifier is not None
    assert not (here / "pwned").exists()


def test_feature_files_and_results_run_nothing(here: Path, tailscope_) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), [30, 12, 6])
    provenance = json.dumps({"model": COMMAND, "data": MODULE, "features": "__import__('evil')", "precision": MODULE})
    for name in ("train", "unseen"):
        features = rng.normal(size=(48, 4)).astype("f4") + labels[:, None]
        np.savez(here / f"{name}.npz", features=features, labels=labels, provenance=provenance)
    assert tailscope_("diagnose", "--train", "train.npz", "--unseen", "unseen.npz", "--out", "out").code == 0
    path = here / "out" / "diagnosis.json"
    path.write_text(hostile(path.read_text()))
    assert tailscope_("report", "out", "--no-figures").code in (0, 2)
    assert not (here / "pwned").exists()


def hostile(text: str) -> str:
    """Put a command wherever a result names a model, a method or a data set, and an expression into other text."""

    def changed(value: object, field: str = "") -> object:
        if isinstance(value, dict):
            return {k: changed(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [changed(v, field) for v in value]
        named = isinstance(value, str) and any(word in field for word in ("model", "name", "recipe", "loss", "source"))
        return f"{COMMAND} {{{{ cycler.__init__.__globals__.os.system('touch pwned') }}}}" if named else value

    return json.dumps(changed(json.loads(text)))
