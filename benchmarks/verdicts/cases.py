"""One case: drawn as a user has it, diagnosed as a user's is, and compared with the truth."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import StratifiedKFold

from benchmarks.verdicts.sources import Encoded, Floats, IntArray, Source, ranks, tail_counts
from benchmarks.verdicts.truth import Facts
from tailscope.classifiers import CLASSIFIERS, SoftmaxRegression
from tailscope.classifiers.base import FeatureClassifier
from tailscope.diagnosis import inputs as files
from tailscope.diagnosis.inputs import Inputs
from tailscope.diagnosis.learning_curve import INFLATION
from tailscope.diagnosis.outcomes import Outcomes, difference, score
from tailscope.diagnosis.remedies import POOLED
from tailscope.diagnosis.soundness import doubts, doubts_of_outcomes
from tailscope.diagnosis.verdict import accuracies, judge
from tailscope.intervals import Gap, Interval, proportion
from tailscope.measures import GeometryResult, describe
from tailscope.progress import Quiet
from tailscope.seeds import numpy_stream
from tailscope.tables.table import LinearLayer

RATIOS = (0.25, 0.5, 2.0, 4.0)  # planted representation gaps, over the true classifier gap
LEAST_GAP = 0.03  # smaller true classifier gaps have no ceiling planted
PERMUTATIONS = 99
TOL = 3e-4
FOLDS = 5
Right = NDArray[np.bool_]
Table = tuple[Floats, IntArray]


@dataclass(frozen=True)
class Case:
    """What is drawn: `held_out` samples a class, with or without a test file."""

    source: str
    factor: int
    held_out: int
    draw: int
    test: bool

    @property
    def key(self) -> str:
        """Name it."""
        return f"{self.source} 1:{self.factor} m={self.held_out} #{self.draw}{' test' if self.test else ''}"


class Drawn(NamedTuple):
    """A user's training set, held-out samples and test file, as (features, labels), and the untouched test samples."""

    train: Table
    unseen: Table
    test: Table | None
    untouched: IntArray


def plan(sources: Iterable[Source]) -> Iterator[Case]:
    """Yield every case of some sources, those of one source together."""
    for source in sources:
        for factor in source.factors:
            for held_out in source.held_out:
                for draw in range(source.draws):
                    yield Case(source.name, factor, held_out, draw, test=False)
                    yield Case(source.name, factor, held_out, draw, test=True)


def draw(case: Case, source: Source, encoded: Encoded) -> Drawn:
    """Draw a case: with and without a test file it has the same training, held-out and untouched samples."""
    stream = numpy_stream(case.draw, "verdicts", case.source, case.factor, case.held_out)
    everything, tests = (encoded.features, encoded.labels), (encoded.test_features, encoded.test_labels)
    place = ranks(encoded.test_labels, stream)
    held_out = case.held_out if source.from_test else 0
    tested = np.flatnonzero((place >= held_out) & (place < held_out + source.tested))
    untouched = np.flatnonzero(place >= held_out + source.tested)
    seen = np.zeros(len(encoded.labels), dtype=bool) if encoded.seen is None else encoded.seen
    free = np.flatnonzero(~seen)
    rank = ranks(encoded.labels[free], stream)
    unseen = _taken(tests, np.flatnonzero(place < held_out))
    if not source.from_test:
        unseen = _taken(everything, free[rank < case.held_out])
    if encoded.seen is None:
        counts = stream.permutation(tail_counts(source.bound_at, case.factor, int(encoded.labels.max()) + 1))
        rank -= case.held_out
        seen[free[(rank >= 0) & (rank < counts[encoded.labels[free]])]] = True
    train = _taken(everything, np.flatnonzero(seen))
    return Drawn(train, unseen, _taken(tests, tested) if case.test else None, untouched)


def _taken(table: Table, rows: IntArray) -> Table:
    return table[0][rows], table[1][rows]


