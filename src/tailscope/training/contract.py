"""What every registered method promises, in small checks: of our own in the tests, of anybody's in `methods --check`.

A check makes what a call-string names, with small data that are the same every time, and raises `Broken` with the
reason where a promise is not kept.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tailscope.classifiers import CLASSIFIERS
from tailscope.data.images import ImageSet
from tailscope.device import Runtime
from tailscope.errors import UserError, foreign_code, unknown
from tailscope.methods import AUGMENTATIONS, LOSSES, MIXINGS, PHOTO_AUGMENTATIONS, SAMPLERS, WEIGHTS, augmentations
from tailscope.methods.mixing import Mix
from tailscope.networks import LAST_LAYERS, MODELS
from tailscope.networks.last_layers import as_linear
from tailscope.progress import Progress
from tailscope.registry import Registry, split_call
from tailscope.seeds import keyed, torch_stream
from tailscope.spec import DataSpec, StageSpec, TrainSpec
from tailscope.training import REGISTRIES, SCHEDULES
from tailscope.training.extract import fit_classifier
from tailscope.training.loop import Training, new_model
from tailscope.training.recipes import COMPUTES, PARAMETRISED
from tailscope.training.step import Normalizer

EVERY = (*REGISTRIES.values(), PARAMETRISED)
"""The registries whose methods can be checked."""
COUNTS = (18, 8, 4, 2)
"""Images of each class, for checks that train: two batches of 16."""


class Broken(UserError):
    """A method does not keep a promise; the message says which and how."""


@dataclass(frozen=True)
class Check:
    """A promise in words, and the function of a call-string that raises where it is not kept."""

    promise: str
    run: Callable[[str], None]


CHECKS: dict[str, list[Check]] = {registry.kind: [] for registry in EVERY}
"""The checks of each kind of method, in the order in which they run."""


@dataclass(frozen=True)
class Outcome:
    """Whether a method keeps a promise; `reason` says why not."""

    kind: str
    call: str
    promise: str
    passed: bool
    reason: str | None


def check(call: str) -> list[Outcome]:
    """Check everything that is registered under a name, with the values of a call-string.

    Raises:
        UserError: nothing has the name (the known are listed), or none that has it takes these values.
    """
    name = split_call(call, "method")[0]
    having = [registry for registry in EVERY if name in {entry.name for entry in registry}]
    if not having:
        raise unknown("method", name, sorted({entry.name for registry in EVERY for entry in registry}))
    spelled, refused = dict[str, str](), list[UserError]()
    for registry in having:
        try:
            spelled[registry.kind] = registry.canonical(call)
        except UserError as error:
            refused.append(error)
    if not spelled:
        raise refused[0]
    return [outcome(kind, written, one) for kind, written in spelled.items() for one in CHECKS[kind]]


def outcome(kind: str, call: str, one: Check) -> Outcome:
    """Run one check; whatever the method raises is a promise that it does not keep."""
    try:
        with foreign_code("it raises"):
            run(one, call)
    except UserError as error:
        return Outcome(kind, call, one.promise, False, str(error))
    return Outcome(kind, call, one.promise, True, None)


def run(one: Check, call: str) -> None:
    """Run one check, and see that nothing is drawn from the default generators, which others draw from too.

    Raises:
        Broken: the promise is not kept, or something was drawn there.
    """
    before, broken = _default_generators(), None
    try:
        one.run(call)
    except Broken as error:
        broken = error
    for library, state in _default_generators().items():
        _require(np.array_equal(before[library], state), f"it draws from the default generator of {library}")
    if broken is not None:
        raise broken


def _default_generators() -> dict[str, Any]:
    state = np.random.get_state(legacy=False)["state"]
    return {"PyTorch": torch.get_rng_state().numpy(), "NumPy": [*state["key"], state["pos"]]}


def _promise(promise: str, *registries: Registry[Any]) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    def add(function: Callable[[str], None]) -> Callable[[str], None]:
        for registry in registries:
            CHECKS[registry.kind].append(Check(promise, function))
        return function

    return add


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise Broken(reason)


def _generator(seed: int = 0) -> torch.Generator:
    return torch_stream(seed, "contract")


def _alike(values: Tensor, dtype: torch.dtype, shape: Sequence[int], what: str) -> None:
    _require(isinstance(values, Tensor), f"{what} are a {type(values).__name__}, not a tensor")
    found, wanted = (values.dtype, list(values.shape)), (dtype, list(shape))
    _require(found == wanted, f"{what} are {found[0]} {found[1]}, not {wanted[0]} {wanted[1]}")


# -- losses ---------------------------------------------------------------------------------------------------------


def _loss_of(call: str, counts: Sequence[int], logits: Tensor, labels: Tensor) -> Tensor:
    """Return losses [n]; what the loss needs besides is made up, the same every time."""
    needs, width = LOSSES.needs(call), 6
    with keyed(0):
        loss: Any = LOSSES.make(call, torch.tensor(counts), *((width,) if "features" in needs else ()))
    features = torch.randn(len(labels), width, generator=_generator(3))
    given = {"features": features, "progress": torch.tensor(0.5)}
    values: Tensor = loss(logits, labels, **{name: value for name, value in given.items() if name in needs})
    return values


@_promise("a loss is one float32 a sample, the same every time, of logits of any float type", LOSSES)
def _values_of_a_loss(call: str) -> None:
    labels = torch.randint(4, (32,), generator=_generator())
    for dtype in (torch.float32, torch.bfloat16):
        logits = (20 * torch.randn(32, 4, generator=_generator())).to(dtype)
        values = _loss_of(call, COUNTS, logits, labels)
        _alike(values, torch.float32, [32], f"losses of {dtype} logits")
        _require(torch.equal(values, _loss_of(call, COUNTS, logits, labels)), "the same logits give other losses")


@_promise("losses and gradients are finite, also of certain predictions, right or wrong", LOSSES)
def _finite_losses(call: str) -> None:
    certain = torch.tensor([[1e4, -1e4, 0, 0], [-1e4, 1e4, 0, 0]])
    random, labels = 20 * torch.randn(32, 4, generator=_generator()), torch.arange(32) % 4
    for logits, y in ((random, labels), (certain, torch.tensor([0, 1])), (certain, torch.tensor([1, 0]))):
        x = logits.clone().requires_grad_()
        values = _loss_of(call, COUNTS, x, y)
        _require(bool(values.isfinite().all()), f"a loss of logits up to {float(logits.abs().max()):g} is not finite")
        (gradient,) = torch.autograd.grad(values.sum(), x)
        _require(bool(gradient.isfinite().all()), "a gradient is not finite")
        _require(logits is certain or bool(gradient.abs().sum() > 0), "no gradient reaches the logits")


@_promise("classes without training images may have a column in the logits", LOSSES)
def _losses_without_images(call: str) -> None:
    logits = torch.randn(8, 6, generator=_generator()).requires_grad_()
    values = _loss_of(call, (*COUNTS, 0, 0), logits, torch.arange(8) % 4)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    _require(bool(values.isfinite().all() and gradient.isfinite().all()), "a loss or a gradient is not finite")


@_promise("the classes' order means nothing: counts, logits and labels in another order give the same losses", LOSSES)
def _permuted_losses(call: str) -> None:
    logits, labels = torch.randn(32, 4, generator=_generator()), torch.arange(32) % 4
    order = torch.tensor([2, 0, 3, 1])
    if "features" in LOSSES.needs(call):
        return  # it may have parameters of its own, a class each, which start at random
    values = _loss_of(call, COUNTS, logits, labels)
    permuted = _loss_of(call, torch.tensor(COUNTS)[order].tolist(), logits[:, order], order.argsort()[labels])
    _require(torch.allclose(values, permuted, rtol=1e-4, atol=1e-5), "classes in another order have other losses")


@_promise("two steps of stage 2 train a classifier on features with it", LOSSES)
def _loss_of_stage_2(call: str) -> None:
    labels = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))
    features = torch.eye(4)[labels] + torch.randn(len(labels), 4, generator=_generator())
    train = TrainSpec(steps=2, batch=16, learning_rate=0.1)
    stage = StageSpec(data=_data_spec(), train=train, loss=call, **_last_layer_for(call))
    fit_classifier(stage, [(features, labels)], COUNTS, 0)


def _last_layer_for(call: str) -> dict[str, Any]:
    """Return the field of a stage that a loss which needs cosines or distances needs."""
    known = [COMPUTES[need][1] for need in LOSSES.needs(call) if need in COMPUTES]
    return {"last_layer": LAST_LAYERS.canonical(known[0])} if known else {}


@_promise("weights are one float32 a class, never negative, 1 on average, and 1 where all classes are alike", WEIGHTS)
def _class_weights(call: str) -> None:
    for progress in (0.0, 0.5, 0.99):
        found = WEIGHTS.make(call, torch.tensor((*COUNTS, 0)))(torch.tensor(progress))
        _alike(found, torch.float32, [5], "weights")
        _require(bool((found.isfinite() & (found >= 0)).all()), "a weight is negative or not finite")
        alike = WEIGHTS.make(call, torch.full((5,), 9))(torch.tensor(progress))
        _require(torch.allclose(alike, torch.ones(5)), "classes with as many images as each other are weighted")


@_promise("features become logits, and a linear layer that decides alike can be had", LAST_LAYERS)
def _last_layer(call: str) -> None:
    with keyed(0):
        layer = LAST_LAYERS.make(call, nn.Linear(6, 4))
    features = 5 * torch.randn(50, 6, generator=_generator())
    logits = layer(features)
    _alike(logits, torch.float32, [50, 4], "logits")
    weight, bias = as_linear(layer)
    _require(torch.equal((features @ weight.T + bias).argmax(1), logits.argmax(1)), "as_linear() decides otherwise")
    if cosines := getattr(layer, "cosines", None):
        _require(bool(cosines(features).abs().max() <= 1 + 1e-6), "a cosine is larger than 1")


# -- samplers and mixings -------------------------------------------------------------------------------------------


@_promise("it draws as many images as asked for, of those that are there, the same for a generator", SAMPLERS)
def _draws_of_a_sampler(call: str) -> None:
    labels = torch.tensor([0, 1, 2, 4]).repeat_interleave(torch.tensor([40, 12, 5, 1]))  # classes 3 and 5 are empty
    moments: list[tuple[float, ...]] = [(0.0,), (0.99,)] if "progress" in SAMPLERS.needs(call) else [()]
    for n, moment in itertools.product((0, 1, len(labels), 200), moments):
        draw: Any = SAMPLERS.make(call, labels, 6)
        indices = draw(n, _generator(), *moment)
        _alike(indices, torch.int64, [n], f"{n} indices")
        _require(bool(((indices >= 0) & (indices < len(labels))).all()), f"of {len(labels)} images it draws others")
        again = draw(n, _generator(), *moment)
        _require(torch.equal(indices, again), "it draws other images from the same generator")


@_promise("weights lie in [0, 1], partners are of the batch, the same for a generator", MIXINGS)
def _draws_of_a_mixing(call: str) -> None:
    context = {"counts": torch.tensor(COUNTS), "hidden": 2}
    mixing: Any = MIXINGS.make(call, *(value for need, value in context.items() if need in MIXINGS.needs(call)))
    labels = torch.randint(4, (9, 32), generator=_generator(2))
    mix: Mix = mixing.draw(labels, (6, 8), _generator())
    _require(mix.labels is not None and mix.partner is not None, "labels are not mixed")
    shapes = {"images": (9, 32, 3, 6, 8), "labels": (9, 32), "partner": (9, 32), "hidden": (9, 2)}
    for part, tensor in mix._asdict().items():
        if tensor is None:
            continue
        kind = torch.int64 if part == "partner" else torch.float32
        _require(tensor.dtype == kind, f"{part} are {tensor.dtype}, not {kind}")
        _require(_broadcasts(tensor, shapes[part]), f"{part} are {list(tensor.shape)}, not as {list(shapes[part])}")
        top = 31 if part == "partner" else 1
        _require(bool(((tensor >= 0) & (tensor <= top)).all()), f"{part} do not lie in 0 ... {top}")
    again = mixing.draw(labels, (6, 8), _generator())
    drawn = [[t for t in one if t is not None] for one in (mix, again)]
    same = all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    _require(same, "the same generator gives other draws")


def _broadcasts(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Whether a tensor has a step for each of the shape's, and its other dimensions fit."""
    sizes = [1] * (len(shape) - tensor.ndim) + list(tensor.shape)
    return len(tensor) == shape[0] and all(size in (1, wanted) for size, wanted in zip(sizes, shape, strict=True))


