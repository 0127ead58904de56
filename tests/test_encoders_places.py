"""Where in a checkpoint a network lies, what else is there, and what is no checkpoint at all."""

import gzip
import json
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from image_trees import draw
from tailscope.encoders import load
from tailscope.encoders.checkpoints import read
from tailscope.encoders.preprocessing import Wishes
from tailscope.errors import UserError
from tailscope.tables.table import FeatureTable

State = dict[str, Tensor]
CLASSES = 7
PLAIN = Wishes(normalize="none", image_size=32)


def resnet10(classes: int = CLASSES, seed: int = 0) -> nn.Module:
    """torchvision's ResNet with a block a stage, the names of whose backbone are those of our resnet10."""
    torch.manual_seed(seed)
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=classes).eval()


NET, OTHER = resnet10(), resnet10(seed=1)
SD, OTHER_SD = NET.state_dict(), OTHER.state_dict()


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def backbone(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def classifier(state: State, prefix: str) -> State:
    return {f"{prefix}.{end}": state[f"fc.{end}"] for end in ("weight", "bias")}


def saved(folder: Path, content: object, name: str = "c.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def features_of(net: nn.Module, x: Tensor) -> Tensor:
    """Oracle: all but torchvision's last layer."""
    with torch.no_grad():
        return nn.Sequential(*list(net.children())[:-1], nn.Flatten())(x)


def check(encoder, net: nn.Module = NET, *, linear: bool = True) -> None:
    x = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(encoder.features(x), features_of(net, x), rtol=1e-4, atol=1e-4)
    assert (encoder.classifier is not None) == linear
    if linear:
        with torch.no_grad():
            torch.testing.assert_close(encoder.classifier.logits(encoder.features(x)), net(x), rtol=1e-3, atol=1e-3)


class Config(dict):
    """Options of a training, of a class that only the training knows, such as RIDE's parse_config.ConfigParser."""

    def __init__(self, **options: object) -> None:
        super().__init__(options)
        self.path = Path("config.json")


averaged = torch.optim.swa_utils.AveragedModel(NET).state_dict()

# What people's code writes: content, the notes expected, as texts in order.
LAYOUTS: dict[str, tuple[object, list[str]]] = {
    "Lightning": (
        {
            "state_dict": prefixed("model.", SD) | {f"criterion.{n}": torch.ones(7) for n in ("weight", "counts")},
            "epoch": 3,
            "hyper_parameters": {"path": Path("runs"), "optimizer": Config(lr=0.1)},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}],
        },
        ["left out what is no part of resnet10: criterion.* (2)"],
    ),
    "averaged": (averaged, ["left out what is no part of resnet10: n_averaged"]),
    "net and backbone": ({"net": prefixed("backbone.", SD), "acc": 91.2}, []),
    "net.backbone": (prefixed("net.backbone.", backbone(SD)) | classifier(SD, "net.fc"), []),
    "BoT": (
        {"state_dict": prefixed("module.backbone.", backbone(SD)) | classifier(SD, "module.classifier"), "epoch": 1},
        [],
    ),
    "SADE's options": ({"state_dict": prefixed("backbone.", SD), "config": Config(arch="resnet10")}, []),
    "imbalanced-DL": ({"arch": "resnet10", "state_dict": prefixed("module.", SD), "best_acc1": torch.tensor(1.0)}, []),
    "ema alone": ({"ema": SD, "best": np.float64(0.9)}, []),
    "arrays": ({"state_dict": SD, "cls_num_list": np.array([100, 10, 1]), "names": np.array(["a"], object)}, []),
    "deep": ({"a": {"b": [{"c": OrderedDict(prefixed("module.module.", SD))}]}}, []),
    "profiled": (SD | {"total_ops": torch.zeros(1), "layer1.0.total_ops": torch.zeros(1)}, []),
    "twice the same": ({"state_dict": SD, "model": dict(SD)}, []),
    "best and last": ({"state_dict": OTHER_SD, "state_dict_best": SD}, ["took the weights of state_dict_best, not of"]),
    "model and ema": ({"model": OTHER_SD, "ema": SD}, ["took the weights of ema, not of model; --checkpoint-key"]),
    "timm": ({"state_dict": OTHER_SD, "state_dict_ema": SD}, ["took the weights of state_dict_ema, not of state_dict"]),
    "DINO": ({"student": prefixed("module.backbone.", OTHER_SD), "teacher": prefixed("backbone.", SD)},
             ["took the weights of teacher.backbone, not of student.module.backbone"]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_network_is_found_under_the_one_prefix_that_has_all_of_it(tmp_path: Path, layout: str) -> None:
    content, notes = LAYOUTS[layout]
    encoder = load("resnet10", saved(tmp_path, content), wishes=PLAIN)
    check(encoder)
    assert len(encoder.notes) == len(notes)
    for note, expected in zip(encoder.notes, notes, strict=True):
        assert note.startswith(f"c.pth: {expected}")


def test_mocos_query_is_taken_and_its_projection_is_no_classifier(tmp_path: Path) -> None:
    state = prefixed("module.encoder_q.", SD) | prefixed("module.encoder_k.", OTHER_SD)
    state |= {"module.queue": torch.zeros(128, 9), "module.queue_ptr": torch.zeros(1)}
    encoder = load("resnet10", saved(tmp_path, {"state_dict": state}), wishes=PLAIN)
    check(encoder, linear=False)
    taken, projection, left = encoder.notes
    assert "took the weights of state_dict.module.encoder_q, not of state_dict.module.encoder_k" in taken
    assert "module.encoder_q.fc.weight [7, 512], module.encoder_q.fc.bias [7], a projection) is not known" in projection
    count = len(SD) - sum(name.endswith("num_batches_tracked") for name in SD)
    assert left.endswith(f"module.encoder_k.* ({count}), module.queue, module.queue_ptr")


def test_the_user_may_say_which_network(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": SD, "nets": {"b": prefixed("module.", OTHER_SD)}})
    with pytest.raises(UserError, match=r"several networks that fit resnet10: a, nets.b.module; .* --checkpoint-key"):
        load("resnet10", path, wishes=PLAIN)
    for key, net in {"a": NET, "b": OTHER, "nets.b": OTHER, "nets.b.module": OTHER}.items():
        encoder = load("resnet10", path, checkpoint_key=key, wishes=PLAIN)
        check(encoder, net)
        assert encoder.notes == ()
    with pytest.raises(UserError, match=r"--checkpoint-key c: not there; what fits is a, nets.b.module"):
        load("resnet10", path, checkpoint_key="c", wishes=PLAIN)
    twins = saved(tmp_path, {"x.ema": SD, "y.ema": OTHER_SD}, "twins.pth")
    with pytest.raises(UserError, match=r"--checkpoint-key ema: fits x.ema, y.ema; give more of the name"):
        load("resnet10", twins, checkpoint_key="ema", wishes=PLAIN)
    with pytest.raises(UserError, match="--checkpoint-key a: goes with --checkpoint"):
        load("resnet10", checkpoint_key="a")


def test_one_backbone_with_several_classifiers(tmp_path: Path) -> None:
    retrained = NET.state_dict() | classifier(OTHER_SD, "fc")
    net = resnet10()
    net.load_state_dict(retrained)
    path = saved(tmp_path, {"state_dict": SD, "crt_state_dict": retrained})
    encoder = load("resnet10", path, wishes=PLAIN)
    check(encoder, linear=False)
    assert encoder.notes == (
        "c.pth: state_dict, crt_state_dict have one backbone and different classifiers; no classifier file; say whose "
        "with --checkpoint-key",
    )
    for key, expected in {"state_dict": NET, "crt_state_dict": net}.items():
        encoder = load("resnet10", path, checkpoint_key=key, wishes=PLAIN)
        check(encoder, expected)
        assert encoder.notes == ()
    preferred = saved(tmp_path, {"state_dict": SD, "state_dict_best": retrained}, "best.pth")
    encoder = load("resnet10", preferred, wishes=PLAIN)
    check(encoder, net)
    assert encoder.notes[0].startswith("best.pth: took the classifier of state_dict_best, not of state_dict, which")
    alone = saved(tmp_path, {"model": SD, "backbone": backbone(SD)}, "alone.pth")
    encoder = load("resnet10", alone, wishes=PLAIN)
    check(encoder)
    assert encoder.notes == ()


def test_experts_are_named(tmp_path: Path) -> None:
    ride = {name.replace("layer4.", "layer4s.0.").replace("layer3.", "layer3s.0."): t for name, t in SD.items()}
    ride |= {name.replace("s.0.", "s.1."): t for name, t in ride.items() if "s.0." in name}
    with pytest.raises(
        UserError,
        match=r"several experts \('layer3s.0', 'layer3s.1', 'layer4s.0', 'layer4s.1'\) \(under 'state_dict.backbone'\)",
    ):
        load("resnet10", saved(tmp_path, {"state_dict": prefixed("backbone.", ride)}), wishes=PLAIN)
    separate = prefixed("experts.0.", SD) | prefixed("experts.1.", OTHER_SD)
    path = saved(tmp_path, separate)
    with pytest.raises(UserError, match=r"fit resnet10: experts.0, experts.1; say which"):
        load("resnet10", path, wishes=PLAIN)
    check(load("resnet10", path, checkpoint_key="experts.1", wishes=PLAIN), OTHER)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([(2, 1, 1, 1)], "2? ?[0-9]+ surplus"),
        ([(1, 1, 1, 2)], "surplus \\('layer4.1.conv1.weight'"),
    ],
)
def test_a_larger_network_of_the_same_names_is_not_taken_for_a_smaller_one(tmp_path: Path, names, says: str) -> None:
    larger = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, list(names[0]), num_classes=CLASSES)
    with pytest.raises(UserError, match=says):
        load("resnet10", saved(tmp_path, prefixed("module.", larger.state_dict())), wishes=PLAIN)


