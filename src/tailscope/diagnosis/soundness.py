"""Whether inputs can carry a verdict: rows that are no samples of anything, and files that do not belong together.

A row over 100 times as long as the median one is named and left out. Where labels of two files mean different classes,
where one file's features were scaled and another's not, or where held-out samples are training samples, every number
of a diagnosis is right and every conclusion from it wrong: then the verdict is withheld, and the reason names them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tailscope.diagnosis.inputs import Inputs, named
from tailscope.diagnosis.label_match import MARGIN, cycles, match_labels
from tailscope.errors import first_few
from tailscope.measures.rows import ClassRows, exponent, find_copies, gather, scaled, unseen_copies
from tailscope.report.text import percent

if TYPE_CHECKING:
    from tailscope.diagnosis.outcomes import Outcomes

FEW = 20
MOST_APART = 4.0  # times the median length of another file's rows; memorised features are up to 1.3 times as long
RESCALED = 1.4  # times the spread within classes, and times the distances of their centres, of another file
SAME_FACTOR = 0.25  # of its logarithm: how far the two factors may differ
SURE = 5.0  # standard errors
FOLDS, MOST_CLASSES = 10, 1000
EVEN, UNEVEN = 0.002, 0.02  # deviation of the logarithms of lengths in normalised features, and in others
BELOW = -3.0  # standard errors


def fit_scale(inputs: Inputs) -> int:
    """Return the power of two by which all of an encoder's features are multiplied before classifiers are fitted."""
    return exponent(inputs.rows["train"].lengths, inputs.rows["unseen"].lengths)


def doubts(inputs: Mapping[str, Inputs]) -> list[str]:
    """Return why no verdict may be given on these files; what is found in one encoder's holds for all of them.

    A check is made where those before it found nothing: at another scale, labels seem to differ as well.
    """
    for check in (_lengths, _labels, _copies):
        found: dict[str, None] = {}
        for one in inputs.values():
            for part in [*one.tables][1:]:
                found |= dict.fromkeys(check(one, part))
        if found:
            return list(found)
    return []


def doubts_of_outcomes(inputs: Inputs, outcomes: "Outcomes") -> list[str]:
    """Return why no verdict may be given on these outcomes: a classifier that is worse than guessing."""
    train = inputs.option("train")
    if inputs.classifier is not None:
        reasons = _classifier(inputs, outcomes.predicted_train, f"--classifier ({named(inputs.classifier.source)})")
        if reasons:
            return reasons
    low = (outcomes.bound.accuracy.ci95 or (0.0, 1.0))[0]
    most = np.bincount(outcomes.labels).max() / len(outcomes.labels)
    if not (below_chance(outcomes.predicted, outcomes.labels) and low > most):
        return []
    scored = inputs.option("unseen" if inputs.test is None else "test")
    return [
        f"the labels of {scored} and of {train} seem to mean different classes: the classifier in use gets "
        f"{percent(outcomes.current.mean())} of {scored} right, fewer than guessing would, one fitted to held-out "
        f"samples {percent(outcomes.bound.accuracy.estimate)}"
    ]


def below_chance(predicted: Any, labels: Any) -> bool:
    """Return whether predictions are right less often than if they had nothing to do with the labels, beyond noise.

    >>> below_chance(np.arange(100) % 2, (np.arange(100) + 1) % 2), below_chance(np.zeros(100, int), np.arange(100) % 2)
    (True, False)
    """
    classes = int(max(predicted.max(), labels.max())) + 1
    shares = [np.bincount(codes, minlength=classes) / len(codes) for codes in (predicted, labels)]
    chance = float(shares[0] @ shares[1])
    deviation = math.sqrt(chance * (1 - chance) / len(labels))
    return bool((predicted == labels).mean() < chance + BELOW * deviation)


