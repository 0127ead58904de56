"""Methods compared on one data set: equally long training, the same subsets, the same rule for hyper-parameters.

Every method trains its backbone with the recipe's optimiser, steps and batches, on the long-tailed subset of each seed.
Methods that leave stage 1 alone share one backbone. The test images are read once a method and seed, after everything
about it is decided.

What a method does to the two gaps: with D* at hand, its backbone gets a classifier trained on D*. The accuracy of
true -> true less that is what its representation still lacks; that less its own accuracy is what its classifier
lacks. The two add up to the distance from true -> true.
"""

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, Self, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from tailscope.classifiers import CLASSIFIERS
from tailscope.classifiers.base import Diverged, fixed, take_base
from tailscope.diagnosis.remedies import Scored
from tailscope.errors import UserError, unknown
from tailscope.experiments import plans
from tailscope.experiments.hours import opened_for
from tailscope.experiments.options import Comparison, Request
from tailscope.experiments.runs import CALLS, Experiment, Run, Settings, evaluate, require_parts, spelled, training_sets
from tailscope.experiments.stages import SPENT, Backbone, Stages, TrainingSet
from tailscope.intervals import holm, p_of_zero, paired, summarize
from tailscope.methods.systems import Method, System, parse
from tailscope.networks.last_layers import as_sure
from tailscope.plugins import Plugin
from tailscope.registry import Registry, plugins_named
from tailscope.report import build
from tailscope.report.objects import Comparison as Compared
from tailscope.report.schema import PARTS
from tailscope.seeds import numpy_stream
from tailscope.spec import RunSpec, StageSpec
from tailscope.training.objective import Objective
from tailscope.training.recipes import Recipe, augmentations_of, with_plugins

Tune = Literal["none", "cut"]
Gaps = Literal["all", "bounds", "none"]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Floats = NDArray[np.floating[Any]]
Logits = Callable[[Tensor], Floats]
"""Features [n, d] -> logits [n, C]."""

CUT = 0.1
"""Share of each class's training images that hyper-parameters are chosen on."""

RULES: dict[Tune, str] = {
    "none": "hyper-parameters are those written in the method's name, else the published ones",
    "cut": "hyper-parameters that are not written out: the value with the best mean recall on a tenth of each class's"
    " training images (at least one, none of a class with one image), of a network trained without them, for each seed;"
    " ties go to the published value, then to the first. With it, the method is trained on all training images",
}


class CompareSettings(Settings):
    """What decides the result of a comparison; `options` says what each field means."""

    methods: str
    tune: Tune = "none"
    gaps: Gaps = "all"

    @classmethod
    def of(cls, request: Request) -> Self:
        """Return the part of a request that decides results; raise `UserError` where an option is wrong."""
        assert isinstance(request, Comparison)
        for name, known in (("tune", Tune), ("gaps", Gaps)):
            if (given := getattr(request, name)) not in get_args(known):
                raise unknown(f"--{name}", given, get_args(known))
        parse(request.methods, CLASSIFIERS)
        own: dict[str, Any] = {"methods": request.methods, "tune": request.tune, "gaps": request.gaps}
        return cls.model_validate({**dict(Settings.of(request)), **own})

    def parsed(self) -> list[Method]:
        """Return the methods, the baseline first."""
        return parse(self.methods, CLASSIFIERS)

    def plugins(self) -> list[Plugin]:
        """Return the code from outside the package that the recipe or a method names, each once, by name."""
        calls = [call for method in self.parsed() for call in _named(method, self.recipe)]
        found = {plugin.name: plugin for plugin in (*super().plugins(), *plugins_named(calls))}
        return [found[name] for name in sorted(found)]

    def spec(self, data: Any) -> dict[str, Any]:
        """Return what the result depends on, with every method written in full."""
        whole = super().spec(data)
        kept = {name: value for name, value in whole.items() if name not in ("matched", "permutations", "backbones")}
        return kept | {"methods": [{"name": method.name, "call": method.call} for method in self.parsed()]}


def _named(method: Method, recipe: Recipe) -> Iterator[tuple[Registry[Any], str]]:
    """Yield every call-string of a method with its registry: of what was asked for, and of what that changes."""
    system = method.system()
    yield from ((part.registry, part.call.removeprefix(f"{part.kind}:")) for part in method.parts)
    for stage in (system.stage1, system.stage2 or {}):
        yield from ((CALLS[name], call) for name, call in stage.items() if name in CALLS and call)
        yield from ((augmentations_of(recipe.augment), call) for call in stage.get("augment", ()))
    if system.classifier is not None:
        yield CLASSIFIERS, system.classifier


