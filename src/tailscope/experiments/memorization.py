"""Memorisation by subsampled training: which training images a network gets right only because it was trained on them.

Feldman and Zhang (2020): the memorisation of an image (their equation 1) is the probability that a network trained on
it gets it right, minus the probability that one trained without it does. Both are estimated from `trainings` networks,
each trained on a random share of the long-tailed set and each asked once for every image of it, un-augmented (their
algorithm 1). Parts are drawn uniformly, as theirs; where a class would be left without an image, one of its images is
put back. So the only image of a class is never left out, and its memorisation is undefined.

Beside it stands the spread gap of the same classes, from a backbone that was trained on the whole long-tailed set: the
network's features alone tell it, without a second training.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from tailscope.errors import UserError
from tailscope.experiments import plans
from tailscope.experiments.hours import opened_for
from tailscope.experiments.options import Memorization, Request
from tailscope.experiments.runs import Experiment, Run, Settings, require_parts, training_sets
from tailscope.experiments.stages import Backbone, Stages, TrainingSet
from tailscope.groups import GROUPS
from tailscope.intervals import Z, as_list, paired
from tailscope.measures import describe
from tailscope.report import build
from tailscope.report.objects import Memorization as Memorized
from tailscope.seeds import derive, numpy_stream

Floats = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

THRESHOLD = 0.25
"""An image of more is called memorised (Feldman and Zhang 2020, section 3)."""

ENOUGH = 10
"""Trainings that leave an image out on average; with fewer, a single image's value is coarse."""

_ROUNDING = 1e-9
_CARD = ("row", "seed", "steps", "subset_sha256", "counts", "seconds", "key", "arithmetic")
"""What result files say of each training on a part; the rest is as for the whole set."""


class MemorizationSettings(Settings):
    """What decides the result; `options` says what each field means."""

    trainings: int
    share: float

    @classmethod
    def of(cls, request: Request) -> Self:
        """Return the part of a request that decides results; raise `UserError` where an option is wrong."""
        assert isinstance(request, Memorization)
        if not 0 < request.share < 1:
            raise UserError(f"--share {request.share:g}: must lie strictly between 0 and 1")
        if request.trainings < 2:
            raise UserError(f"--trainings {request.trainings}: give at least 2, for images are compared between them")
        own = {"trainings": request.trainings, "share": request.share}
        return cls.model_validate({**dict(Settings.of(request)), **own})

    def spec(self, data: Any) -> dict[str, Any]:
        """Return what the result depends on."""
        whole = super().spec(data)
        return {name: value for name, value in whole.items() if name not in ("matched", "permutations", "backbones")}


def run(request: Memorization) -> Memorized:
    """Carry out what a request asks for, the trainings and their report, or only return the plan.

    Raises:
        UserError: an option, the data or OUT is not usable.
    """
    settings = MemorizationSettings.of(request)
    if request.plan:
        return Memorized(plan(*opened_for(request, settings)))
    verbs = {"memorization": memorization}
    result = Memorized(plans.run(request, ["memorization"], settings, verbs, _waves)["memorization"])
    if request.out is not None:
        build(request.out)
    return result


def memorization(stages: Stages, settings: MemorizationSettings) -> dict[str, Any]:
    """Train on the whole long-tailed set and on parts of it; return what `memorization.json` holds."""
    experiment, classes = Experiment(stages, settings), stages.data.train.num_classes
    trials, gaps, parts = list[Trials](), list[list[float | None]](), list[int]()
    for run, backbone in experiment.backbones(partial(_runs, stages)):
        assert isinstance(run, _Run)
        rows = experiment.lt_sets[-1].rows
        if run.kept is None:
            trials.append(Trials(stages.data.train.labels.numpy()[rows]))
            gaps.append(_spread_gaps(stages, backbone, rows))
        else:
            trials[-1].add(_right(stages, backbone, rows), run.kept, run.put_back)
        parts.append(len(trials) - 1)
    for card, place in zip(experiment.cards, parts, strict=True):
        card["seed"] = settings.seeds[place]  # a training on a part has a seed of its own, derived from it
    result = experiment.header("memorization")
    result["provenance"] = [
        card if card["row"] == "lt" else {name: card[name] for name in _CARD} for card in result["provenance"]
    ]
    entries, pooled = _measured(trials, gaps, result["groups"], classes)
    about = zip(result["dataset"]["class_names"], result["groups"], result["counts"], strict=True)
    named = [{"index": k, "name": n, "group": g, "count": count} for k, (n, g, count) in enumerate(about)]
    result["warnings"] += _notes(trials, settings, result["dataset"]["class_names"])
    return {
        **result,
        "share": settings.share,
        "trainings": settings.trainings,
        "threshold": THRESHOLD,
        "classes": [{**name, **entry} for name, entry in zip(named, entries, strict=True)],
        "by_group": pooled,
        "total": _total(trials),
        "correlation": _correlations(entries, result["counts"]),
        "images": [
            {"seed": seed, "rows": lt.rows.tolist(), "memorization": _plain(one.scores()[0])}
            for seed, lt, one in zip(settings.seeds, experiment.lt_sets, trials, strict=True)
        ],
    }