def mixed_rows(predicted: Any, labels: Any, classes: int) -> dict[int, int]:
    """Return the classes that a classifier takes for one another as if its rows were in another order: class -> row.

    Of the assignments of classes to rows by which most samples of each class are right, it takes the cycles that get
    half of their samples more right than the given one, beyond the best of so many assignments by chance.

    >>> labels = np.repeat(np.arange(3), 20)
    >>> mixed_rows(np.array([1, 0, 2])[labels], labels, 3), mixed_rows(np.zeros(60, int), labels, 3)
    ({0: 1, 1: 0}, {})
    """
    from scipy.optimize import linear_sum_assignment  # here because it takes a tenth of a second to import

    hits = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    recall = hits / np.maximum(1, hits.sum(axis=1, keepdims=True))
    assigned = dict(enumerate(linear_sum_assignment(-recall)[1].tolist()))
    found: dict[int, int] = {}
    for cycle in cycles(assigned):
        rows = [assigned[k] for k in cycle]
        gain = (recall[cycle, rows] - recall[cycle, cycle]).mean()
        after, before = hits[cycle, rows].sum(), hits[cycle, cycle].sum()
        z_squared = (after - before) ** 2 / max(1, after + before)
        if gain >= 0.5 and z_squared > MARGIN + 2 * len(cycle) * math.log(classes):
            found |= {k: assigned[k] for k in cycle}
    return found


def _classifier(inputs: Inputs, predicted: Any, name: str) -> list[str]:
    """Say where a given classifier's rows mean other classes than the training labels."""
    labels, names = inputs.train.labels.numpy(), inputs.names
    mixed = mixed_rows(predicted, labels, len(names))
    if mixed:
        rows = first_few([f"its row {row} gets class {names[k]!r} of --train" for k, row in sorted(mixed.items())])
        return [f"the rows of {name} and the labels of {inputs.option('train')} seem to mean different classes: {rows}"]
    if below_chance(predicted, labels):
        right = f"{percent((predicted == labels).mean())} of {inputs.option('train')}"
        return [f"{name} gets {right} right, fewer than guessing would: it seems to belong to other features"]
    return []


def _labels(inputs: Inputs, part: str) -> list[str]:
    """Say where the labels of held-out samples mean other classes than those of training samples."""
    match = match_labels(*_scaled_alike(inputs, part))
    if match.agree:
        return []
    names = inputs.names
    pairs = [f"class {names[a]!r} of --{part} looks like class {names[b]!r} of --train" for a, b in match.pairs]
    which = f": {first_few(pairs)}" if pairs else ", or their features do not come from one encoder"
    both = f"{inputs.option(part)} and of {inputs.option('train')}"
    return [f"the labels of {both} seem to mean different classes{which}"]


def _scaled_alike(inputs: Inputs, part: str) -> list[ClassRows]:
    """Return the rows of training and held-out samples by class, at one scale where nothing overflows."""
    sides = [inputs.rows["train"], inputs.rows[part]]
    power = exponent(*(side.lengths for side in sides))
    kind = torch.promote_types(*(side.features.dtype for side in sides))
    return [replace(side, features=scaled(side.features, power).to(kind)) for side in sides]


def common_factor(train: ClassRows, unseen: ClassRows) -> float | None:
    """Return by which factor the spread within classes and the distances of their centres both differ, or None.

    Memorised training samples spread less but their centres do not lie nearer; where held-out centres shrink, the
    spread stays. Standard errors are those of a jackknife over tenths of every class.
    """
    classes = [k for k in range(len(train.starts) - 1) if min(train.count(k), unseen.count(k)) >= 4][:MOST_CLASSES]
    if len(classes) < 2:
        return None
    weights = [min(train.count(k), unseen.count(k)) for k in classes]
    first, second = (_sizes(rows, classes, weights) for rows in (train, unseen))
    if not (min(first.min(), second.min()) > 0):
        return None
    found = 0.5 * torch.log(second / first)  # [spread and distance, all samples and without each fold]
    factors, folds = found[:, 0], found[:, 1:]
    errors = folds.std(dim=1, correction=0) * math.sqrt(FOLDS - 1)
    sure = bool((factors.abs() > torch.maximum(SURE * errors, errors.new_tensor(math.log(RESCALED)))).all())
    apart = (factors[0] - factors[1]).abs()
    if not sure or apart > SAME_FACTOR * factors.abs().min():
        return None
    return math.exp(factors[0].item())