def run(request: Comparison) -> Compared:
    """Carry out what a request asks for, the comparison and its report, or only return the plan.

    Raises:
        UserError: an option, the data or OUT is not usable.
    """
    settings = CompareSettings.of(request)
    if request.plan:
        return Compared(plan(*opened_for(request, settings)))
    result = Compared(plans.run(request, ["compare"], settings, {"compare": compare}, _waves, _possible)["compare"])
    if request.out is not None:
        build(request.out)
    return result


def compare(stages: Stages, settings: CompareSettings) -> dict[str, Any]:
    """Train and score every method for every seed; return what `compare.json` holds."""
    experiment, found = Experiment(stages, settings), _Outcomes()
    for run, backbone in experiment.backbones(partial(_chosen_runs, stages, found)):
        assert isinstance(run, _Run)
        label = f"seed {run.seed}: {run.row}"
        if run.method is None:
            right = evaluate(stages, run, backbone, label)
            found.bounds[run.seed, run.backbone_key if run.encoder != "true" else "true"] = right
        else:
            found.add(run, backbone, _scored(stages, run, backbone, label, found.notes))
    result = experiment.header("compare")
    labels, methods = stages.data.test.labels.numpy(), settings.parsed()
    unlabelled = len(stages.data.train) - sum(result["counts"])
    result["warnings"] += [*_unlabelled(methods, unlabelled), *found.notes, *_same_predictions(found, methods)]
    entries = [_entry(found, method, methods[0], settings, labels, result["groups"]) for method in methods]
    others = [entry for entry in entries if entry["difference"]]
    _adjust([entry["difference"] for entry in others])
    for part in PARTS if settings.gaps != "none" else ():
        _adjust([entry["gaps"]["change"][part] for entry in others])
    reference = found.reference(settings)
    return {
        **result,
        "baseline": methods[0].name,
        "tune": settings.tune,
        "rule": RULES[settings.tune],
        "methods": entries,
        "reference": None if reference is None else summarize(reference, labels, result["groups"]),
    }


# -- what is trained ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Run(Run):
    """A method at work, with its hyper-parameters chosen; or, without one, a classifier trained on D*."""

    method: Method | None = None
    system: System = field(default_factory=System)


def _runs(
    methods: Sequence[Method], settings: CompareSettings, sets: Mapping[str, TrainingSet], seed: int
) -> Iterator[_Run]:
    """Yield a seed's runs, backbone by backbone: the methods on it, then the classifier trained on D*."""
    recipe, by_backbone = settings.recipe, defaultdict[str, list[_Run]](list)
    for method in methods:
        run = _run_of(method, recipe, sets["lt"], seed)
        if run.stage1.unlabelled and len(run.trained_on.rows) == len(sets["true"].rows):
            raise UserError(f"{method.name}: --profile {settings.profile} leaves no training images to be unlabelled")
        by_backbone[run.backbone_key].append(run)
    for runs in by_backbone.values():
        yield from runs
        if settings.gaps != "none":
            first, bound = runs[0], recipe.classifier(sets["true"].spec)
            row = f"{first.encoder}->true"
            yield _Run(row, seed, first.encoder, first.stage1, sets["lt"], bound, sets["true"])
    if settings.gaps == "all":
        true = sets["true"]
        yield _Run("true->true", seed, "true", recipe.backbone(true.spec), true, recipe.classifier(true.spec), true)


def _run_of(method: Method, recipe: Recipe, data: TrainingSet, seed: int) -> _Run:
    """Return the run of a method on a training set.

    Raises:
        UserError: one of its hyper-parameters cannot be used.
    """
    system = method.system()
    stage1 = _changed(recipe.backbone, data, system.stage1)
    if stage1.unlabelled and data.name == "cut":
        raise UserError(f"--tune cut: {method.name} trains on held-out images too; write its hyper-parameters out")
    stage2 = None if system.stage2 is None else _changed(recipe.classifier, data, system.stage2)
    for stage in filter(None, (stage1, stage2)):
        Objective(stage, data.spec.counts, 1, seed, torch.device("cpu"))
    said = {k: " + ".join(v) if isinstance(v, list | tuple) else v for k, v in sorted(spelled(system.stage1).items())}
    changes = ", ".join(name if value is True else f"{name} {value}" for name, value in said.items())
    plain = stage1 == recipe.backbone(data.spec)
    encoder = data.name if plain else f"{data.name}, {changes}"
    retrained = None if stage2 is None else data
    return _Run(method.name, seed, encoder, stage1, data, stage2, retrained, method, system)