# -- augmentations --------------------------------------------------------------------------------------------------

SHAPES = ((7, 8, 8, 1), (5, 32, 32, 3), (3, 12, 20, 3), (1, 8, 8, 3), (0, 8, 8, 3))


@_promise("images come out as uint8 of their shape, a new tensor, and the same for the same generator", AUGMENTATIONS)
def _augmented_images(call: str) -> None:
    for shape in SHAPES:
        images = torch.randint(256, shape, dtype=torch.uint8, generator=_generator(1))
        original = images.clone()
        out = AUGMENTATIONS.make(call)(images, _generator())
        _alike(out, torch.uint8, shape, f"images {list(shape)}")
        _require(out.is_contiguous(), "images are not contiguous in memory")
        _require(torch.equal(images, original), "it writes into the images that it is given")
        again = AUGMENTATIONS.make(call)(images, _generator())
        _require(torch.equal(out, again), "the same generator gives other images")


@_promise(
    "an RGB image comes out, the same for a seed of the default generator",
    PHOTO_AUGMENTATIONS,
)
def _augmented_photos(call: str) -> None:
    pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8, generator=_generator()).numpy()
    made, out = [], torch.empty(0)
    for _ in range(2):
        with keyed(0):
            made.append(PHOTO_AUGMENTATIONS.make(call)(Image.fromarray(pixels.copy())))
            out = augmentations.training(["resized_crop(size=32)", call])(Image.fromarray(pixels))
    _require(isinstance(made[0], Image.Image), f"a {type(made[0]).__name__} comes out, not an image of Pillow")
    _require(made[0].mode == "RGB", f"an image of mode {made[0].mode} comes out")
    _require(made[0].tobytes() == made[1].tobytes(), "the same seed gives another image")
    _require(out.dtype == torch.uint8 and out.shape[2] == 3, f"pixels are {out.dtype} {list(out.shape)}")