def _sizes(rows: ClassRows, classes: Sequence[int], weights: Sequence[float]) -> Tensor:
    """Return the mean variance within classes, and the squared distances of their centres without their noise.

    Returns:
        float64 [2, 1 + FOLDS], of all samples and without those of each fold.
    """
    origin, total = rows.features[rows.index(classes[0])].double().mean(dim=0), sum(weights)
    spread, apart, middle = torch.zeros(FOLDS + 1), torch.zeros(FOLDS + 1), torch.zeros(FOLDS + 1, len(origin))
    spread, apart, middle = (part.to(origin) for part in (spread, apart, middle))
    for k, weight in zip(classes, weights, strict=True):
        part = rows.features[rows.index(k)].double() - origin
        mean = part.mean(dim=0)
        part -= mean
        out = torch.zeros(FOLDS + 1, len(part)).to(part)
        out[torch.arange(len(part)) % FOLDS + 1, torch.arange(len(part))] = 1
        left, moved = len(part) - out.sum(dim=1), -(out @ part)
        squares = part.square().sum(dim=1)
        variance = (squares.sum() - out @ squares - moved.square().sum(dim=1) / left) / (left - 1)
        centers = mean + moved / left[:, None]
        spread += weight / total * variance
        apart += weight * (centers.square().sum(dim=1) - (1 - weight / total) * variance / left)
        middle += weight * centers
    return torch.stack([spread, apart / total - (middle / total).square().sum(dim=1)])


def _lengths(inputs: Inputs, part: str) -> list[str]:
    """Say where rows of two files are not of one scale: one was normalised or multiplied, the other not."""
    name, train = inputs.option(part), inputs.option("train")
    sides = [lengths[lengths > -math.inf] for lengths in (inputs.rows[each].lengths for each in ("train", part))]
    if min(map(len, sides)) < FEW:
        return []
    apart = sides[1].median().item() - sides[0].median().item()
    spreads = [side.std().item() for side in sides]
    if abs(apart) > math.log2(MOST_APART):
        how = f"are {2.0 ** max(-1000.0, min(1000.0, apart)):.2g} times as long as those of {train}"
    elif min(spreads) < EVEN and max(spreads) > UNEVEN and inputs.train.width > 2:
        even, other = (name, train) if spreads[1] < spreads[0] else (train, name)
        how = f"and of {train} differ: those of {even} are all of one length, those of {other} are not"
    elif (factor := common_factor(*_scaled_alike(inputs, part))) is not None:
        how = f"lie {factor:.2g} times as far apart as those of {train}, within classes and between them"
    else:
        return []
    return [f"the rows of {name} {how}; one file seems to be scaled or normalised: extract both in the same way"]


def _copies(inputs: Inputs, part: str) -> list[str]:
    """Say where most held-out samples are training samples, unless equal rows are usual within the training samples."""
    first = inputs.rows["train"]
    share = unseen_copies(first, inputs.rows[part]).double().mean().item()
    if share <= 0.5:
        return []
    own = (gather(first, first, k)[: first.count(k)] for k in range(len(first.starts) - 1))
    if sum(find_copies(rows, len(rows)).repeats for rows in own) > len(inputs.train) / 2:
        return []
    return [
        f"{percent(share, 0)} of the rows of {inputs.option(part)} are also in {inputs.option('train')}: too few "
        "held-out samples are left to judge by; give samples that had no part in training"
    ]