# -- what is trained ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Run(Run):
    """A training on the whole set, or on a part: `kept` [N] says which rows, `put_back` which classes were empty."""

    kept: BoolArray | None = None
    put_back: tuple[int, ...] = ()


def _waves(stages: Stages, settings: MemorizationSettings) -> Iterator[list[Run]]:
    """Yield all that is trained, in one wave."""
    yield [
        run for seed in settings.seeds for run in _runs(stages, settings, training_sets(stages, settings, seed), seed)
    ]


def _runs(stages: Stages, settings: MemorizationSettings, sets: Mapping[str, TrainingSet], seed: int) -> Iterator[_Run]:
    """Yield a seed's runs: the whole long-tailed set, then its parts.

    Raises:
        UserError: no image is in some parts and left out of others, so that nothing could be told of any.
    """
    lt, recipe, share = sets["lt"], settings.recipe, f"{100 * settings.share:g} % of lt"
    yield _Run("lt", seed, "lt", recipe.backbone(lt.spec), lt)
    labels = stages.data.train.labels.numpy()[lt.rows]
    drawn = [draw(labels, settings.share, seed, k) for k in range(settings.trainings)]
    times = np.sum([kept for kept, _ in drawn], axis=0)
    if not ((times > 0) & (times < settings.trainings)).any():
        raise UserError(
            f"--share {settings.share:g}: none of {len(labels):,} images is in some parts and left out of others; give"
            " a share nearer to one half, or more --trainings"
        )
    for k, (kept, put_back) in enumerate(drawn):
        part = stages.without(lt, ~kept)
        spec = part.spec.model_copy(update={"profile": f"{lt.spec.profile}, {share}"})
        own, name = derive(seed, "memorization", k), f"{share}, training {k + 1} of {settings.trainings}"
        part = TrainingSet("part", spec, part.rows)
        yield _Run("part", own, name, recipe.backbone(spec), part, kept=kept, put_back=put_back)


def draw(labels: IntArray, share: float, seed: int, training: int) -> tuple[BoolArray, tuple[int, ...]]:
    """Return which images [N] a training keeps, and the classes of which one had to be put back.

    >>> kept, put_back = draw(np.array([0] * 9 + [1]), 0.5, seed=0, training=0)
    >>> bool(kept[9]), int(kept[:9].sum()) + (1 not in put_back)
    (True, 5)
    """
    stream, kept = numpy_stream(seed, "memorization", "part", training), np.zeros(len(labels), dtype=bool)
    kept[stream.permutation(len(labels))[: max(1, round(share * len(labels)))]] = True
    empty = np.setdiff1d(labels, labels[kept])
    for k in empty:
        kept[stream.choice(np.flatnonzero(labels == k))] = True
    return kept, tuple(empty.tolist())


def plan(stages: Stages, settings: MemorizationSettings) -> dict[str, Any]:
    """Return what would be trained, and what of it is stored, without training anything."""
    rows = []
    require_parts(stages.data, next(_waves(stages, settings)))
    for seed in settings.seeds:
        for run in _runs(stages, settings, training_sets(stages, settings, seed), seed):
            row = {"seed": seed, "what": "backbone", "name": run.encoder}
            for kind, key, what, _ in stages.beneath(run.stage1, run.seed):
                rows.append({**row, "name": f"{run.encoder}, {what}", "stored": stages.store.has(kind, key)})
            rows.append({**row, "stored": stages.store.has("stage1", run.backbone_key)})
    missing = sum(not row["stored"] for row in rows)
    return {"plan": rows, "to_train": {"backbone": missing}, "steps": settings.recipe.stage1.model_dump(mode="json")}