def _changed(make: Callable[..., StageSpec], data: TrainingSet, changes: Mapping[str, Any]) -> StageSpec:
    """Return a stage of a recipe, which `make` makes, with the changes of a method; `Objective` sees if they fit."""
    changes = spelled(changes)
    stage = make(data.spec, autoaugment=changes.pop("autoaugment", False))
    known = augmentations_of(stage.augment)
    added = tuple(known.canonical(call) for call in changes.pop("augment", ()))
    values = {**dict(stage), **changes, "augment": (*stage.augment, *added)}
    return with_plugins(StageSpec.model_validate(values))


def _chosen_runs(
    stages: Stages, found: "_Outcomes", settings: CompareSettings, sets: Mapping[str, TrainingSet], seed: int
) -> Iterator[_Run]:
    """Yield a seed's runs, each method with its hyper-parameters chosen."""
    methods = settings.parsed()
    if settings.tune == "cut":
        methods = _choose(stages, settings.recipe, methods, sets["lt"], seed, found.notes)
    yield from _runs(methods, settings, sets, seed)


def _tried(stages: Stages, settings: CompareSettings, data: TrainingSet, seed: int) -> list[_Run]:
    """Return the runs without a seed's cut that hyper-parameters are chosen by."""
    if settings.tune != "cut":
        return []
    rest = stages.without(data, _cut(stages, data, seed))
    open_ = [choices for method in settings.parsed() if len(choices := method.choices()) > 1]
    return [_run_of(one, settings.recipe, rest, seed) for choices in open_ for one in choices]


def _waves(stages: Stages, settings: CompareSettings) -> Iterator[list[Run]]:
    """Yield what a comparison needs: what hyper-parameters are chosen by, then the methods with those chosen."""
    sets = {seed: training_sets(stages, settings, seed) for seed in settings.seeds}
    if settings.tune == "cut":
        yield [run for seed, of in sets.items() for run in _tried(stages, settings, of["lt"], seed)]
    runs = partial(_chosen_runs, stages, _Outcomes())
    yield [run for seed, of in sets.items() for run in runs(settings, of, seed)]


def _possible(stages: Stages, settings: CompareSettings, seed: int | None = None) -> list[_Run]:
    """Return the runs of a seed, by default the first: of all methods as given, and of all that is tried."""
    seed = settings.seeds[0] if seed is None else seed
    sets = training_sets(stages, settings, seed)
    return [*_runs(settings.parsed(), settings, sets, seed), *_tried(stages, settings, sets["lt"], seed)]


