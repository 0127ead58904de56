"""Encoders of every kind of name: penultimate features against hooks, preprocessing against the libraries' own."""

import socket
import sys
import time
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model_weights

from tailscope.encoders import load, networks
from tailscope.encoders.networks import last_linear
from tailscope.encoders.preprocessing import CIFAR, IMAGENET, Normalization, Wishes
from tailscope.errors import UserError
from tailscope.networks import MODELS


def noise(width: int = 300, height: int = 200, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to rounding, of sums as large as the largest."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def input_of(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """Oracle: what a forward hook of PyTorch sees enter the layer."""
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_vit3", "test_convnext", "test_efficientnet", "test_byobnet"]
)
def test_timm_features_are_what_its_classifier_sees(name: str) -> None:
    encoder = load(name if name == "test_vit" else f"timm:{name}")
    x = torch.rand(2, 3, 160, 160)
    oracle = input_of(encoder.model, encoder.model.pretrained_cfg["classifier"], x)
    close(encoder.features(x), oracle)
    assert encoder.width == oracle.shape[1]
    assert encoder.classifier is None
    assert "weights are random" in encoder.notes[0]


def test_timm_preprocessing_is_timms_own() -> None:
    encoder = load("test_resnet")
    config = timm.data.resolve_model_data_config(encoder.model)
    oracle = timm.data.create_transform(**config, is_training=False)
    assert torch.equal(encoder.preprocessing(noise()), oracle(noise()))
    assert encoder.preprocessing(noise()).shape == (3, 160, 160)
    smaller = load("test_resnet", wishes=Wishes(normalize="cifar", image_size=64))
    assert smaller.preprocessing(noise()).shape == (3, 64, 64)
    assert "0.4914" in smaller.preprocessing.describe()


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small", "regnet_x_400mf", "mnasnet0_5"])
def test_torchvision_features_are_what_its_classifier_sees(name: str) -> None:
    encoder = load(f"torchvision:{name}")
    x = torch.rand(2, 3, 64, 64)
    close(encoder.features(x), input_of(encoder.model, last_linear(encoder.model), x))


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "efficientnet_b1", "swin_t"])
def test_torchvision_preprocessing_is_that_of_its_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = get_model_weights(name)["DEFAULT"].transforms()
    monkeypatch.setattr(networks, "get_model", lambda *_, **__: nn.Linear(1, 1))  # building it takes seconds
    built = networks.from_torchvision(name, False, Wishes())
    torch.testing.assert_close(built.preprocessing(noise()), oracle(noise()), rtol=0, atol=1e-6)
    assert networks.from_torchvision(name, False, Wishes(image_size=99)).preprocessing(noise()).shape == (
        3,
        99,
        99,
    )


# One of each family; the regnets cannot be built without memory, so one is built above.
FAMILIES = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_16",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_linear_layer_of_torchvisions_models_is_their_classifier(name: str) -> None:
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, num_classes=13, **options)
    layer = last_linear(model)
    assert (layer is None) == name.startswith("squeezenet")
    if layer is not None:
        assert model.get_submodule(layer).out_features == 13
        assert not layer.startswith(("aux", "Aux"))


@pytest.mark.parametrize("name", ["resnet32", "resnet8", "resnet10(width=8)"])
def test_our_own_models(name: str) -> None:
    encoder = load(name, wishes=Wishes(normalize="none"))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(encoder.features(x), encoder.model.features(x))
    assert encoder.how == "features(x)"
    pixels = encoder.preprocessing(noise(32, 32))
    if name == "resnet10(width=8)":
        assert pixels.shape == (3, 224, 224)
    else:
        np.testing.assert_allclose(pixels.permute(1, 2, 0) * 255, np.asarray(noise(32, 32)), atol=1e-4)


def test_random_weights_are_the_same_everywhere_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = load("resnet8", wishes=Wishes(normalize="none"))
    assert torch.equal(torch.rand(3), expected)
    b = load("resnet8", wishes=Wishes(normalize="none"))
    assert a.spec() == b.spec()
    with torch.no_grad():
        next(b.model.parameters()).add_(1e-3)
    assert a.spec() != b.spec()


def test_the_mode_of_images_follows_the_channels() -> None:
    grey = load("resnet8", channels=1, wishes=Wishes(normalize="none"))
    assert grey.preprocessing(noise(8, 8)).shape == (1, 8, 8)
    colour = load("resnet8", channels=3, wishes=Wishes(normalize="none"))
    for mode in ("L", "RGBA", "P", "CMYK", "1", "LA"):
        assert colour.preprocessing(noise(8, 8, mode)).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("imagenet", IMAGENET),
        ("cifar", CIFAR),
        ("none", Normalization((0.0,) * 3, (1.0,) * 3)),
        ("0.5,0.25,0.125/1,2,3", Normalization((0.5, 0.25, 0.125), (1.0, 2.0, 3.0))),
        ("0.5/0.25", Normalization((0.5,) * 3, (0.25,) * 3)),
        ("data", Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),
        (None, IMAGENET),
    ],
)
def test_normalisations(wish: str | None, expected: Normalization) -> None:
    statistics = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert Wishes(wish, statistics=statistics).normalization(IMAGENET, 3) == expected


@pytest.mark.parametrize("wish", ["image", "0.5", "0.5/0", "0.5,0.5/0.1", "a/b", "0.1,0.2/0.1,0.2", "1/2/3", "nan/nan"])
def test_bad_normalisations(wish: str) -> None:
    with pytest.raises(UserError, match="--normalize"):
        Wishes(wish).normalization(IMAGENET, 3)
    with pytest.raises(UserError, match="--image-size 0"):
        Wishes(image_size=0)
    with pytest.raises(UserError, match=r"--normalize is needed.* 3 channels, the model takes 1"):
        Wishes().normalization(IMAGENET, 1)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet33", "timm:resnet33: timm .* has no such model"),
        ("timm:resnt50", r"timm .* has no such model; did you mean 'resnet50'\? known: resnet20"),
        ("torchvision:resnt50", r"no such classification model; did you mean 'resnet50'\?"),
        ("timm:nothing", "timm:nothing: timm"),
        ("torchvision:nothing", "has no such classification model"),
        ("torchvision:squeezenet1_1", "has no linear classifier; wrap it as module:factory"),
        ("resnet32(depth=3)", "unknown argument 'depth'"),
    ],
)
def test_unknown_models(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(name)


def test_timm_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        UserError, match=r"model 'vit_tiny': not one of resnet.*; for timm's, pip install 'tailscope\[timm\]'"
    ):
        load("vit_tiny")


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:shufflenet_v2_x0_5"])
@pytest.mark.parametrize("silent", [True, False])
def test_a_host_that_is_not_reached_is_said_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, silent: bool
) -> None:
    def connect(*_: object) -> None:
        time.sleep(60 * silent)  # as a name server does that drops what it is asked
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("tailscope.encoders.networks._CONNECT_SECONDS", 0.5)
    monkeypatch.setattr("socket.create_connection", connect)
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"{name}: no pretrained weights on this machine .*give a file with --check"):
        load(name, pretrained=True)
    assert time.monotonic() - started < 10


def test_a_machine_that_answers_is_reached_also_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.delenv("http_proxy", raising=False)
        assert networks._reachable(here)
        monkeypatch.setenv("http_proxy", here)
        assert networks._reachable("http://weights.invalid/x.pth")
    assert not networks._reachable(here)


def test_pretrained_weights_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_, **__):
        raise URLError("no route\nto host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    monkeypatch.setattr("tailscope.encoders.networks._reachable", lambda _: True)
    with pytest.raises(
        UserError, match=r"no pretrained weights on this machine .*no route to host.*; give .* --checkpoint"
    ):
        load("torchvision:shufflenet_v2_x0_5", pretrained=True)
    monkeypatch.setattr("timm.create_model", lambda *_, **__: offline())
    with pytest.raises(UserError, match=r"timm:test_resnet: no pretrained weights"):
        load("test_resnet", pretrained=True)
    for name in ("resnet32", "my:factory"):
        with pytest.raises(UserError, match="--pretrained: there are no published weights"):
            load(name, pretrained=True)
    with pytest.raises(UserError, match="--checkpoint and --pretrained"):
        load("resnet32", Path("x.pth"), pretrained=True)


def test_published_weights_in_torchvisions_cache_come_with_their_classifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = get_model_weights("shufflenet_v2_x0_5")["DEFAULT"]
    model = torchvision.models.shufflenet_v2_x0_5().eval()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(model.state_dict(), tmp_path / "hub" / "checkpoints" / Path(weights.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    encoder = load("torchvision:shufflenet_v2_x0_5", pretrained=True)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        close(encoder.classifier.logits(encoder.features(x)), model(x))
    assert encoder.weights == "pretrained"
    assert encoder.notes == ()


def test_every_registered_model_is_an_encoder() -> None:
    for entry in MODELS:
        small = f"{entry.name}(width=4)"
        assert load(small, wishes=Wishes(normalize="none")).width in (16, 32)
