"""A classifier put into a checkpoint: the same file but for one layer, in whatever container, type and kind."""

import argparse
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import get_model

from tailscope.encoders.checkpoints import Layer
from tailscope.encoders.loading import load
from tailscope.encoders.patching import replace_classifier
from tailscope.encoders.preprocessing import Wishes
from tailscope.errors import UserError
from tailscope.networks import MODELS
from tailscope.tables.table import LinearLayer

CLASSES, WIDTH = 4, 6
AT = Layer(("state_dict",), "module.fc.weight", "module.fc.bias")


class Options:
    """Of the user's own code: nobody else can unpickle it."""

    def __init__(self):
        self.rate = 0.1


def state(dtype=torch.float32, prefix="module."):
    torch.manual_seed(0)
    network = nn.ModuleDict({"conv": nn.Conv2d(3, WIDTH, 3), "fc": nn.Linear(WIDTH, CLASSES)}).to(dtype)
    return {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}


def classifier(rows=CLASSES, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(rows, WIDTH, generator=generator), torch.randn(rows, generator=generator)
    return LinearLayer.from_arrays(scale * weight, scale * bias)


def flat(content, where=()):
    """Return every leaf of nested dictionaries and lists by its path."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    found = {}
    for key, value in items:
        nested = isinstance(value, dict | list)
        found |= flat(value, (*where, key)) if nested else {(*where, key): value}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_everything_else_stays_and_the_layer_is_the_new_one(tmp_path, dtype):
    options = argparse.Namespace(lr=0.1, name="run")
    held = {"state_dict": state(dtype), "epoch": 7, "args": options, "optimizer": {"state": [torch.arange(5)]}}
    torch.save(held, tmp_path / "c.pth")
    before = (tmp_path / "c.pth").read_bytes()
    new = classifier()
    replace_classifier(tmp_path / "c.pth", AT, new, tmp_path / "out.pth")
    assert (tmp_path / "c.pth").read_bytes() == before
    found = flat(torch.load(tmp_path / "out.pth", weights_only=False))
    wanted = flat(held)
    assert list(found) == list(wanted)
    for path, value in wanted.items():
        if path == ("state_dict", AT.weight):
            assert torch.equal(found[path], new.weight.to(dtype))
        elif path == ("state_dict", AT.bias):
            assert torch.equal(found[path], new.bias.to(dtype))
        elif isinstance(value, torch.Tensor):
            assert torch.equal(found[path], value)
            assert found[path].dtype == value.dtype
        else:
            assert found[path] == value
    assert zipfile.ZipFile(tmp_path / "out.pth").testzip() is None


def test_objects_of_the_users_own_classes_survive_unread(tmp_path):
    torch.save({"state_dict": state(), "options": Options()}, tmp_path / "c.pth")
    replace_classifier(tmp_path / "c.pth", AT, classifier(), tmp_path / "out.pth")
    held = torch.load(tmp_path / "out.pth", weights_only=False)
    assert held["options"].rate == 0.1
    assert torch.equal(held["state_dict"][AT.weight], classifier().weight)


@pytest.mark.parametrize("where", [(), ("model",), ("list", "1", "net")])
def test_at_any_depth(tmp_path, where):
    held = state()
    for key in reversed(where):
        held = {key: held} if not key.isdecimal() else [{}, held]
    torch.save(held, tmp_path / "c.pth")
    replace_classifier(tmp_path / "c.pth", AT._replace(where=where), classifier(), tmp_path / "out.pth")
    found = flat(torch.load(tmp_path / "out.pth", weights_only=True))
    assert any(torch.equal(value, classifier().weight) for value in found.values() if value.ndim == 2)


def test_a_copy_of_the_weights_beside_it_stays(tmp_path):
    """A second network, an average of the first, has the same values in storages of its own."""
    torch.save({"state_dict": state(), "ema": state()}, tmp_path / "c.pth")
    replace_classifier(tmp_path / "c.pth", AT, classifier(), tmp_path / "out.pth")
    held = torch.load(tmp_path / "out.pth", weights_only=True)
    assert torch.equal(held["ema"][AT.weight], state()[AT.weight])
    assert torch.equal(held["state_dict"][AT.weight], classifier().weight)


def test_a_slice_of_a_larger_storage_is_replaced_in_its_place(tmp_path):
    whole = torch.randn(3 * CLASSES, WIDTH)
    held = {"state_dict": state() | {AT.weight: whole[CLASSES : 2 * CLASSES]}, "whole": whole}
    torch.save(held, tmp_path / "c.pth")
    replace_classifier(tmp_path / "c.pth", AT, classifier(), tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True)["whole"]
    assert torch.equal(found[CLASSES : 2 * CLASSES], classifier().weight)
    assert torch.equal(found[:CLASSES], whole[:CLASSES])
    assert torch.equal(found[2 * CLASSES :], whole[2 * CLASSES :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_with_their_metadata(tmp_path, dtype):
    save_file(state(dtype), tmp_path / "c.safetensors", metadata={"format": "pt", "note": "kept"})
    at = AT._replace(where=())
    replace_classifier(tmp_path / "c.safetensors", at, classifier(), tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in state(dtype).items()}
    assert torch.equal(found[at.weight], classifier().weight.to(dtype))
    assert torch.equal(found["module.conv.weight"], state(dtype)["module.conv.weight"])
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}


def old_kind(path):
    torch.save({"state_dict": state()}, path, _use_new_zipfile_serialization=False)


def turned(path):
    torch.save({"state_dict": state() | {AT.weight: torch.randn(WIDTH, CLASSES).t()}}, path)


def plain(path):
    torch.save({"state_dict": state(torch.float16)}, path)


@pytest.mark.parametrize(
    ("write", "layer", "new", "says"),
    [
        (old_kind, AT, classifier(), "PyTorch's old kind of file; load it and torch.save it again"),
        (turned, AT, classifier(), "'module.fc.weight' is stored turned round"),
        (plain, AT, classifier(rows=5), r"is \[4, 6\], the new classifier's \[5, 6\]"),
        (plain, AT, classifier(scale=1e9), "is float16, which cannot hold the new classifier"),
        (plain, AT._replace(bias=None), classifier(), "has no bias beside it, which the new classifier needs"),
    ],
)
def test_what_cannot_be_patched_is_said_and_nothing_is_written(tmp_path, write, layer, new, says):
    write(tmp_path / "c.pth")
    with pytest.raises(UserError, match=says):
        replace_classifier(tmp_path / "c.pth", layer, new, tmp_path / "out.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def test_nothing_is_replaced_silently(tmp_path):
    plain(tmp_path / "c.pth")
    with pytest.raises(UserError, match="is there already"):
        replace_classifier(tmp_path / "c.pth", AT, classifier(), tmp_path / "c.pth")


def build(name: str) -> nn.Module:
    if name.startswith("timm:"):
        return pytest.importorskip("timm").create_model(name.removeprefix("timm:"), num_classes=CLASSES)
    if name.startswith("torchvision:"):
        return get_model(name.removeprefix("torchvision:"), num_classes=CLASSES)
    return MODELS.make(name, 3, CLASSES)


@pytest.mark.parametrize("name", ["resnet20", "timm:resnet10t", "torchvision:shufflenet_v2_x0_5"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_patched_network_gives_the_new_logits(tmp_path: Path, name: str, suffix: str) -> None:
    """What is loaded from the patched file by its own library computes the new classifier on the same features."""
    network = build(name).eval()
    path, out = tmp_path / f"w.{suffix}", tmp_path / f"new.{suffix}"
    if suffix == "safetensors":
        save_file(network.state_dict(), path)
    else:
        torch.save({"model": network.state_dict()}, path)
    encoder = load(name, path, wishes=Wishes(normalize="cifar"))
    assert encoder.layer is not None
    new = LinearLayer.from_arrays(torch.randn(CLASSES, encoder.width), torch.randn(CLASSES))
    replace_classifier(path, encoder.layer, new, out)
    network.load_state_dict(load_file(out) if suffix == "safetensors" else torch.load(out, weights_only=True)["model"])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(network(x), new.logits(encoder.features(x)), atol=1e-4)
