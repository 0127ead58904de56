"""Losses on angles, distances and features: their formulas, one sample at a time in double precision, and training."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tailscope.data.sources import load
from tailscope.errors import UserError
from tailscope.experiments.stages import Stages
from tailscope.methods import LOSSES
from tailscope.methods.mixing import Mix
from tailscope.networks import LAST_LAYERS
from tailscope.networks.last_layers import as_linear
from tailscope.seeds import keyed
from tailscope.store import Store
from tailscope.training.objective import Objective
from tailscope.training.recipes import COMPUTES, RECIPES
from training_setups import CPU, digits, stage1_spec

COUNTS = torch.tensor([500, 60, 60, 7, 1])
GENERATOR = torch.Generator().manual_seed(0)
ANGLES = math.pi * torch.rand(60, 5, generator=GENERATOR, dtype=torch.float64)
DISTANCES = 4 * torch.rand(60, 5, generator=GENERATOR, dtype=torch.float64)
LOGITS = 3 * torch.randn(60, 5, generator=GENERATOR, dtype=torch.float64)
FEATURES = torch.randn(60, 6, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.arange(60) % 5


def scores(call):
    """Return what a loss is given for logits, float64 [60, 5]."""
    needs = LOSSES.needs(call)
    return ANGLES.cos() if "cosine" in needs else DISTANCES if "distance" in needs else LOGITS


def made(call, counts=COUNTS):
    """Return (logits, labels, features, progress) -> losses, and the loss itself."""
    needs = LOSSES.needs(call)
    with keyed(0):
        loss = LOSSES.make(call, counts, *((6,) if "features" in needs else ()))

    def losses(logits, labels=LABELS, features=FEATURES, progress=0.5):
        offered = {"features": features.to(logits.dtype), "progress": torch.tensor(progress)}
        return loss(logits, labels, **{name: value for name, value in offered.items() if name in needs})

    return losses, loss


@pytest.fixture
def in_double_precision(monkeypatch):
    """Losses compute in float32, which differences are too coarse for."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# -- formulas --------------------------------------------------------------------------------------------------------


def of_softmax(values, y):
    top = max(values)
    return -math.log(math.exp(values[y] - top) / sum(math.exp(value - top) for value in values))


def with_own(cosines, y, own, scale):
    return of_softmax([scale * (own if k == y else c) for k, c in enumerate(cosines)], y)


def cosface(cosines, y, x, margin=0.35, scale=64):
    return with_own(cosines, y, cosines[y] - margin, scale)


def arcface(cosines, y, x, margin=0.5, scale=64):
    turned = math.acos(cosines[y]) + margin
    own = math.cos(turned) if turned <= math.pi else cosines[y] - margin * math.sin(margin)
    return with_own(cosines, y, own, scale)


def psi(angle, margin):
    k = math.floor(margin * angle / math.pi)
    return (-1) ** k * math.cos(margin * angle) - 2 * k


def sphereface(cosines, y, x, margin=4, scale=30, least=5, progress=0.5):
    a = max(least, 1000 / (1 + 0.12 * 28_000 * progress))
    own = (a * cosines[y] + psi(math.acos(cosines[y]), margin)) / (1 + a)
    return with_own(cosines, y, own, scale)


def uncertainty_margin(cosines, y, x, scale=30, margin=1):
    return with_own(cosines, y, psi(math.acos(cosines[y]), margin), scale)


def center(logits, y, x, weight=0.003):
    return of_softmax(logits, y) + weight / 2 * sum(v * v for v in x)  # centres are at 0 to begin with


def prototypes(distances, y, x, gamma=1, weight=0.001):
    return of_softmax([-gamma * d for d in distances], y) + weight * distances[y]


CASES = [
    ("cosface", cosface),
    ("cosface(margin=0.1, scale=8)", lambda c, y, x: cosface(c, y, x, 0.1, 8)),
    ("arcface", arcface),
    ("arcface(margin=1, scale=8)", lambda c, y, x: arcface(c, y, x, 1, 8)),
    ("sphereface", sphereface),
    ("sphereface(margin=2.5, scale=8, least=0)", lambda c, y, x: sphereface(c, y, x, 2.5, 8, 0)),
    ("uncertainty_margin", uncertainty_margin),  # nothing is measured yet
    ("center", center),
    ("center(weight=1)", lambda z, y, x: center(z, y, x, 1)),
    ("convolutional_prototypes", prototypes),
    ("convolutional_prototypes(gamma=0.5, weight=0.1)", lambda d, y, x: prototypes(d, y, x, 0.5, 0.1)),
]


