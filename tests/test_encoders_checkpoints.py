"""Checkpoints of every known layout give the features and logits of the network that they were saved from."""

import argparse
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from tailscope.encoders import checkpoints, load
from tailscope.encoders.preprocessing import CIFAR, Wishes
from tailscope.errors import UserError
from tailscope.networks import MODELS
from tailscope.networks.resnets import ResNet10

State = dict[str, Tensor]
CLASSES = 7


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to rounding, of sums as large as the largest."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def trained(model: nn.Module) -> nn.Module:
    """Give the batch normalisations running statistics and every parameter a value of its own."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(noise + 0.5 if "running_var" in name else tensor + 0.1 * (noise - 0.5))
    return model.eval()


@pytest.fixture(scope="module")
def cifar() -> nn.Module:
    return trained(MODELS.make("resnet32", 3, CLASSES))


@pytest.fixture(scope="module")
def imagenet() -> nn.Module:
    """ResNet-10 as torchvision builds it."""
    return trained(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES))


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def renamed(state: State, old: str, new: str) -> State:
    return {name.replace(f"{old}.", f"{new}.") if name.startswith(old) else name: t for name, t in state.items()}


def without(state: State, name: str) -> State:
    return {key: tensor for key, tensor in state.items() if not key.startswith(name)}


def only(state: State, name: str) -> State:
    return {key.replace(name, "fc"): tensor for key, tensor in state.items() if key.startswith(name)}


SCALES = torch.linspace(0.5, 2.0, CLASSES)

CIFAR_LAYOUTS: dict[str, Callable[[State], object]] = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "model": lambda s: {"model": s, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.7)},
    "compiled": lambda s: {"state_dict": prefixed("_orig_mod.module.", s)},
    "LDAM-DRW": lambda s: {
        "epoch": 200,
        "arch": "resnet32",
        "state_dict": prefixed("module.", renamed(s, "classifier", "linear")),
        "best_acc1": torch.tensor(70.0),
    },
    "MiSLAS stage 1": lambda s: {
        "state_dict_model": prefixed("module.", without(s, "classifier")),
        "state_dict_classifier": prefixed("module.", only(s, "classifier")),
    },
    "MiSLAS stage 2": lambda s: {
        "state_dict_model": without(s, "classifier"),
        "state_dict_classifier": only(s, "classifier"),
        "state_dict_lws_model": {"module.learned_norm": SCALES[None]},
        "its_ece": np.float32(3.0),
    },
    "our store": lambda s: {**s, "rows": torch.arange(5)},
}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("layout", CIFAR_LAYOUTS)
def test_cifar_layouts(tmp_path: Path, cifar: nn.Module, layout: str) -> None:
    path = saved(tmp_path / "ckpt.pth.tar", CIFAR_LAYOUTS[layout](cifar.state_dict()))
    encoder = load("resnet32", path, wishes=Wishes(normalize="none"))
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        features, logits = cifar.features(x), cifar(x)
    if layout == "MiSLAS stage 2":
        logits = logits * SCALES
    assert torch.equal(encoder.features(x), features)
    assert encoder.width == 64
    close(encoder.classifier.logits(features), logits)
    assert encoder.notes == ()


@pytest.mark.parametrize("key", ["state_dict_best", "state_dict"])
@pytest.mark.parametrize("lws", [False, True])
def test_classifier_balancing_layout(tmp_path: Path, imagenet: nn.Module, key: str, lws: bool) -> None:
    state = imagenet.state_dict()
    classifier = only(state, "fc") | ({"scales": SCALES} if lws else {})
    networks = {"feat_model": prefixed("module.", without(state, "fc")), "classifier": prefixed("module.", classifier)}
    path = saved(tmp_path / "final_model_checkpoint.pth", {key: networks, "best_acc": 0.4, "centroids": None})
    encoder = load("resnet10", path)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        logits = imagenet(x) * (SCALES if lws else 1)
        features = nn.Sequential(*list(imagenet.children())[:-1], nn.Flatten())(x)
    assert encoder.width == 512
    close(encoder.features(x), features)
    close(encoder.classifier.logits(features), logits)


def test_resnet10_is_torchvisions(imagenet: nn.Module) -> None:
    ours = ResNet10(64, 3, CLASSES).eval()
    ours.load_state_dict(renamed(imagenet.state_dict(), "fc", "classifier"))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        close(ours(x), imagenet(x))
    assert torch.equal(ours.classifier(ours.features(x)), ours(x))
    assert sum(p.numel() for p in MODELS.make("resnet10", 3, 1000).parameters()) == 5_418_792


def test_the_fields_checkpoints_get_the_fields_normalisation(tmp_path: Path, cifar: nn.Module) -> None:
    state = cifar.state_dict()
    foreign = saved(tmp_path / "ldam.pth", {"state_dict": renamed(state, "classifier", "linear")})
    own = saved(tmp_path / "own.pth", state)
    assert str(list(CIFAR.mean)) in load("resnet32", foreign).preprocessing.describe()
    with pytest.raises(UserError, match="--normalize: these images are not in memory"):
        load("resnet32", own)


def test_backbone_alone_and_other_widths_and_channels(tmp_path: Path) -> None:
    wide = trained(MODELS.make("resnet20(width=4)", 1, CLASSES))
    path = saved(tmp_path / "grey.pth", without(wide.state_dict(), "classifier"))
    encoder = load("resnet20(width=4)", path, wishes=Wishes(normalize="none"))
    assert encoder.preprocessing.channels == 1
    assert encoder.classifier is None
    x = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(encoder.features(x), wide.features(x))


def test_safetensors_and_half_precision(tmp_path: Path, cifar: nn.Module) -> None:
    half = {name: t.half() if t.is_floating_point() else t for name, t in cifar.state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    encoder = load("resnet32", tmp_path / "half.safetensors", wishes=Wishes(normalize="none"))
    assert encoder.features(torch.rand(1, 3, 32, 32)).dtype == torch.float32
    assert encoder.weights == "half.safetensors"


def test_torchvision_and_timm_models_take_another_number_of_classes(tmp_path: Path) -> None:
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=CLASSES)
    path = saved(tmp_path / "shuffle.pth", {"state_dict": prefixed("module.", trained(model).state_dict())})
    encoder = load("torchvision:shufflenet_v2_x0_5", path)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        close(encoder.classifier.logits(encoder.features(x)), model(x))

    timm = pytest.importorskip("timm")
    model = trained(timm.create_model("test_resnet", num_classes=CLASSES))
    path = saved(tmp_path / "timm.pth", model.state_dict())
    encoder = load("timm:test_resnet", path)
    with torch.no_grad():
        close(encoder.classifier.logits(encoder.features(x)), model(x))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda s: without(s, "layer3"),
            r"does not fit resnet32: keys: 50 missing \('layer3.0.conv1.weight', .* and 47 more\)",
        ),
        (lambda s: s | {"layer3.5.conv1.weight": torch.zeros(2, 2)}, r"keys: 1 surplus \('layer3.5.conv1.weight'\)"),
        (
            lambda s: s | {"conv1.weight": torch.zeros(64, 3, 3, 3)},
            r"1 of another shape \('conv1.weight' is \[64, 3, 3, 3\], not \[16, 3, 3, 3\]\)",
        ),
        (lambda s: {"a": torch.zeros(1)}, r"\d+ missing \(.*\), 1 surplus \('a'\)"),
        (lambda s: {"epoch": 3}, "holds no tensors; at the top it has 'epoch'"),
        (lambda s: {}, "holds no tensors; at the top it has nothing"),
        (lambda s: [1, 2], "holds a list; save the model's state_dict"),
        (lambda s: {"state_dict_model": s, "state_dict_block": {}}, "extra block .* is not supported"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, cifar: nn.Module, change: Callable, says: str) -> None:
    path = saved(tmp_path / "bad.pth", change(cifar.state_dict()))
    with pytest.raises(UserError, match=says) as caught:
        load("resnet32", path, wishes=Wishes(normalize="none"))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


class Bomb:
    """Unpickling it would make a folder."""

    def __init__(self, victim: Path) -> None:
        self.victim = str(victim)

    def __reduce__(self):
        return os.mkdir, (self.victim,)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path, cifar: nn.Module) -> None:
    victim = tmp_path / "executed"
    path = saved(tmp_path / "bomb.pth", {"state_dict": {}, "extra": Bomb(victim)})
    with pytest.raises(
        UserError, match=r"holds posix.mkdir, and only tensors are unpickled; save the model's state_dict"
    ):
        checkpoints.read(path)
    path.write_bytes(pickle.dumps(Bomb(victim)))
    with pytest.raises(UserError, match=r"bomb.pth"):
        checkpoints.read(path)
    whole = saved(tmp_path / "whole.pth", cifar)
    with pytest.raises(UserError, match=r"holds tailscope.networks.resnets.CifarResNet"):
        checkpoints.read(whole)
    assert not victim.exists()


def test_damaged_checkpoints(tmp_path: Path, cifar: nn.Module) -> None:
    path = saved(tmp_path / "c.pth", cifar.state_dict())
    content = path.read_bytes()
    for damaged in (b"", b"no checkpoint at all", content[:100], content[: len(content) // 2], content[:-50]):
        path.write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"c.pth: (not a readable checkpoint|is no checkpoint|the file is empty)"
        ) as caught:
            checkpoints.read(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"--checkpoint .*absent.pth: no such file"):
        checkpoints.read(tmp_path / "absent.pth")
    (tmp_path / "c.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"c.safetensors"):
        checkpoints.read(tmp_path / "c.safetensors")


def test_numbers_that_numpy_1_pickled_are_harmless(tmp_path: Path, cifar: nn.Module) -> None:
    path = saved(tmp_path / "old.pth", {"state_dict": cifar.state_dict(), "best": np.float64(1.5)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    members[pickled] = members[pickled].replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in members[pickled]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert checkpoints.read(path).at("state_dict").keys() == cifar.state_dict().keys()
