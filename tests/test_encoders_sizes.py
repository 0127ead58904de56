"""What a network is shown: sizes and normalisation by its weights, by the data, or as asked; and what is said of it."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.models import get_model_weights

from image_trees import draw
from tailscope.device import Runtime
from tailscope.encoders import load, run_features
from tailscope.encoders.preprocessing import Wishes
from tailscope.errors import UserError
from tailscope.networks import MODELS
from tailscope.tables.table import FeatureTable

CPU = Runtime(torch.device("cpu"), torch.bfloat16)

FACTORY = """
import torch
from tailscope.networks import MODELS

def make(name="resnet8", channels=3):
    model = MODELS.make(name, channels, 5)
    model.load_state_dict(torch.load("weights.pth", weights_only=True))
    return model
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module whose factory makes a network for small images, with weights that the field would have trained."""
    (tmp_path / "own.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("own", None)


def weights(folder: Path, channels: int = 3) -> None:
    torch.manual_seed(0)
    state = MODELS.make("resnet8", channels, 5).state_dict()
    torch.save(state, folder / "weights.pth")
    renamed = {name.replace("classifier", "linear"): t for name, t in state.items()}  # as LDAM-DRW calls it
    torch.save({"state_dict": renamed}, folder / "ldam.pth")


def arrays(folder: Path, size: tuple[int, int], channels: int = 3) -> str:
    rng = np.random.default_rng(0)
    parts = {
        f"{split}_images": rng.integers(0, 256, (20, *size, channels), dtype=np.uint8) for split in ("train", "test")
    }
    np.savez(folder / "data.npz", **parts, train_labels=np.arange(20) % 5, test_labels=np.arange(20) % 5)
    return str(folder / "data.npz")


def extracted(model: str, data: str, folder: Path, **options) -> tuple[Tensor, str]:
    out = folder / f"{len(list(folder.iterdir()))}.npz"
    done = run_features(model, data, out, runtime=CPU, **options)
    return FeatureTable.load(out).features, " ".join(done.warnings)


def test_the_same_weights_give_the_same_features_by_name_and_by_factory(own: Path) -> None:
    """A network for 32 pixels that was shown 224 scored 14.8 % where the same weights by name scored 69.6 %."""
    weights(own)
    data = arrays(own, (32, 32))
    by_name, _ = extracted("resnet8", data, own, checkpoint=own / "ldam.pth", split="test")
    by_factory, said = extracted("own:make", data, own, split="test")
    assert torch.equal(by_name, by_factory)
    assert (
        "own:make: the images stay 32 x 32 pixels, as all are, and are normalised with the mean and deviation of CIFAR"
        in said
    )
    assert "--image-size, --resize and --normalize change that" in said
    asked, said = extracted("own:make", data, own, split="test", resize=256, image_size=224, normalize="imagenet")
    assert not torch.allclose(asked, by_factory)
    assert "are resized to 256 and cropped to 224 and are normalised by --normalize imagenet" in said
    assert "change that" not in said  # which was done already


def test_files_of_one_small_size_stay_as_they_are(own: Path) -> None:
    weights(own)
    for i in range(6):
        draw(own / "data" / "ab"[i % 2] / f"{i}.png", seed=i, size=(40, 24))
    features, said = extracted("own:make", f"folder:{own / 'data'}", own)
    assert (
        "the images stay 40 x 24 pixels, as all are, and are normalised with the mean and deviation of ImageNet" in said
    )
    model = MODELS.make("resnet8", 3, 5).eval()
    model.load_state_dict(torch.load(own / "weights.pth", weights_only=True))
    pixels = np.stack([np.asarray(Image.open(own / "data" / "ab"[i % 2] / f"{i}.png")) for i in (0, 2, 4, 1, 3, 5)])
    normalised = (pixels / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = model.features(torch.tensor(normalised).permute(0, 3, 1, 2).float())
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [[(200, 180)] * 3, [(32, 32), (32, 33), (32, 32)]])
def test_larger_images_and_images_of_several_sizes_go_imagenets_way(own: Path, sizes: list) -> None:
    weights(own)
    for i, size in enumerate(sizes):
        draw(own / "data" / "ab"[i % 2] / f"{i}.png", seed=i, size=size)
    _, said = extracted("own:make", f"folder:{own / 'data'}", own)
    assert "own:make: the images are resized to 256 and cropped to 224" in said


def test_grey_images_in_memory_keep_their_channel_and_statistics(own: Path) -> None:
    weights(own, channels=1)
    _, said = extracted("own:make(channels=1)", arrays(own, (28, 28), channels=1), own, split="test")
    assert "stay 28 x 28 pixels, as all are, and are normalised with the mean and deviation of the data" in said


def noise(width: int = 300, height: int = 200) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("published", ["IMAGENET1K_V1", "IMAGENET1K_V2"])
def test_the_preset_follows_the_weights_that_are_asked_for(published: str) -> None:
    oracle = get_model_weights("resnet50")[published].transforms()
    encoder = load(f"torchvision:resnet50.{published}")
    torch.testing.assert_close(encoder.preprocessing(noise()), oracle(noise()), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"resnet50.V3: no such weights; known: IMAGENET1K_V1, IMAGENET1K_V2"):
        load("torchvision:resnet50.V3")


def test_resize_gives_the_preprocessing_of_the_original_weights(tmp_path: Path) -> None:
    torch.save(torchvision.models.mobilenet_v3_large(num_classes=3).state_dict(), tmp_path / "c.pth")
    plain = load("torchvision:mobilenet_v3_large", tmp_path / "c.pth")
    oracles = {
        name: get_model_weights("mobilenet_v3_large")[f"IMAGENET1K_{name}"].transforms() for name in ("V1", "V2")
    }
    torch.testing.assert_close(plain.preprocessing(noise()), oracles["V2"](noise()), rtol=0, atol=1e-6)
    assert plain.notes == (
        "torchvision:mobilenet_v3_large: the images are resized to 232 and cropped to 224, IMAGENET1K_V2's; "
        "other weights of it were made for --resize 256",
    )
    asked = load("torchvision:mobilenet_v3_large", tmp_path / "c.pth", wishes=Wishes(resize=256))
    torch.testing.assert_close(asked.preprocessing(noise()), oracles["V1"](noise()), rtol=0, atol=1e-6)
    assert asked.notes == ()


@pytest.mark.parametrize("model", ["timm:test_resnet", "torchvision:mobilenet_v3_small", "resnet10(width=4)"])
def test_resize_and_crop_by_hand(model: str) -> None:
    image = noise()
    made = load(model, wishes=Wishes(resize=100, image_size=64, normalize="none")).preprocessing(image)
    assert made.shape == (3, 64, 64)
    scaled = image.resize((150, 100), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.asarray(scaled)[18:82, 43:107].copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(made, expected, rtol=0, atol=2.1 / 255)
    none = load(model, wishes=Wishes(resize="none", normalize="none")).preprocessing(noise(96, 80))
    torch.testing.assert_close(none, torch.from_numpy(np.asarray(noise(96, 80)).copy()).permute(2, 0, 1) / 255)
    middle = load(model, wishes=Wishes(resize="none", image_size=64, normalize="none")).preprocessing(noise(96, 80))
    assert torch.equal(middle, none[:, 8:72, 16:80])


def test_timms_own_sizes_are_those_of_resize() -> None:
    config = timm.data.resolve_model_data_config(timm.create_model("test_resnet"))
    own = load("timm:test_resnet").preprocessing(noise())
    torch.testing.assert_close(load("timm:test_resnet", wishes=Wishes(resize=168)).preprocessing(noise()), own)
    assert config["crop_pct"] == 0.95


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"resize": 0}, "--resize 0: expected the pixels"),
        ({"resize": "half"}, "--resize half: expected the pixels of the shorter side, or none"),
        ({"resize": -3}, "--resize -3"),
        ({"resize": 100}, "--resize 100: the crop of 224 pixels is larger; give --image-size 100 or less"),
        ({"resize": 100, "image_size": 101}, "--resize 100: the crop of 101 pixels is larger; make it smaller"),
    ],
)
def test_sizes_that_cannot_be(wishes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load("torchvision:mobilenet_v3_small", wishes=Wishes(**wishes))


def test_no_resizing_of_files_needs_one_size(tmp_path: Path) -> None:
    for i, size in enumerate([(32, 32), (48, 40)]):
        draw(tmp_path / "data" / "ab"[i] / "0.png", size=size)
    with pytest.raises(UserError, match=r"may differ in size, .* as they are; give --image-size"):
        extracted("torchvision:mobilenet_v3_small", f"folder:{tmp_path / 'data'}", tmp_path, resize="none")
    features, _ = extracted(
        "torchvision:mobilenet_v3_small", f"folder:{tmp_path / 'data'}", tmp_path, resize="none", image_size=32
    )
    assert len(features) == 2


@pytest.mark.parametrize(
    ("model", "wishes", "mend"),
    [
        ("torchvision:vit_b_16", {"image_size": 64}, "leave out --image-size 64"),
        ("timm:vit_tiny_patch16_224", {"image_size": 64}, "leave out --image-size 64"),
        ("timm:vit_tiny_patch16_224", {"resize": 99, "image_size": 64}, "leave out --image-size 64 and --resize 99"),
    ],
)
def test_a_network_that_takes_one_size_alone_is_not_advised_to_take_another(
    model: str, wishes: dict, mend: str
) -> None:
    with pytest.raises(UserError, match=rf"{model}: fails on an input of shape \[2, 3, 64, 64\]: .*; {mend}$"):
        load(model, wishes=Wishes(**wishes))


def test_resize_by_command_line(tmp_path: Path, tailscope_) -> None:
    draw(tmp_path / "data" / "a" / "0.png", size=(32, 32))
    draw(tmp_path / "data" / "b" / "0.png", size=(32, 32))
    base = ["features", "--model", "resnet10(width=4)", "--data", f"folder:{tmp_path / 'data'}"]
    for resize, code in [("none", 0), ("32", 2), ("big", 2)]:
        done = tailscope_(*base, "--resize", resize, "--out", tmp_path / f"{resize}.npz")
        assert (done.code, "--resize" in done.err) == (code, code == 2)
    done = tailscope_(*base, "--resize", "32", "--image-size", "32", "--out", tmp_path / "both.npz")
    assert done.code == 0
    assert torch.equal(
        FeatureTable.load(tmp_path / "both.npz").features, FeatureTable.load(tmp_path / "none.npz").features
    )