# -- networks, schedules, recipes -----------------------------------------------------------------------------------


@_promise(
    "forward(x) is classifier(features(x)), and features(x) are as wide as feature_dim says",
    MODELS,
)
def _parts_of_a_model(call: str) -> None:
    for channels in (1, 3):
        model = new_model(call, channels, 4, seed=0).eval()
        x = torch.randn(5, channels, 32, 32, generator=_generator())
        with torch.no_grad():
            features, logits = model.features(x), model(x)
            _alike(features, torch.float32, [5, model.feature_dim], "features(x)")
            _alike(logits, torch.float32, [5, 4], "forward(x)")
            _require(isinstance(model.classifier, nn.Module), "classifier is no module")
            close = torch.allclose(logits, model.classifier(features), rtol=1e-4, atol=1e-5)
            _require(close, "forward(x) is not classifier(features(x))")
            alone = model.features(x[:1])
            _require(torch.allclose(alone, features[:1], rtol=1e-3, atol=1e-4), "features depend on the batch")
        state = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        layer = {"classifier.weight": [4, model.feature_dim], "classifier.bias": [4]}
        found = {name: state.get(name) for name in layer}
        _require(found == layer, f"its state has {found}, not {layer}")


@_promise("the same seed gives the same first weights, another seed others", MODELS)
def _weights_of_a_model(call: str) -> None:
    first, again, other = (new_model(call, 3, 4, seed).state_dict() for seed in (0, 0, 1))
    _require(all(torch.equal(first[name], again[name]) for name in first), "the same seed gives other weights")
    _require(any(not torch.equal(first[name], other[name]) for name in first), "every seed gives the same weights")