def _right(stages: Stages, backbone: Backbone, rows: IntArray) -> BoolArray:
    """Return which of these training images [N] a backbone with its own classifier gets right."""
    logits = stages.clean_features(backbone, "train", rows) @ backbone.weight.T + backbone.bias
    right: BoolArray = (logits.argmax(1) == stages.data.train.labels[rows]).numpy()
    return right


def _spread_gaps(stages: Stages, backbone: Backbone, rows: IntArray) -> list[float | None]:
    """Return each class's spread gap, the unseen samples being the test images."""
    train, test = stages.clean_features(backbone, "train", rows), stages.clean_features(backbone, "test")
    data = stages.data
    found = describe(train, data.train.labels[rows], test, data.test.labels, data.train.class_names, permutations=0)
    return [entry["spread_gap_deg"] for entry in found.classes]


# -- estimates --------------------------------------------------------------------------------------------------------


@dataclass
class Trials:
    """What trainings on parts of one training set said of its N images, whose labels are [N]."""

    labels: IntArray
    right: list[BoolArray] = field(default_factory=list)
    """Of each training: which images [N] it gets right."""
    kept: list[BoolArray] = field(default_factory=list)
    """Of each training: which images [N] it was trained on."""
    put_back: list[int] = field(default_factory=list)
    """Classes of which an image had to be put back, one entry each time."""

    def add(self, right: BoolArray, kept: BoolArray, put_back: Sequence[int] = ()) -> None:
        """Take in one training."""
        self.right.append(right)
        self.kept.append(kept)
        self.put_back += put_back

    def counts(self, training: int | None = None) -> IntArray:
        """Return how often each image was right when kept, kept, right when left out, and left out: [4, N].

        Of all trainings, or of one.
        """
        some = slice(None) if training is None else slice(training, training + 1)
        right, kept = (np.stack(rows[some]) for rows in (self.right, self.kept))
        return np.stack([one.sum(axis=0) for one in (right & kept, kept, right & ~kept, ~kept)])

    def scores(self) -> Floats:
        """Return memorisation, share right when kept, and when left out, [3, N]; NaN where undefined.

        It is undefined for an image that was always kept, or never.

        >>> trials = Trials(np.array([0, 0]))
        >>> trials.add(np.array([True, True]), np.array([True, True]))
        >>> trials.add(np.array([False, True]), np.array([False, True]))
        >>> trials.scores()[0].tolist()
        [1.0, nan]
        """
        return _scores(self.counts())

    def by_chance(self) -> Floats:
        """Return each image's probability [N] of being called memorised if being trained on it made no difference.

        Then the networks that kept an image are a random draw of all of them, so that how many of these are right is
        hypergeometric, given how many of all are.
        """
        right_kept, kept, right_left_out, left_out = self.counts()
        right, found = right_kept + right_left_out, np.full(len(kept), np.nan)
        for n, m, r in {*zip(kept.tolist(), left_out.tolist(), right.tolist(), strict=True)}:
            if n and m:
                x = np.arange(max(0, r - m), min(n, r) + 1)
                chosen = (kept == n) & (right == r)
                found[chosen] = stats.hypergeom.pmf(x, n + m, r, n)[above(x / n - (r - x) / m)].sum()
        return found


def _scores(counts: IntArray) -> Floats:
    with np.errstate(invalid="ignore"):
        kept, left_out = counts[0] / counts[1], counts[2] / counts[3]
    memorised = kept - left_out
    return np.where(np.isnan(memorised), np.nan, np.stack([memorised, kept, left_out]))


def above(memorised: Floats) -> BoolArray:
    """Return which are above the threshold; 7/10 - 9/20, which is 0.25, is not, however it is rounded."""
    with np.errstate(invalid="ignore"):
        found: BoolArray = memorised > THRESHOLD + _ROUNDING
    return found


def class_sums(values: Floats, labels: IntArray, classes: int) -> Floats:
    """Return each class's sum of the values [N] that are not NaN, and their number: [2, C]."""
    known = ~np.isnan(values)
    return np.stack([np.bincount(labels[known], w, minlength=classes) for w in (values[known], known[known])])