def examine(case: Case, source: Source, encoded: Encoded, facts: Facts) -> dict[str, Any]:
    """Diagnose a case and compare what is said with what is true."""
    started, drawn = time.process_time(), draw(case, source, encoded)
    weight, bias = encoded.classifier or _in_use(*drawn.train)
    inputs = files.read(drawn.train, drawn.unseen, drawn.test, LinearLayer.from_arrays(weight, bias))
    geometry = _measured(inputs, case.draw)
    outcomes = score(inputs, source.bound_at, case.draw, Quiet())
    withheld = doubts({"": inputs}) or doubts_of_outcomes(inputs, outcomes)
    groups = [entry["group"] for entry in geometry.classes]
    said = accuracies(outcomes, groups, inputs.train.counts())
    seconds = time.process_time() - started
    untouched = _taken((encoded.test_features, encoded.test_labels), drawn.untouched)
    right = facts.right[drawn.untouched]
    current = ((untouched[0] @ weight.T + bias).argmax(1) == untouched[1]).astype(np.float64)
    naive = naive_bound(drawn, case.draw)
    ceilings = _ceilings(float(right.mean()), float(current.mean()), facts.attribution)
    verdicts = [
        {"of": of, **_verdict(outcomes, geometry, ceiling, not withheld), **_truth(right, current, ceiling)}
        | {"naive": naive.verdict(outcomes.current, ceiling)}
        for of, ceiling in ceilings.items()
    ]
    gain, *_ = (verdict.pop("rebalancing_gap") for verdict in verdicts)  # no ceiling changes it
    return {
        "case": case.key, **vars(case), "encoder": source.encoder, "classes": len(inputs.names),
        "features": inputs.train.width, "bound_at": source.bound_at, "scored": len(outcomes.labels),
        "untouched": len(right), "seconds": seconds, "withheld": withheld,
        "bound": _bound(said["classifier_bound"], right) | {"naive": naive.interval},
        "current": {"said": said["current"]["mean"], "true": float(current.mean())},
        "verdicts": verdicts,
        "swap": facts.attribution,
        **_remedies(said["rebalanced"], gain, drawn, (weight, bias), untouched, current),
    }  # fmt: skip


def _in_use(features: Floats, labels: IntArray) -> tuple[Floats, Floats]:
    """Fit the classifier in use, where none came with the encoder: what `diagnose` fits by itself."""
    model = SoftmaxRegression().fit(features, labels)
    return model.coef_, model.intercept_


def _measured(inputs: Inputs, seed: int) -> GeometryResult:
    train, unseen = inputs.train, inputs.unseen
    tables = train.features, train.labels, unseen.features, unseen.labels
    return describe(*tables, inputs.names, permutations=PERMUTATIONS, seed=seed)


def _ceilings(bound: float, current: float, attribution: dict[str, Any] | None) -> dict[str, float]:
    """Return the ceilings that a case is judged with: 1, planted ones, and the accuracy of `swap`'s other encoder."""
    found = {"1": 1.0}
    if bound - current >= LEAST_GAP:
        planted = {f"planted {ratio:g}": bound + ratio * (bound - current) for ratio in RATIOS}
        found |= {name: ceiling for name, ceiling in planted.items() if ceiling <= 1}
    return found | ({"swap": attribution["cells"]["true->true"]} if attribution else {})


def _bound(said: dict[str, Any], right: NDArray[np.float64]) -> dict[str, Any]:
    found = said["extrapolated"]
    return {
        "true": float(right.mean()),
        "true_error": float(right.std() / len(right) ** 0.5),
        "attained": said["attained"]["mean"],
        "attained_ci95": said["attained"]["ci95"],
        "extrapolated": found and found["mean"],
        "ci95": found and found["ci95"],
        "reason": said["reason"],
    }


def _verdict(outcomes: Outcomes, geometry: GeometryResult, ceiling: float, sound: bool) -> dict[str, Any]:
    verdict, _ = judge(outcomes, geometry.classes, geometry.groups, Interval(ceiling, None, None, None))
    losing = verdict["group_tested"]
    group = geometry.groups.get(losing) if losing else None
    return {
        "ceiling": ceiling,
        "bottleneck": verdict["bottleneck"] if sound else "undecided",
        "kind": verdict["kind"] if sound else None,
        "difference": verdict["difference"],
        "spread_rejects": None if group is None else group["spread_gap_flagged"],
        "rebalancing_gap": verdict["rebalancing_gap"],
    }