@_promise("there is one finite multiplier a step, none negative, some positive", SCHEDULES)
def _multipliers_of_a_schedule(call: str) -> None:
    for steps, per_epoch in ((1, 1), (7, 3), (1000, 10)):
        rates = SCHEDULES.make(call, steps, per_epoch)
        _require(len(rates) == steps, f"{len(rates)} multipliers for {steps} steps")
        _require(all(np.isfinite(rates)) and min(rates) >= 0, "a multiplier is negative or not finite")
        _require(max(rates) > 0, f"with {steps} steps nothing is ever learnt")


# -- classifiers on features ----------------------------------------------------------------------------------------


@_promise(
    "it is fitted to labels of any kind, tells classes that lie apart, the same every time",
    CLASSIFIERS,
)
def _fits_of_a_classifier(call: str) -> None:
    codes = np.repeat(np.arange(4), COUNTS)
    X = (8 * np.eye(4, 6)[codes] + np.random.default_rng(0).normal(size=(len(codes), 6))).astype(np.float32)
    for labels in (codes, np.array(["ant", "bee", "cat", "dog"])[codes]):
        model = CLASSIFIERS.make(call)
        _require(model.fit(X, labels) is model, "fit() does not return the classifier")
        logits, probabilities = model.logits(X), model.predict_proba(X)
        _require(np.shape(logits) == np.shape(probabilities) == (len(X), 4), "logits(X) are not [N, classes]")
        _require(bool(np.isfinite(logits).all()), "logits are not finite")
        _require(np.allclose(np.sum(probabilities, axis=1), 1, atol=1e-4), "probabilities do not add up to 1")
        predicted = model.predict(X)
        _require(set(predicted) <= set(labels), "predict(X) gives other labels than fit() was given")
        right = float((predicted == labels).mean())
        _require(right > 0.75, f"of samples that it was fitted to and that lie apart it gets {right:.0%} right")
        again = CLASSIFIERS.make(call).fit(X, labels).logits(X)
        _require(np.allclose(logits, again, rtol=1e-5, atol=1e-6), "fitted again it is another")