@pytest.mark.parametrize(("call", "formula"), CASES, ids=[call for call, _ in CASES])
def test_loss_is_its_formula(call, formula):
    given = scores(call)
    got = made(call)[0](given.float()).detach().numpy()
    rows = zip(given.tolist(), LABELS.tolist(), FEATURES.tolist(), strict=True)
    np.testing.assert_allclose(got, [formula(*row) for row in rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [entry.name for entry in LOSSES if entry.plugin is None])
def test_gradients_are_finite_differences(name, in_double_precision):
    given, labels = scores(name)[:10].clone().requires_grad_(), LABELS[:10]
    features = FEATURES[:10].clone().requires_grad_()
    inputs = (given, features) if "features" in LOSSES.needs(name) else (given,)

    def value(z, x=features):
        return made(name)[0](z, labels, x)  # anew, for what it may remember

    if name == "uncertainty_margin":  # margins come from the batch's predictions, which they are no function of
        value, loss = made(name)
        loss.uncertainty.copy_(torch.linspace(0, 1, 5))
        loss._measure = lambda *_: None
        inputs = (scores(name).clone().requires_grad_(),)

    assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize("name", ["center", "uncertainty_margin"])
def test_the_order_of_classes_means_nothing_with_features_either(name):
    order = torch.tensor([2, 0, 4, 3, 1])
    given = scores(name).float().requires_grad_()
    permuted = made(name, COUNTS[order])[0](given[:, order], order.argsort()[LABELS])
    torch.testing.assert_close(made(name)[0](given), permuted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "limit"),
    [
        ("center(weight=0)", lambda z: z),
        ("convolutional_prototypes(weight=0)", lambda d: -d),
        ("arcface(margin=0, scale=9)", lambda c: 9 * c),
        ("cosface(margin=0, scale=9)", lambda c: 9 * c),
        ("uncertainty_margin(strength=0, scale=9)", lambda c: 9 * c),
        ("sphereface(margin=1, scale=9)", lambda c: 9 * c),
    ],
)
def test_without_margin_and_pull_it_is_cross_entropy(call, limit):
    given = scores(call)
    expected = nn.functional.cross_entropy(limit(given), LABELS, reduction="none").float()
    torch.testing.assert_close(made(call)[0](given.float()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "library", "options"),
    [
        ("arcface", "ArcFaceLoss", {"margin": math.degrees(0.5), "scale": 64}),
        ("cosface", "CosFaceLoss", {"margin": 0.35, "scale": 64}),
        ("sphereface(margin=4, least=0)", "SphereFaceLoss", {"margin": 4, "scale": 1}),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its use of NumPy
def test_margins_are_those_of_pytorch_metric_learning(call, library, options):
    """Which has weight vectors of its own; here the network's last layer has them."""
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="PyTorch Metric Learning is not installed")
    theirs = getattr(losses, library)(5, 6, **options)
    layer = LAST_LAYERS.make("cosine", nn.Linear(6, 5))
    layer.weight.data.copy_(theirs.W.detach().T)
    x = 30 * nn.functional.normalize(FEATURES.float())  # their SphereFace scales by this length
    expected = theirs.compute_loss(x, LABELS, None, x, LABELS)["loss"]["losses"]
    got = made(call)[0](layer.cosines(x), features=x, progress=1e9)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# -- what they remember and learn ------------------------------------------------------------------------------------


def test_uncertainty_is_a_running_mean_of_entropies_and_widens_the_margin():
    losses, loss = made("uncertainty_margin(strength=0.5, scale=3, rate=0.25)")
    cosines = ANGLES.cos()
    p = torch.softmax(3 * cosines, 1)
    entropy = (-(p * p.log()).sum(1) / math.log(5)).tolist()
    known = [0.0] * 4
    for first in (0, 20):
        rows = [row for row in range(first, first + 20) if row % 5 < 4]  # of class 4 nothing comes
        got = losses(cosines[rows].float().requires_grad_(), LABELS[rows])
        for k in range(4):
            mine = [entropy[row] for row in rows if row % 5 == k]
            known[k] += 0.25 * (sum(mine) / len(mine) - known[k])
        margins = [1 + 0.5 * known[row % 5] for row in rows]
        expected = [
            uncertainty_margin(cosines[row].tolist(), row % 5, None, 3, margin)
            for row, margin in zip(rows, margins, strict=True)
        ]
        np.testing.assert_allclose(got.detach(), expected, rtol=1e-4)
    np.testing.assert_allclose(loss.uncertainty, [*known, 0], rtol=1e-5)
    losses(cosines.float())  # where nothing is learnt nothing is measured
    np.testing.assert_allclose(loss.uncertainty, [*known, 0], rtol=1e-5)


def test_centres_move_as_published_whatever_the_weight():
    for weight in (0, 1):
        losses, loss = made(f"center(weight={weight})")
        loss.centers.data.copy_(torch.arange(30).reshape(5, 6))
        labels = torch.tensor([0, 0, 0, 3])
        losses(LOGITS[:4].float(), labels, FEATURES[:4]).mean().backward()
        before = loss.centers.detach().double().numpy()
        for k in range(5):
            mine = [FEATURES[row].numpy() for row in range(4) if labels[row] == k]
            step = sum((before[k] - x for x in mine), np.zeros(6)) / (1 + len(mine))
            np.testing.assert_allclose(loss.centers.grad[k], step, rtol=1e-5, atol=1e-6)


def test_prototypes_decide_by_distance_and_are_a_linear_layer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = LAST_LAYERS.make("prototypes(gamma=0.7)", nn.Linear(6, 5))
    x, at = FEATURES.float(), layer.weight.detach().double().numpy()
    expected = [[((row - prototype) ** 2).sum() for prototype in at] for row in FEATURES.numpy()]
    np.testing.assert_allclose(layer.distances(x).detach(), expected, rtol=1e-5)
    torch.testing.assert_close(layer(x), -0.7 * layer.distances(x))
    weight, bias = as_linear(layer)
    shared = layer(x) - (x @ weight.T + bias)
    torch.testing.assert_close(shared, shared[:, :1].expand(60, 5), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.distances(x), layer.distances(x.float()))
        assert layer(x).dtype == torch.float32


MIXED = Mix(labels=torch.full((60,), 0.3), partner=torch.arange(60).flip(0))
ON_FEATURES = ("arcface", "cosface", "sphereface", "center", "convolutional_prototypes")


@pytest.mark.parametrize("name", ON_FEATURES)
def test_the_labels_of_mixed_images_share_the_loss(name):
    needs = [COMPUTES[need][1] for need in LOSSES.needs(name) if need in COMPUTES]
    spec = stage1_spec(digits(), loss=name, last_layer=needs[0] if needs else "linear")
    objective = Objective(spec, COUNTS.tolist(), 6, 0, torch.device("cpu"))
    objective.at(0.5)
    given, x = scores(name).float(), FEATURES.float()
    own, other = (objective._each(given, x, labels, None) for labels in (LABELS, LABELS.flip(0)))
    torch.testing.assert_close(objective(given, x, LABELS, MIXED), (0.3 * own + 0.7 * other).mean())


def test_mixed_images_are_refused_where_they_mean_nothing():
    recipe = RECIPES["demo"].with_methods(loss="uncertainty_margin", last_layer="cosine")
    data = stage1_spec(digits()).data
    assert recipe.backbone(data).loss.startswith("uncertainty_margin")
    with pytest.raises(UserError, match="means nothing for mixed images"):
        recipe.backbone(data, mix=True)


@pytest.mark.parametrize("last_layer", ["linear", "cosine"])
def test_distances_need_a_last_layer_of_prototypes(last_layer):
    said = rf"needs a network that ends in distances, and the last layer {last_layer}.*take the last layer prototypes\("
    with pytest.raises(UserError, match=said):
        RECIPES["demo"].with_methods(loss="convolutional_prototypes", last_layer=last_layer)


@pytest.mark.parametrize(
    "call",
    [
        *("arcface(margin=2)", "arcface(scale=0)", "cosface(margin=-1)", "cosface(scale=0)"),
        *("sphereface(margin=0.5)", "sphereface(scale=0)", "sphereface(least=-1)", "center(weight=-1)"),
        *("uncertainty_margin(strength=-1)", "uncertainty_margin(scale=0)", "uncertainty_margin(rate=0)"),
        *("convolutional_prototypes(gamma=0)", "convolutional_prototypes(weight=-1)"),
    ],
)
def test_hyperparameters_out_of_range_are_named(call):
    with pytest.raises(UserError, match=call.split("(")[0]):
        made(call)


@pytest.mark.parametrize("name", [*ON_FEATURES, "uncertainty_margin"])
def test_a_backbone_learns_digits_with_its_defaults(name, tmp_path):
    """A tenth is chance, which a loss without the last layer that it needs falls to."""
    lab = Stages(load("digits"), Store(tmp_path), CPU)
    needs = [COMPUTES[need][1] for need in LOSSES.needs(name) if need in COMPUTES]
    recipe = RECIPES["demo"].with_methods(loss=name, last_layer=needs[0] if needs else None)
    lt = lab.long_tailed("exp:20", "nested", 0)
    short = recipe.backbone(lt.spec).model_copy(update={"train": recipe.stage1.model_copy(update={"steps": 150})})
    backbone = lab.backbone(short, lt.rows, 0, name)
    assert lab.correct(backbone, backbone.weight, backbone.bias).mean() > 0.6