def _pooled(sums: Sequence[Floats]) -> Floats:
    """Return each class's mean over the images of all seeds, NaN where there is none."""
    total, number = np.sum(sums, axis=0)
    with np.errstate(invalid="ignore"):
        means: Floats = total / number
    return means


def jackknife(trials: Sequence[Trials], classes: int, members: Sequence[IntArray]) -> tuple[Floats, Floats]:
    """Return the mean memorisation of each class, then of each list of classes, and its 95 % half-width: [C + G] each.

    A class's mean is over its images of all seeds; a list's is over its classes, where defined. The half-width is
    Student's t times the jackknife's standard error over the trainings, each seed being a stratum (Efron and Stein
    1981): it tells what other random parts and networks would give for these images. It is NaN where leaving out one
    training leaves nothing to average, and where all trainings say the same.
    """
    sums = [class_sums(one.scores()[0], one.labels, classes) for one in trials]
    whole = _pooled(sums)
    chosen = [group[~np.isnan(whole[group])] for group in members]

    def extended(means: Floats) -> Floats:
        return np.array([*means, *(means[group].mean() if len(group) else np.nan for group in chosen)])

    variance, freedom = np.zeros(classes + len(members)), 0
    for place, one in enumerate(trials):
        number, left, total = len(one.right), [], one.counts()
        for k in range(number):
            sums_k = class_sums(_scores(total - one.counts(k))[0], one.labels, classes)
            left.append(extended(_pooled([*sums[:place], sums_k, *sums[place + 1 :]])))
        variance += (number - 1) ** 2 / number * np.var(left, axis=0, ddof=1)
        freedom += number - 1
    variance[variance < _ROUNDING**2] = np.nan
    half: Floats = float(special.stdtrit(freedom, 0.975)) * np.sqrt(variance)
    return extended(whole), half


# -- what the result says ---------------------------------------------------------------------------------------------


