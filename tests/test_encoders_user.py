"""Encoders that the user's own module makes: `module:factory`."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from image_trees import draw
from tailscope.device import Runtime
from tailscope.encoders import Options, load, run_features
from tailscope.encoders.preprocessing import Wishes
from tailscope.errors import UserError

CPU = Runtime(torch.device("cpu"), torch.bfloat16)

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

# Networks that are told apart by what they give: each is `body` (images -> [B, 6]) and something on top.
KINDS = """
import sys
import warnings
import torch
from collections import OrderedDict
from torch import nn
from torch.nn import functional as F

class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
    def forward(self, x):
        return self.conv(x).relu().mean((2, 3))

class Ends(nn.Module):
    def __init__(self, end, **layers):
        super().__init__()
        self.body, self.end = Body(), end
        for name, layer in layers.items():
            self.add_module(name, layer)
    def forward(self, x):
        return self.end(self, self.body(x))

class NormedLinear(nn.Module):
    def __init__(self, d, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(d, classes))
    def forward(self, x):
        return F.normalize(x, dim=1) @ F.normalize(self.weight, dim=0)

class ModelOutput(OrderedDict):
    def __getattr__(self, name):
        return self[name]

fc = lambda: nn.Linear(6, 4)
def logits(): return Ends(lambda m, x: m.fc(x), fc=fc())
def softmax(): return Ends(lambda m, x: m.fc(x).softmax(1), fc=fc())
def log_softmax(): return Ends(lambda m, x: F.log_softmax(m.fc(x), 1), fc=fc())
def temperature(): return Ends(lambda m, x: 30 * m.fc(x), fc=fc())
def pair(): return Ends(lambda m, x: (m.fc(x), x), fc=fc())
def dictionary(): return Ends(lambda m, x: {"logits": m.fc(x), "loss": None}, fc=fc())
def embedding(): return Ends(lambda m, x: F.normalize(m.project(x), dim=1), project=nn.Linear(6, 5))
def unit_fc(): return Ends(lambda m, x: F.normalize(m.fc(x), dim=1), fc=fc())
def sigmoid(): return Ends(lambda m, x: m.fc(x).sigmoid(), fc=fc())
def scaled(): return Ends(lambda m, x: m.fc(x) * m.scales.weight, fc=fc(), scales=nn.Embedding(1, 4))
def adjusted(): return Ends(lambda m, x: m.classifier(x) + torch.linspace(0, 5, 4), classifier=fc())
def behind_fc(): return Ends(lambda m, x: torch.cat([x, m.fc(x).sigmoid()], 1), fc=fc())
def pooler(): return Ends(lambda m, x: ModelOutput(last_hidden_state=x[:, None].repeat(1, 3, 1), pooler_output=x))
def maps_and_pooled():
    return Ends(lambda m, x: ModelOutput(a=x[..., None, None] + torch.ones(2, 2), b=x[..., None, None]))
