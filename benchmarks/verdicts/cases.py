"""One case: drawn as a user has it, diagnosed as a user's is, and compared with the truth."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold

from benchmarks.verdicts.sources import Encoded, Floats, IntArray, Source, ranks, tail_counts
from benchmarks.verdicts.truth import Facts, split
from tailscope.classifiers import SoftmaxRegression
from tailscope.classifiers.base import FeatureClassifier
from tailscope.diagnosis import inputs as files
from tailscope.diagnosis.inputs import Inputs
from tailscope.diagnosis.learning_curve import INFLATION
from tailscope.diagnosis.outcomes import Outcomes, difference, score
from tailscope.diagnosis.soundness import doubts, doubts_of_outcomes
from tailscope.diagnosis.verdict import judge
from tailscope.intervals import Interval, proportion
from tailscope.measures import GeometryResult, describe
from tailscope.progress import Quiet
from tailscope.seeds import numpy_stream
from tailscope.tables.table import LinearLayer

RATIOS = (0.25, 0.5, 2.0, 4.0)  # planted representation gaps, over the true classifier gap
LEAST_GAP = 0.03  # smaller true classifier gaps have no ceiling planted
PERMUTATIONS = 99
FOLDS = 5
Right = NDArray[np.bool_]


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
    """A user's training set, held-out samples and test file, and untouched samples: features and labels of each."""

    train: tuple[Floats, IntArray]
    unseen: tuple[Floats, IntArray]
    test: tuple[Floats, IntArray] | None
    untouched: tuple[Floats, IntArray]


def plan(sources: Iterable[Source]) -> Iterator[Case]:
    """Yield every case of some sources, those of one source together."""
    for source in sources:
        for factor in source.factors:
            for held_out in source.held_out:
                for draw in range(source.draws):
                    yield Case(source.name, factor, held_out, draw, test=False)
                    yield Case(source.name, factor, held_out, draw, test=True)


def draw(case: Case, source: Source, encoded: Encoded) -> Drawn:
    """Draw a case: with and without a test file it has the same training and held-out samples."""
    stream = numpy_stream(case.draw, "verdicts", case.source, case.factor, case.held_out)
    parts, seen = split(source, encoded), encoded.seen
    everything, tests = (encoded.features, encoded.labels), (encoded.test_features, encoded.test_labels)
    if source.reserved:
        rows = parts.reserved
        unseen = _taken(tests, rows[ranks(tests[1][rows], stream) < case.held_out])
    else:
        free = np.arange(len(everything[1])) if seen is None else np.flatnonzero(~seen)
        rank = ranks(everything[1][free], stream)
        unseen = _taken(everything, free[rank < case.held_out])
    if seen is None:
        classes = int(everything[1].max()) + 1
        counts = stream.permutation(tail_counts(source.bound_at, case.factor, classes))
        place = rank - case.held_out
        train = _taken(everything, free[(place >= 0) & (place < counts[everything[1][free]])])
    else:
        train = _taken(everything, np.flatnonzero(seen))
    return Drawn(train, unseen, _taken(tests, parts.tested) if case.test else None, _taken(tests, parts.untouched))


def _taken(table: tuple[Floats, IntArray], rows: IntArray) -> tuple[Floats, IntArray]:
    return table[0][rows], table[1][rows]