def _truth(right: NDArray[np.float64], current: NDArray[np.float64], ceiling: float) -> dict[str, float]:
    """Return the true difference and gaps, and the error that untouched samples leave in the difference."""
    items = 2 * right - current - ceiling
    gaps = {"classifier_gap": float((right - current).mean()), "representation_gap": float(ceiling - right.mean())}
    return {"true": float(items.mean()), "true_error": float(items.std() / len(items) ** 0.5), **gaps}


def _remedies(
    said: dict[str, Any],
    gain: Gap,
    drawn: Drawn,
    in_use: tuple[Floats, Floats],
    untouched: Table,
    current: NDArray[np.float64],
) -> dict[str, Any]:
    """Return what each remedy reaches on held-out and on untouched samples, and the promised gain of the advised."""
    right = {}
    for name in said["remedies"]:
        remedy = followed(name, drawn, in_use)
        right[name] = (remedy.predict(untouched[0]) == untouched[1]).astype(np.float64)
    gained = right[said["classifier"]] - current
    error = float(gained.std() / len(gained) ** 0.5)
    return {
        "remedies": {name: [reached, float(right[name].mean())] for name, reached in said["remedies"].items()},
        "advised": said["classifier"],
        "gain": {**gain, "true": float(gained.mean()), "true_error": error},
    }


def followed(name: str, drawn: Drawn, in_use: tuple[Floats, Floats]) -> FeatureClassifier:
    """Return what a user gets who follows an advice: the classifier that it names, fitted."""
    call, pooled, _ = name.partition(POOLED)
    model = CLASSIFIERS.make(call)
    settings = {"base": _frozen(*in_use), "tol": TOL}
    model.set_params(**{key: value for key, value in settings.items() if key in model.get_params(deep=False)})
    tables = (drawn.train, drawn.unseen) if pooled else (drawn.train,)
    features, labels = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    fitted: FeatureClassifier = model.fit(features, labels)
    return fitted


def _frozen(weight: Floats, bias: Floats) -> FrozenEstimator:
    """Return the classifier in use as an estimator that `fit` leaves as it is."""
    model = SoftmaxRegression()
    model.coef_, model.intercept_, model.classes_ = weight, bias, np.arange(len(weight))
    model.n_features_in_ = weight.shape[1]
    return FrozenEstimator(model)


# -- the rule of before -----------------------------------------------------------------------------------------------


class Naive(NamedTuple):
    """The bound as what a softmax regression fitted to held-out samples reaches, as if no more could be reached."""

    right: Right
    inflation: float

    @property
    def interval(self) -> list[float]:
        """Its interval over samples."""
        low, high = proportion(self.right[None]).widened(self.inflation).ci95 or (0.0, 1.0)
        return [low, high]

    def verdict(self, current: Right, ceiling: float) -> str:
        """Return the side on which the interval of the difference lies."""
        found = difference(2.0 * self.right - current, np.full(len(current), ceiling), self.inflation).ci95
        assert found is not None
        return "classifier" if found[0] > 0 else "representation" if found[1] < 0 else "undecided"


def naive_bound(drawn: Drawn, seed: int) -> Naive:
    """Fit it to all held-out samples and score it on the test file, or cross-fit it in five folds."""
    features, labels = drawn.unseen
    if drawn.test is not None:
        model = SoftmaxRegression(choose_l2=True, tol=TOL, random_state=seed).fit(features, labels)
        return Naive(model.predict(drawn.test[0]) == drawn.test[1], 1.0)
    right = np.zeros(len(labels), dtype=bool)
    for fitted, held in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(features, labels):
        model = SoftmaxRegression(choose_l2=True, tol=TOL, random_state=seed).fit(features[fitted], labels[fitted])
        right[held] = model.predict(features[held]) == labels[held]
    return Naive(right, INFLATION)