def _measured(
    trials: Sequence[Trials], gaps: Sequence[Sequence[float | None]], groups: Sequence[str | None], classes: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return an entry a class, and one a group, None for a group without classes."""
    members = [np.array([k for k, g in enumerate(groups) if g == name], dtype=np.int64) for name in GROUPS]
    mean, half = jackknife(trials, classes, members)
    columns = {"memorization": mean[:classes]}
    for name, values in {
        "recall_kept": [one.scores()[1] for one in trials],
        "recall_left_out": [one.scores()[2] for one in trials],
        "above": [np.where(np.isnan(one.scores()[0]), np.nan, above(one.scores()[0])) for one in trials],
        "above_by_chance": [one.by_chance() for one in trials],
    }.items():
        columns[name] = _pooled([class_sums(v, one.labels, classes) for v, one in zip(values, trials, strict=True)])
    spread = [_over_seeds([of_seed[k] for of_seed in gaps]) for k in range(classes)]
    columns["spread_gap_deg"] = np.array([np.nan if one["mean"] is None else one["mean"] for one in spread])
    images = np.sum([np.bincount(one.labels, minlength=classes) for one in trials], axis=0)
    known = np.sum([class_sums(one.scores()[0], one.labels, classes)[1] for one in trials], axis=0)
    entries = [
        {
            **{name: _number(values[k]) for name, values in columns.items()},
            "ci95": _around(mean[k], half[k]),
            "spread_gap_ci95": spread[k]["ci95"],
            "images": int(known[k]),
            "undefined": int(images[k] - known[k]),
            "put_back": sum(one.put_back.count(k) for one in trials),
        }
        for k in range(classes)
    ]
    pooled = {
        name: {
            **{column: _mean(values[some]) for column, values in columns.items()},
            "memorization": _number(mean[classes + g]),
            "ci95": _around(mean[classes + g], half[classes + g]),
            "images": int(known[some].sum()),
            "undefined": int((images - known)[some].sum()),
        }
        if len(some)
        else None
        for g, (name, some) in enumerate(zip(GROUPS, members, strict=True))
    }
    return entries, pooled


def _over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Return the mean over seeds with Student's interval from three seeds on; None where it is undefined in any."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "ci95": None}
    found = paired([[value] for value in known])
    return {"mean": found.estimate, "ci95": as_list(found.ci95_seeds)}


def _total(trials: Sequence[Trials]) -> dict[str, Any]:
    """Return what holds for the images of all classes and seeds together."""
    scores = np.concatenate([one.scores() for one in trials], axis=1)
    known = ~np.isnan(scores[0])
    return {
        "images": int(known.sum()),
        "undefined": int((~known).sum()),
        **dict(zip(("memorization", "recall_kept", "recall_left_out"), map(_mean, scores), strict=True)),
        "above": _mean(np.where(known, above(scores[0]), np.nan)),
        "above_by_chance": _mean(np.concatenate([one.by_chance() for one in trials])),
    }


def _correlations(entries: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> dict[str, Any]:
    """Return the rank correlation of memorisation and spread gap over classes, and the same at equal rank of count."""
    values = np.array([[entry["memorization"], entry["spread_gap_deg"]] for entry in entries], dtype=np.float64)
    x, y = values.T
    whole, given = (rank_correlation(x, y, by) for by in (None, np.asarray(counts, dtype=np.float64)))
    return {"classes": int((~np.isnan(values).any(axis=1)).sum()), **whole, "given_counts": given}


def rank_correlation(x: Floats, y: Floats, given: Floats | None = None) -> dict[str, Any]:
    """Return Spearman's correlation over the pairs without NaN, partial where a third is `given`, and its interval.

    The interval is Bonett and Wright's (2000): Fisher's, with the variance (1 + r^2 / 2) / (n - 3), and one pair less
    for what is given. It is for other classes like these. All are None where they mean nothing: below three pairs (four
    where one is given), or where one does not vary; the interval also where r is 1 or -1, or four (five) pairs are not
    there.

    >>> x, y = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 3, 5, 4])
    >>> found = rank_correlation(x, y)
    >>> round(found["spearman"], 3), [round(end, 2) for end in found["ci95"]]
    (0.8, [-0.46, 0.99])
    """
    columns = [x, y] if given is None else [x, y, given]
    known = ~np.isnan(columns).any(axis=0)
    freedom = int(known.sum()) - len(columns) - 1
    if freedom < 0 or any(np.ptp(column[known]) == 0 for column in columns):
        return {"spearman": None, "ci95": None}
    ranks = np.corrcoef([stats.rankdata(column[known]) for column in columns])
    r = float(ranks[0, 1])
    if given is not None:
        (xz, yz), left = ranks[:2, 2], (1 - ranks[:2, 2] ** 2).prod()
        if left < _ROUNDING:
            return {"spearman": None, "ci95": None}
        r = float((r - xz * yz) / left**0.5)
    if freedom < 1 or abs(r) > 1 - _ROUNDING:
        return {"spearman": r, "ci95": None}
    half = Z * ((1 + r**2 / 2) / freedom) ** 0.5
    return {"spearman": r, "ci95": np.tanh(np.arctanh(r) + np.array([-half, half])).tolist()}


def _notes(trials: Sequence[Trials], settings: MemorizationSettings, names: Sequence[str]) -> list[str]:
    """Return what to mind about the draws."""
    put_back = [k for one in trials for k in one.put_back]
    undefined, found = sum(int(np.isnan(one.scores()[0]).sum()) for one in trials), []
    if put_back:
        classes = ", ".join(names[k] for k in sorted({*put_back}))
        found.append(
            f"parts without any image of a class got one of its images back, {len(put_back):,} times (classes"
            f" {classes}): what holds there is the difference that an image makes beside the others of its class"
        )
    if undefined:
        found.append(
            f"{undefined:,} of {sum(len(one.labels) for one in trials):,} images were kept by all trainings or by none:"
            " their memorisation is undefined and counts nowhere"
        )
    left_out = (1 - settings.share) * settings.trainings
    if left_out < ENOUGH:
        found.append(
            f"about {left_out:.3g} trainings leave out an image: read the means of classes, not single images, and the"
            " share above the threshold beside what chance gives"
        )
    return found


def _plain(values: Floats) -> list[float | None]:
    return [_number(value, 6) for value in values]


def _number(value: float, digits: int | None = None) -> float | None:
    return None if np.isnan(value) else float(value if digits is None else round(value, digits)) + 0.0


def _mean(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _around(mean: float, half: float) -> list[float] | None:
    """Return an interval, kept within what a difference of two shares can be."""
    return None if np.isnan(mean + half) else [max(-1.0, mean - half), min(1.0, mean + half)]