def examine(case: Case, source: Source, encoded: Encoded, facts: Facts) -> dict[str, Any]:
    """Diagnose a case and compare what is said with what is true."""
    started, drawn = time.process_time(), draw(case, source, encoded)
    weight, bias = encoded.classifier or _in_use(*drawn.train)
    features, labels = drawn.untouched
    current = ((features @ weight.T + bias).argmax(1) == labels).astype(np.float64)
    inputs = files.read(drawn.train, drawn.unseen, drawn.test, LinearLayer.from_arrays(weight, bias))
    geometry = _measured(inputs, case.draw)
    outcomes = score(inputs, source.bound_at, case.draw, Quiet())
    withheld = doubts({"": inputs}) or doubts_of_outcomes(inputs, outcomes)
    seconds = time.process_time() - started
    naive = naive_bound(drawn, case.draw)
    ceilings = _ceilings(float(facts.right.mean()), float(current.mean()), facts.attribution)
    return {
        "case": case.key, **vars(case), "encoder": source.encoder, "classes": len(inputs.names),
        "features": features.shape[1], "bound_at": source.bound_at, "scored": len(outcomes.labels),
        "untouched": len(labels), "seconds": seconds, "withheld": withheld,
        "bound": _bound(outcomes, facts.right) | {"naive": naive.interval},
        "current": {"said": float(outcomes.current.mean()), "true": float(current.mean())},
        "verdicts": [
            {"of": of, **_verdict(outcomes, geometry, ceiling, not withheld), **_truth(facts.right, current, ceiling)}
            | {"naive": naive.verdict(outcomes.current, ceiling)}
            for of, ceiling in ceilings.items()
        ],
        "swap": facts.attribution,
        **_remedies(inputs, outcomes, geometry, drawn.untouched, current),
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
    return found | ({"swap": attribution["true_true"]} if attribution else {})


def _bound(outcomes: Outcomes, right: NDArray[np.float64]) -> dict[str, Any]:
    attained, found = outcomes.bound.attained.accuracy, outcomes.bound.extrapolated
    return {
        "true": float(right.mean()),
        "true_error": float(right.std() / len(right) ** 0.5),
        "attained": attained.estimate,
        "attained_ci95": list(attained.ci95 or (0.0, 1.0)),
        "extrapolated": None if found is None else found.mean,
        "ci95": None if found is None else list(found.ci95),
        "reason": outcomes.bound.reason,
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
    }


def _truth(right: NDArray[np.float64], current: NDArray[np.float64], ceiling: float) -> dict[str, float]:
    """Return the true difference and gaps, and the error that untouched samples leave in the difference."""
    items = 2 * right - current - ceiling
    gaps = {"classifier_gap": float((right - current).mean()), "representation_gap": float(ceiling - right.mean())}
    return {"true": float(items.mean()), "true_error": float(items.std() / len(items) ** 0.5), **gaps}


def _remedies(
    inputs: Inputs,
    outcomes: Outcomes,
    geometry: GeometryResult,
    untouched: tuple[Floats, IntArray],
    current: NDArray[np.float64],
) -> dict[str, Any]:
    """Return what each remedy reaches on held-out and on untouched samples, and the promised gain of the best."""
    features, labels = untouched
    right = {name: model.predict(features) == labels for name, model in fitted_remedies(inputs).items()}
    best = outcomes.rebalanced.best
    verdict, _ = judge(outcomes, geometry.classes, geometry.groups, Interval(1.0, None, None, None))
    gain = right[best] - current
    return {
        "remedies": {name: [outcomes.remedies[name], float(one.mean())] for name, one in right.items()},
        "advised": best,
        "gain": {
            **verdict["rebalancing_gap"], "true": float(gain.mean()), "true_error": float(gain.std() / len(gain) ** 0.5)
        },
    }  # fmt: skip


def fitted_remedies(inputs: Inputs) -> dict[str, FeatureClassifier]:
    """Return every remedy that a diagnosis chooses from, as it fits them."""
    from tailscope.diagnosis import outcomes

    train = outcomes._arrays(inputs.train, 0)
    return outcomes._remedies(outcomes._current(inputs, *train, 0)[0], *train)


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
        model = SoftmaxRegression(choose_l2=True, random_state=seed).fit(features, labels)
        return Naive(model.predict(drawn.test[0]) == drawn.test[1], 1.0)
    right = np.zeros(len(labels), dtype=bool)
    for fitted, held in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(features, labels):
        model = SoftmaxRegression(choose_l2=True, random_state=seed).fit(features[fitted], labels[fitted])
        right[held] = model.predict(features[held]) == labels[held]
    return Naive(right, INFLATION)