@_promise("it keeps the values that it is given, as scikit-learn's estimators do", CLASSIFIERS)
def _copies_of_a_classifier(call: str) -> None:
    from sklearn.base import clone

    model, values = CLASSIFIERS.make(call), CLASSIFIERS.parse(call)[1]
    found = {name: model.get_params(deep=False).get(name) for name in values}
    _require(found == values, f"its parameters are {found}, not {values}")
    _require(clone(model).get_params(deep=False) == model.get_params(deep=False), "clone() changes its parameters")


# -- training -------------------------------------------------------------------------------------------------------


def _images() -> ImageSet:
    labels = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))
    noise = torch.randint(0, 100, (len(labels), 32, 32, 3), generator=_generator())
    return ImageSet((noise + 50 * labels[:, None, None, None]).to(torch.uint8), labels, ("ant", "bee", "cat", "dog"))


def _data_spec() -> DataSpec:
    return DataSpec(
        name="contract",
        fingerprint="",
        profile="full",
        protocol="nested",
        subset_seed=0,
        indices_sha256="",
        counts=COUNTS,
    )


class _Stopped(Exception):
    pass


class _OneEpoch(Progress):
    """Progress that ends a training when its second epoch begins."""

    def __init__(self) -> None:
        self.epochs = 0

    def safe_point(self) -> None:
        self.epochs += 1
        if self.epochs > 1:
            raise _Stopped