CLASSIFIERS: dict[str, tuple[State, str]] = {
    "dropout": ({"fc.1.weight": SD["fc.weight"], "fc.1.bias": SD["fc.bias"]}, "fc.1.weight [7, 512], fc.1.bias [7]"),
    "layers": (
        {f"fc.{i}.{end}": torch.zeros(9, 512)[: 9 if end == "weight" else 1] for i in (0, 2) for end in ("weight",)},
        "fc.0.weight [9, 512], fc.2.weight [9, 512]",
    ),
    "LDAM's cosine": ({"linear.weight": torch.rand(512, CLASSES)}, "linear.weight [512, 7] without a bias, as cosine"),
    "square cosine": ({"fc.weight": torch.rand(512, 512)}, "fc.weight [512, 512] without a bias, as cosine"),
    "rows of a cosine": ({"fc.weight": torch.rand(CLASSES, 512)}, "fc.weight [7, 512] without a bias, as cosine"),
    "with a scale": (classifier(SD, "fc") | {"fc.s": torch.ones(1)}, "fc.s [1]"),
    "weight norm": (
        {"fc.weight_g": torch.ones(7, 1), "fc.weight_v": torch.rand(7, 512), "fc.bias": torch.ones(7)},
        "fc.weight_g [7, 1]",
    ),
    "another width": ({"fc.weight": torch.rand(7, 64), "fc.bias": torch.rand(7)}, "for features of width 512"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_that_is_not_linear_costs_only_its_file(tmp_path: Path, kind: str) -> None:
    state, says = CLASSIFIERS[kind]
    encoder = load("resnet10", saved(tmp_path, {"state_dict": prefixed("module.", backbone(SD) | state)}), wishes=PLAIN)
    check(encoder, linear=False)
    assert len(encoder.notes) == 1
    assert says in encoder.notes[0].replace("module.", "")
    assert encoder.notes[0].endswith("is not known to be one linear layer; no classifier file")


def test_no_linear_classifier_computes_what_a_cosine_one_does() -> None:
    """Why cosine classifiers are refused: the norms of the features decide what a linear layer says, and how sure."""
    x, columns = torch.randn(50, 16), torch.randn(16, 5)
    cosine = 16 * F.normalize(x, dim=1) @ F.normalize(columns, dim=0)
    linear = x @ F.normalize(columns, dim=0)
    assert torch.equal(cosine.argmax(1), linear.argmax(1))
    assert not torch.equal(cosine[:, 0].argsort(), linear[:, 0].argsort())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.to(torch.int8), "'conv1.weight' is int8; quantised weights"),
        (lambda t: t.to("meta"), "'conv1.weight' is a meta tensor, without"),
        (lambda t: t.to_sparse(), "'conv1.weight' is a sparse_coo tensor, without"),
        (lambda t: t.log(), "'conv1.weight' holds NaN or infinity"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*sparse.*")
def test_weights_without_their_values(tmp_path: Path, change: Callable, says: str) -> None:
    state = SD | {"conv1.weight": change(SD["conv1.weight"])}
    with pytest.raises(UserError, match=says):
        load("resnet10", saved(tmp_path, {"ema": state, "net": dict(state)}), wishes=PLAIN)


def test_a_plain_tensor_file_may_have_any_suffix(tmp_path: Path) -> None:
    save_file(SD, tmp_path / "c.bin")
    check(load("resnet10", tmp_path / "c.bin", wishes=PLAIN))


def archive_of(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def numpy_file(path: Path, save: Callable) -> None:
    with path.open("wb") as file:
        save(file, np.zeros(2))


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "storages")


def scripted(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (
            lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
            "Git-LFS pointer",
        ),
        (lambda p: p.write_text("\n<!DOCTYPE html><html>Sign in</html>"), "is a web page, not the weights"),
        (lambda p: p.write_bytes(b""), "the file is empty"),
        (lambda p: p.write_bytes(gzip.compress(b"weights")), "compressed with gzip; unpack it first"),
        (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "is an HDF5 file"),
        (lambda p: p.write_text(json.dumps({"weight_map": {"a": "b"}})), "is JSON text, an index perhaps"),
        (tarred, "is a tar archive"),
        (scripted, "is a TorchScript archive, which holds code; save the network's state_dict instead"),
        (lambda p: numpy_file(p, np.savez), "is NumPy's .npz, not what torch.save writes"),
        (lambda p: numpy_file(p, np.save), "is a NumPy array; a PyTorch state_dict"),
        (lambda p: archive_of(p, {"photos/a.jpg": b"", "b": b""}), "is a zip archive of 'photos/a.jpg', 'b', not"),
        (lambda p: p.mkdir(), "a folder, not a file"),
    ],
)
@pytest.mark.parametrize("name", ["c.pth", "c.safetensors"])
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path: Path, write: Callable, says: str, name: str) -> None:
    write(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: .*{says}|{name}: {says}"):
        read(tmp_path / name)


def test_a_pipe_and_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(UserError, match=r"pipe.pth: a pipe, not a file"):
        read(tmp_path / "pipe.pth")
    path = saved(tmp_path, SD)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"c.pth: not a readable checkpoint.*Permission denied"):
        read(path)


