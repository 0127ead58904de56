"""Encoders that the user's own module makes: `module:factory`."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tailscope.encoders import load
from tailscope.encoders.preprocessing import Wishes
from tailscope.errors import UserError

OWN = '''
import torch
from torch import nn
from helper_beside import SIZE

class WithMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.top = nn.Linear(3 * SIZE * SIZE, 5), nn.Linear(5, 4)
    def features(self, x):
        return self.body(x.flatten(1)).relu()
    def forward(self, x):
        return self.top(self.features(x))

class Headless(nn.Module):
    """Ends in a product that is no layer, as CLIP's image encoders do."""
    def __init__(self):
        super().__init__()
        self.body, self.projection = nn.Linear(3 * SIZE * SIZE, 5), nn.Parameter(torch.ones(5, 2))
    def forward(self, x):
        return self.body(x.flatten(1)) @ self.projection

def transform(image):
    return torch.full((3, SIZE, SIZE), image.size[0] / 100)

def plain(hidden=6):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, hidden), nn.ReLU(), nn.Linear(hidden, 4)), transform
def with_method():
    return WithMethod(), transform
def headless():
    return Headless(), transform
def own_size():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 4))
def maps():
    return nn.Conv2d(3, 2, 1)
def pairs():
    return "model", "transform"
def broken():
    raise KeyError("weights.pt")
'''


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_encoders.py").write_text(OWN)
    (tmp_path / "helper_beside.py").write_text("SIZE = 4")
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    yield
    for name in ("my_encoders", "helper_beside"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("own_module")
def test_factories_of_the_user() -> None:
    before = list(sys.path)
    x = torch.rand(3, 3, 4, 4)

    plain = load("my_encoders:plain(hidden=9)")
    assert (plain.width, plain.how) == (9, "input of 3")
    torch.testing.assert_close(plain.classifier.logits(plain.features(x)), plain.model(x))
    assert plain.preprocessing(Image.new("RGB", (50, 40))).unique().tolist() == [0.5]

    method = load("my_encoders:with_method")
    assert (method.width, method.how) == (5, "features(x)")
    torch.testing.assert_close(method.classifier.logits(method.features(x)), method.model(x))

    headless = load("my_encoders:headless")
    assert (headless.width, headless.how, headless.classifier) == (2, "output", None)
    assert torch.equal(headless.features(x), headless.model(x))

    sized = load("my_encoders:own_size", wishes=Wishes(image_size=24, normalize="none"))
    assert sized.preprocessing(Image.new("RGB", (300, 200))).shape == (3, 24, 24)
    assert sized.width == 3 * 24 * 24
    assert sys.path == before


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_encoders:absent", "AttributeError: module 'my_encoders' has no attribute 'absent'"),
        ("no_such_module:make", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("my_encoders:broken", "KeyError: 'weights.pt'"),
        ("my_encoders:pairs", "returned a str, not a torch.nn.Module"),
        ("my_encoders:maps", r"its features are \[2, 2, 224, 224\], not \[B, d\]"),
        ("my_encoders:own_size", r"fails on an input of shape \[2, 3, 224, 224\]: RuntimeError.*; try --image-size$"),
        ("my_encoders:plain(hidden=open('x'))", "factory .* expected a name or a call with plain values"),
        ("my_encoders:", "factory ''"),
    ],
)
def test_factories_that_fail(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        load(name)
    assert "\n" not in str(caught.value)