def plan(stages: Stages, settings: CompareSettings) -> dict[str, Any]:
    """Return what a comparison would train, and what of it is stored, without training anything."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    require_parts(stages.data, _possible(stages, settings))
    for seed in settings.seeds:
        for run in _possible(stages, settings, seed):
            row = {"seed": seed, "what": "backbone", "name": run.encoder}
            for kind, key, what, _ in stages.beneath(run.stage1, seed):
                rows.setdefault((kind, key), row | {"name": f"{run.encoder}, {what}"})
            rows.setdefault(("stage1", run.backbone_key), row)
            if (spec := run.spec()) is not None:
                rows.setdefault(("stage2", spec.key()), row | {"what": "classifier", "name": run.row})
    stages_ = [row | {"stored": stages.store.has(*place)} for place, row in rows.items()]
    missing = {
        what: sum(row["what"] == what and not row["stored"] for row in stages_) for what in ("backbone", "classifier")
    }
    return {"plan": stages_, "to_train": missing, "steps": settings.recipe.stage1.model_dump(mode="json")}


# -- hyper-parameters ------------------------------------------------------------------------------------------------


def _cut(stages: Stages, data: TrainingSet, seed: int) -> BoolArray:
    """Return which rows of a training set are held out: a tenth of each class, drawn by the seed."""
    labels = stages.data.train.labels.numpy()[data.rows]
    stream, held_out = numpy_stream(seed, "compare", "cut"), np.zeros(len(labels), dtype=bool)
    for k in range(stages.data.train.num_classes):
        members = stream.permutation(np.flatnonzero(labels == k))
        held_out[members[: held(len(members))]] = True
    return held_out


def held(images: int) -> int:
    """Return how many of a class's images the cut takes: a tenth, at least one, but never a class's only one.

    >>> [held(n) for n in (1, 2, 5, 15, 16, 500)]
    [0, 1, 1, 2, 2, 50]
    """
    return max(1, round(CUT * images)) if images > 1 else 0


def _choose(
    stages: Stages, recipe: Recipe, methods: Sequence[Method], data: TrainingSet, seed: int, notes: list[str]
) -> list[Method]:
    """Return the methods with the hyper-parameters that do best on the validation cut."""
    held_out = _cut(stages, data, seed)
    rest, rows = stages.without(data, held_out), data.rows[held_out]
    labels = stages.data.train.labels.numpy()[rows]
    open_ = {method.name: choices for method in methods if len(choices := method.choices()) > 1}
    runs = [_run_of(one, recipe, rest, seed) for choices in open_.values() for one in choices]
    scores: dict[str, float] = {}
    for run in sorted(runs, key=lambda run: run.backbone_key):  # one backbone is in memory at a time
        assert run.method is not None
        backbone = stages.backbone(run.stage1, rest.rows, seed, f"seed {seed}: backbone on {run.encoder}")
        label = f"seed {seed}: {run.method.call} on the cut"
        encoder, logits, _ = _classifier(stages, run, backbone, label, notes)
        predicted = logits(stages.clean_features(encoder, "train", rows)).argmax(1)
        recalls = [(predicted[labels == k] == k).mean() for k in np.unique(labels)]
        scores[f"{run.row}: {run.method.call}"] = round(float(np.mean(recalls)), 12)
    return [
        max(open_.get(method.name, [method]), key=lambda one: scores.get(f"{one.name}: {one.call}", 0.0))
        for method in methods
    ]


# -- scores -----------------------------------------------------------------------------------------------------------


class _Scored(NamedTuple):
    """What a method says of the test images, [M], how that scores, and the seconds that its classifier took."""

    predicted: IntArray
    scored: Scored
    seconds: float


@dataclass
class _Outcomes:
    """What was found so far, by method's name and in the order of seeds."""

    scored: dict[str, list[_Scored]] = field(default_factory=lambda: defaultdict(list))
    runs: dict[str, list[_Run]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Of training the backbone."""
    bounds: dict[tuple[int, str], BoolArray] = field(default_factory=dict)
    """By seed and backbone's key, or "true": which test images the classifier trained on D* gets right."""
    notes: list[str] = field(default_factory=list)

    def add(self, run: _Run, backbone: Backbone, scored: _Scored) -> None:
        """Take in a method's outcome of one seed."""
        self.scored[run.row].append(scored)
        self.runs[run.row].append(run)
        self.seconds[run.row].append(sum(float(backbone.meta.get(n, 0)) for n in SPENT))

    def predicted(self, method: Method) -> IntArray:
        """Return a method's predictions [S, M]."""
        return np.stack([one.predicted for one in self.scored[method.name]])

    def bound(self, method: Method) -> BoolArray:
        """Return which images a classifier trained on D* gets right on the method's backbone, [S, M]."""
        return np.stack([self.bounds[run.seed, run.backbone_key] for run in self.runs[method.name]])

    def reference(self, settings: CompareSettings) -> BoolArray | None:
        """Return which images true -> true gets right, [S, M]; None where that was left out."""
        return np.stack([self.bounds[seed, "true"] for seed in settings.seeds]) if settings.gaps == "all" else None


def _scored(stages: Stages, run: _Run, backbone: Backbone, label: str, notes: list[str]) -> _Scored:
    encoder, logits, seconds = _classifier(stages, run, backbone, label, notes)
    found, labels = logits(stages.clean_features(encoder, "test")), stages.data.test.labels.numpy()
    try:
        scored = Scored.of(lambda block: found[block], labels, found.shape[1])
    except Diverged:
        raise UserError(f"{label}: the classifier's logits are not finite; take other hyper-parameters") from None
    return _Scored(found.argmax(1), scored, seconds)


def _classifier(
    stages: Stages, run: _Run, backbone: Backbone, label: str, notes: list[str]
) -> tuple[Backbone, Logits, float]:
    """Return the backbone as a method's classifier sees it, that classifier, and the seconds that fitting it took."""
    (inputs, weight, bias), seconds, rows = as_sure(backbone.model.classifier), 0.0, run.trained_on.rows
    if run.stage2 is not None:
        spec = cast(RunSpec, run.spec())
        backbone = stages.for_stage2(backbone, run.stage2, rows, run.seed)
        artifact = stages.classifier(spec, backbone, rows, label)
        inputs, weight, bias = Tensor.float, artifact.tensors["weight"], artifact.tensors["bias"]
        seconds = float(artifact.meta["seconds"])
    if run.system.classifier is None:
        return backbone, lambda features: (inputs(features) @ weight.T + bias).numpy(), seconds
    if run.system.bn_mode != "frozen":
        changes = {"bn_mode": run.system.bn_mode, "sampler": "class_balanced", "views": 1}
        seen = run.stage1.model_copy(update=changes)
        backbone = stages.for_stage2(backbone, seen, rows, run.seed)
    rows, labels = stages.trained_on(backbone, rows)
    features = stages.clean_features(backbone, "train", rows)
    model = CLASSIFIERS.make(run.system.classifier)
    if not take_base(model, fixed(weight.numpy(), bias.numpy())):  # what re-balances the network's own
        inputs = Tensor.float
    started = time.monotonic()
    with stages.runtime.progress.task(label, 1) as advance, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ConvergenceWarning)
        try:
            model.fit(inputs(features).numpy(), labels.numpy())
        except ValueError as error:
            raise UserError(f"{label}: the classifier {run.system.classifier} cannot be fitted: {error}") from None
        advance(1)
    notes += [f"{label}: {one.message}" for one in told if issubclass(one.category, ConvergenceWarning)]
    return backbone, lambda features: model.logits(inputs(features).numpy()), seconds + time.monotonic() - started