def _trained(stage: StageSpec, scratch: Path, progress: Progress) -> dict[str, Tensor]:
    images, runtime = _images(), Runtime(torch.device("cpu"), torch.float32, "eager", progress)
    return Training(stage, images, Normalizer.of(images.images), 0, runtime, scratch, "contract").run()[0]


def _resumes(stage: StageSpec) -> None:
    """Train two epochs of two steps, at once and with a break."""
    with TemporaryDirectory() as one, TemporaryDirectory() as other:
        whole = _trained(stage, Path(one), Progress())
        with suppress(_Stopped):
            _trained(stage, Path(other), _OneEpoch())
        resumed = _trained(stage, Path(other), Progress())
    differing = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    _require(not differing, f"interrupted and started again it ends with other weights ({', '.join(differing[:3])})")


def _stage(**changes: Any) -> StageSpec:
    train = TrainSpec(**{"epochs": 2, "batch": 16, "learning_rate": 0.01, **changes.pop("train", {})})
    return StageSpec(**{"data": _data_spec(), "train": train, "model": "resnet8(width=4)", **changes})


_FIELDS: tuple[tuple[Registry[Any], Callable[[str], dict[str, Any]]], ...] = (
    (MODELS, lambda call: {"model": call}),
    (LAST_LAYERS, lambda call: {"last_layer": call}),
    (LOSSES, lambda call: {"loss": call, **_last_layer_for(call)}),
    (WEIGHTS, lambda call: {"weights": call}),
    (SAMPLERS, lambda call: {"sampler": call}),
    (AUGMENTATIONS, lambda call: {"augment": (call,)}),
    (MIXINGS, lambda call: {"mix": call}),
    (REGISTRIES["pre-training tasks"], lambda call: {"task": call}),
    (SCHEDULES, lambda call: {"train": {"schedule": call}}),
)

_TRAINS = "a backbone trains with it, and an interrupted training goes on to the same weights"


def _trains(registry: Registry[Any], changes: Callable[[str], dict[str, Any]]) -> None:
    @_promise(_TRAINS, registry)
    def trains(call: str) -> None:
        _resumes(_stage(**changes(call)))


def _is_spelled(registry: Registry[Any]) -> None:
    @_promise("written out with all values its call-string is read as itself; one line says what it is", registry)
    def is_spelled(call: str) -> None:
        entry, values = registry.parse(call)
        spelled = registry.canonical(call)
        _require(registry.parse(spelled)[1] == values, f"{spelled} is read as other values")
        _require(bool(entry.summary.strip()), "it has no docstring")


for _registry, _changes in _FIELDS:
    _trains(_registry, _changes)
for _registry in EVERY:
    _is_spelled(_registry)


@_promise("both stages can be made of it; a backbone trains by it, unless it is for files", PARAMETRISED)
def _trains_by_a_recipe(call: str) -> None:
    recipe = PARAMETRISED.make(call)
    stage1, stage2 = recipe.backbone(_data_spec(), mix=True, autoaugment=True), recipe.classifier(_data_spec())
    _require(stage2.views is not None and stage1.model is not None, "a stage is not complete")
    if recipe.augment[:1] and recipe.augment[0].startswith("resized_crop"):
        return
    train = stage1.train.model_copy(update={"epochs": 2, "steps": None, "batch": 16})
    _resumes(stage1.model_copy(update={"train": train}))