def test_torchvisions_sequential_classifiers_and_timms_norms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v3_small(num_classes=5)
    net.classifier[3] = nn.Sequential(nn.Dropout(), nn.Linear(1024, 5))
    encoder = load("torchvision:mobilenet_v3_small", saved(tmp_path, net.state_dict()), wishes=PLAIN)
    assert encoder.classifier is None
    assert "its classifier (classifier.3.1.weight [5, 1024], classifier.3.1.bias [5])" in encoder.notes[-1]
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_convnext", num_classes=5)
    net.head.fc = nn.Sequential(nn.Dropout(), nn.Linear(net.head.fc.in_features, 5))
    encoder = load("timm:test_convnext", saved(tmp_path, {"model": net.state_dict()}), wishes=Wishes())
    assert encoder.classifier is None
    assert "its classifier (head.fc.1.weight" in encoder.notes[-1]


def test_the_cases_by_command_line(tmp_path: Path, tailscope_) -> None:
    for i in range(4):
        draw(tmp_path / "data" / "ab"[i % 2] / f"{i}.png", seed=i)
    cases = {
        "lightning": (LAYOUTS["Lightning"][0], 0, "left out what is no part of resnet10: criterion.*"),
        "swa": (averaged, 0, "left out what is no part of resnet10: n_averaged"),
        "ema": ({"ema": SD, "best": np.float64(0.9)}, 0, "7 outputs, the data 2 classes"),
        "dropout": (backbone(SD) | CLASSIFIERS["dropout"][0], 0, "is not known to be one linear layer"),
        "list": ([SD], 2, "holds a list; save the model's state_dict"),
    }
    for name, (content, code, says) in cases.items():
        saved(tmp_path, content, f"{name}.pth")
        done = tailscope_(
            "features", "--model", "resnet10", "--checkpoint", tmp_path / f"{name}.pth", "--image-size", 32,
            "--data", f"folder:{tmp_path / 'data'}", "--out", tmp_path / f"{name}.npz",
        )  # fmt: skip
        assert done.code == code, done.err
        assert says in done.out + done.err
        assert (tmp_path / f"{name}.classifier.npz").exists() == (code == 0 and name != "dropout")
    saved(tmp_path, {"model": SD, "ema": OTHER_SD}, "both.pth")
    done = tailscope_(
        "features", "--model", "resnet10", "--checkpoint", tmp_path / "both.pth", "--checkpoint-key", "model",
        "--image-size", 32, "--data", f"folder:{tmp_path / 'data'}", "--out", tmp_path / "model.npz",
    )  # fmt: skip
    assert done.code == 0
    same = [FeatureTable.load(tmp_path / f"{name}.npz").features for name in ("model", "swa")]
    assert torch.equal(*same)