# -- what the result says ---------------------------------------------------------------------------------------------


def _entry(
    found: _Outcomes,
    method: Method,
    baseline: Method,
    settings: CompareSettings,
    labels: IntArray,
    groups: Sequence[str | None],
) -> dict[str, Any]:
    """Return what the result file says of a method."""
    right, base = (found.predicted(one) == labels for one in (method, baseline))
    system, runs, scored = method.system(), found.runs[method.name], found.scored[method.name]
    errors = [one.scored.calibration_error().estimate for one in scored]
    difference = right.astype(float) - base
    is_baseline = method.name == baseline.name
    return {
        "name": method.name,
        "stage1": spelled(system.stage1),
        "stage2": None if system.stage2 is None else spelled(system.stage2),
        "classifier": system.classifier,
        "backbone": runs[0].encoder,
        "calls": [cast(Method, run.method).call for run in runs],
        **summarize(right, labels, groups),
        "calibration_error": {"by_seed": errors, "mean": float(np.mean(errors))},
        "seconds": {
            "backbone": float(np.mean(found.seconds[method.name])),
            "classifier": float(np.mean([one.seconds for one in scored])),
        },
        "difference": None if is_baseline else {**paired(difference).to_json(), "p": p_of_zero(difference)},
        "gaps": _gaps(found, method, None if is_baseline else baseline, settings, labels),
    }


def _gaps(
    found: _Outcomes, method: Method, baseline: Method | None, settings: CompareSettings, labels: IntArray
) -> dict[str, Any] | None:
    """Return a method's two gaps, and by how much they differ from the baseline's; None where that was left out."""
    if settings.gaps == "none":
        return None
    reference = found.reference(settings)

    def parts(one: Method) -> dict[str, Floats]:
        """Return the gaps of every image, that of the representation less what true -> true gets right."""
        bound = found.bound(one).astype(float)
        return {"representation": -bound, "classifier": bound - (found.predicted(one) == labels)}

    own, others = parts(method), None if baseline is None else parts(baseline)
    return {
        "bound": float(found.bound(method).mean()),
        "representation": None if reference is None else paired(reference + own["representation"]).gap(),
        "classifier": paired(own["classifier"]).gap(),
        "change": others and {part: _change(values - others[part]) for part, values in own.items()},
    }


def _change(values: Floats) -> dict[str, Any]:
    """Return a change of a gap with its p-value; None where it is none for every image, as on the same backbone."""
    return {**paired(values).gap(), "p": p_of_zero(values) if values.any() else None}


def _adjust(tested: Sequence[dict[str, Any]]) -> None:
    """Add Holm's p-values to the tests of one question."""
    for one, p in zip(tested, holm([one["p"] for one in tested]), strict=True):
        one["p_holm"] = p


def _unlabelled(methods: Sequence[Method], images: int) -> list[str]:
    """Return a warning for each method that sees the images outside of the long-tailed subset without labels."""
    return [
        f"{method.name} sees {images:,} training images without their labels, which methods that are not named here do"
        " not see: its gain over these is not that of a method alone"
        for method in methods
        if "unlabelled" in method.system().stage1
    ]


def _same_predictions(found: _Outcomes, methods: Sequence[Method]) -> list[str]:
    """Return a warning for each method that says of every test image what one before it says."""
    said = [(method.name, found.predicted(method)) for method in methods]
    before = [next((a for a, own in said[:k] if np.array_equal(own, right)), None) for k, (_, right) in enumerate(said)]
    return [
        f"{name} predicts the same as {other} for every test image and seed: on these data the two are one method"
        for (name, _), other in zip(said, before, strict=True)
        if other is not None
    ]