def named(): return Ends(lambda m, x: {"logits": m.cosine(x), "features": x}, cosine=NormedLinear(6, 4))
def two(): return Ends(lambda m, x: (x, x + 1))
def text(): return Ends(lambda m, x: "text")
def cosine(): return Ends(lambda m, x: m.classifier(x), classifier=NormedLinear(6, 1000))
def cosine_top(): return Ends(lambda m, x: 16 * m.top(x), top=NormedLinear(6, 4))
def convolution():
    return nn.Sequential(OrderedDict(body=nn.Conv2d(3, 6, 3), classifier=nn.Sequential(
        nn.Conv2d(6, 1000, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())))
def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(nn.Sequential(Body(), fc()).eval(), torch.rand(2, 3, 32, 32))
def parameter(): return Ends(lambda m, x: x @ m.w.weight.T, w=nn.Embedding(4, 6))
def half(): return logits().half()
def double(): return logits().double()
def wrapped(): return nn.DataParallel(logits())
def meta():
    with torch.device("meta"):
        return logits()
def batch_statistics(): return nn.Sequential(Body(), nn.BatchNorm1d(6, track_running_stats=False), nn.Flatten())
class AlwaysTraining(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(True)
def always_training(): return nn.Sequential(Body(), AlwaysTraining(6), nn.Flatten())
def dropout(): return Ends(lambda m, x: F.dropout(x, 0.5))
def nan(): return Ends(lambda m, x: x / 0 * 0)
def exits(): sys.exit("usage: train.py --config FILE")
def lazy():
    from absent_package import nothing
def unpaired(): return logits(), 5
def fails():
    def end(m, x):
        raise IndexError("no such layer\\n" + "x" * 999)
    return Ends(end)
def grey(): return nn.Sequential(nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_encoders.py").write_text(OWN)
    (tmp_path / "helper_beside.py").write_text("SIZE = 4")
    (tmp_path / "kinds.py").write_text(KINDS)
    (tmp_path / "slip.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    yield
    for name in ("my_encoders", "helper_beside", "kinds", "transforms"):
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
        ("my_encoders:broken", r"KeyError: 'weights.pt' \(my_encoders.py line 39\)"),
        ("slip:f", r"SyntaxError: .* \(slip.py line 1\)"),
        ("kinds:lazy", r"ModuleNotFoundError: No module named 'absent_package' \(kinds.py line \d+\)"),
        ("kinds:exits", r"SystemExit: usage: train.py --config FILE \(kinds.py line \d+\)"),
        ("kinds:unpaired", "returned a int as its transform, which cannot be called"),
        ("kinds:text", "returns no tensors, and it is not clear which are features"),
        ("kinds:two", r"returns output\[0\] \[2, 6\], output\[1\] \[2, 6\], and it is not clear"),
        ("kinds:cosine", r"ends in classifier \(NormedLinear\), which is no nn.Linear: the output is logits"),
        ("kinds:convolution", r"ends in classifier \(Sequential\), which is no nn.Linear: the output is logits"),
        ("kinds:scripted", r"ends in 1 \(Linear\), which is no nn.Linear"),
        ("kinds:meta", "'body.conv.weight' lies on the meta device: the network has no weights"),
        ("kinds:batch_statistics", "the same image has other features in another batch"),
        ("kinds:always_training", "the same image has other features in another batch"),
        ("kinds:dropout", "the same image has other features in another batch"),
        ("kinds:nan", "its features of an image of noise are NaN or infinite"),
        ("kinds:fails", r"IndexError: no such layer x{100,} \(kinds.py line \d+\); try --image-size"),
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


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize("name", ["logits", "softmax", "log_softmax", "temperature", "pair", "dictionary", "wrapped"])
@pytest.mark.parametrize("classes", [4, 1000])
def test_features_are_what_the_last_linear_layer_sees_however_the_output_is_wrapped(name: str, classes: int) -> None:
    encoder = load(f"kinds:{name}", classes=classes)
    x = torch.rand(3, 3, 32, 32)
    body = encoder.model.body
    assert (encoder.width, encoder.how) == (6, "input of fc")
    torch.testing.assert_close(encoder.features(x), body(x))
    assert (encoder.classifier is not None) == (name != "temperature")  # whose logits are others


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("name", "how", "width"),
    [
        ("embedding", "output", 5),
        ("unit_fc", "output", 4),
        ("behind_fc", "output", 10),
        ("pooler", "output['pooler_output']", 6),
        ("maps_and_pooled", "output['b']", 6),
        ("named", "output['features']", 6),
    ],
)
def test_the_pooled_part_of_an_output_is_taken_and_said(name: str, how: str, width: int) -> None:
    encoder = load(f"kinds:{name}", classes=11)
    assert (encoder.how, encoder.width, encoder.classifier) == (how, width, None)
    x = torch.rand(3, 3, 32, 32)
    if how != "output":
        torch.testing.assert_close(encoder.features(x), encoder.model.body(x))
        assert any(f"the features are {how} of the model" in note for note in encoder.notes)
    else:
        assert any("the features are the model's output; if those are logits" in note for note in encoder.notes)


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(("name", "layer"), [("sigmoid", "fc"), ("scaled", "fc"), ("adjusted", "classifier")])
@pytest.mark.parametrize("classes", [None, 10])
def test_logits_that_were_changed_are_no_features(name: str, layer: str, classes: int | None) -> None:
    with pytest.raises(UserError, match=f"kinds:{name}: its output is as wide as {layer}, 4, and is made from it"):
        load(f"kinds:{name}", classes=classes)


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize("name", ["cosine_top", "parameter"])
def test_as_many_outputs_as_classes_are_logits(name: str) -> None:
    with pytest.raises(UserError, match="its output has 4 values, as many as the data has classes: these are logits"):
        load(f"kinds:{name}", classes=4)
    assert load(f"kinds:{name}", classes=5).width == 4


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(("name", "dtype"), [("half", "float16"), ("double", "float64")])
def test_weights_of_another_precision_compute_in_float32(name: str, dtype: str) -> None:
    encoder = load(f"kinds:{name}")
    assert encoder.features(torch.rand(2, 3, 32, 32)).dtype == torch.float32
    assert f"kinds:{name}: its {dtype} weights compute in float32" in encoder.notes


@pytest.mark.usefixtures("own_module")
def test_a_change_of_the_factorys_source_is_another_encoder() -> None:
    before = load("kinds:logits").spec()
    path = Path("kinds.py")
    path.write_text(path.read_text() + "\n# and now with another forward\n")
    sys.modules.pop("kinds")
    after = load("kinds:logits").spec()
    assert before["source_sha256"] != after["source_sha256"]
    assert before["preprocessing"] == after["preprocessing"]


TRANSFORMS = """
import numpy as np
import torch
from torch import nn
from torchvision.transforms import v2
from kinds import logits

to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
small = v2.Compose([v2.Resize((16, 16)), to_tensor])
def shorter(): return logits(), v2.Compose([v2.Resize(32), to_tensor])
def array(): return logits(), lambda image: np.zeros((3, 8, 8), "f4")
def integers(): return logits(), lambda image: small(image).mul(255).byte()
def batched(): return logits(), lambda image: small(image)[None]
def dictionary(): return logits(), lambda image: {"pixel_values": small(image)}
def nothing(): return logits(), lambda image: None
def double(): return logits(), lambda image: small(image).double()
def fails():
    def transform(image):
        if image.width == 51:
            raise RuntimeError("bad\\nluck")
        return small(image)
    return logits(), transform
def later():
    def transform(image):
        if image.width == 53:
            return small(image)[:, :8]
        return small(image)
    return logits(), transform
"""


@pytest.fixture
def transforms(own_module: None, tmp_path: Path) -> Path:
    (tmp_path / "transforms.py").write_text(TRANSFORMS)
    return tmp_path


def run(folder: Path, model: str, data: Path, **options):
    return run_features(model, f"folder:{data}", folder / "f.npz", runtime=CPU, **options)


SEVERAL = {"ant/a.png": (40, 32), "ant/b.png": (64, 48), "bee/c.png": (50, 70)}


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        (
            "shorter",
            r"its transform makes inputs of several sizes: .*\[3, 44, 32\] of bee/c.png.*\[3, 32, 40\] of ant/a.png",
        ),
        ("array", r"its transform returns a ndarray; it must return a tensor of floats \[C, H, W\]"),
        ("integers", "its transform returns a tensor of uint8; it must"),
        ("batched", r"its transform returns a tensor \[1, 3, 16, 16\]; it must"),
        ("dictionary", "its transform returns a dict; it must"),
        ("nothing", "its transform returns a NoneType; it must"),
    ],
)
def test_transforms_that_do_not_fit_are_found_before_the_work(transforms: Path, factory: str, says: str) -> None:
    for path, size in SEVERAL.items():
        draw(transforms / "data" / path, size=size)
    with pytest.raises(UserError, match=rf"transforms:{factory}: {says}") as caught:
        run(transforms, f"transforms:{factory}", transforms / "data")
    assert "\n" not in str(caught.value)
    assert not (transforms / "f.npz.shards").exists()


def test_a_transform_may_compute_in_double(transforms: Path) -> None:
    draw(transforms / "data" / "ant" / "a.png")
    draw(transforms / "data" / "bee" / "a.png")
    assert run(transforms, "transforms:double", transforms / "data").rows == 2


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning", "ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("factory", "says"),
    [
        (
            "fails",
            r"fails on an image of 51 x 10 pixels: RuntimeError: bad luck \(transforms.py line \d+\): ant/19.png$",
        ),
        ("later", r"makes inputs of several sizes: \[3, 16, 16\] of ant/20.png, \[3, 8, 16\] of ant/21.png; resize"),
    ],
)
def test_transforms_that_fail_later_say_where(transforms: Path, factory: str, says: str, workers: int) -> None:
    for i in range(40):
        draw(transforms / "data" / "ant" / f"{i:02}.png", size=(32 + i, 10))
    options = Options(batch=4, workers=workers)
    with pytest.raises(UserError, match=says) as caught:
        run(transforms, f"transforms:{factory}", transforms / "data", options=options)
    assert "\n" not in str(caught.value)


def test_options_that_a_transform_of_ones_own_would_ignore_are_refused(transforms: Path) -> None:
    for wishes in ({"image_size": 32}, {"resize": 32}, {"normalize": "cifar"}):
        option = f"--{next(iter(wishes)).replace('_', '-')}"
        with pytest.raises(
            UserError, match=f"{option} .*: my_encoders:plain brings a transform of its own; change that"
        ):
            load("my_encoders:plain", wishes=Wishes(**wishes))


def test_the_cases_by_command_line(transforms: Path, tailscope_) -> None:
    for path, size in SEVERAL.items():
        draw(transforms / "data" / path, size=size)
    for factory, says in [("shorter", "[3, 32, 40] of ant/a.png"), ("absent", "no attribute 'absent'")]:
        done = tailscope_("features", "--model", f"transforms:{factory}", "--data", "folder:data", "--out", "f.npz")
        assert done.code == 2
        assert says in done.err
        assert done.err.count("\n") == 1
