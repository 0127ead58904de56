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
from tailscope.diagnosis.label_match import MARGIN, Match, cycles, match_labels
from tailscope.errors import UserError
from tailscope.feature_table import FeatureTable
from tailscope.geometry.duplicates import find_copies, unseen_copies
from tailscope.geometry.lengths import FAR, exponent, far, log2_lengths, median, scaled
from tailscope.geometry.rows import ClassRows, gather, group_rows
from tailscope.report.text import percent

if TYPE_CHECKING:
    from tailscope.diagnosis.outcomes import Outcomes

NAMED = 5
FEW = 20
MOST_APART = 4.0  # times the median length of another file's rows; memorised features are up to 1.3 times as long
RESCALED = 1.4  # times the spread within classes, and times the distances of their centres, of another file
SAME_FACTOR = 0.25  # of its logarithm: how far the two factors may differ
SURE = 5.0  # standard errors
FOLDS, MOST_CLASSES = 10, 1000
EVEN, UNEVEN = 0.002, 0.02  # deviation of the logarithms of lengths in normalised features, and in others
BELOW = -3.0  # standard errors


def lengths_of(table: FeatureTable) -> Tensor:
    """Return the logarithms of the lengths of a file's rows, as `log2_lengths`, whose messages name the file."""
    return log2_lengths(table.features, f"{table.source}: features")


def far_notes(table: FeatureTable) -> list[str]:
    """Return a warning that names the rows over 100 times as long as the median one, by number and id."""
    lengths = lengths_of(table)
    beyond = far(lengths)
    found = beyond.nonzero().flatten().tolist()
    if not found:
        return []
    rows = [f"{row}" if table.ids is None else f"{row} (id {table.ids[row]})" for row in found[:NAMED]]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    times = 2.0 ** min(1000.0, lengths.max().item() - (median(lengths[~beyond]) or 0.0))
    what, are = ("row", "is") if len(found) == 1 else ("rows", "are up to")
    return [
        f"{table.source}: {what} {', '.join(rows)}{more} {are} {times:,.0f} times as long as the median row, over "
        f"{FAR:.0f} times: left out of fits, measures and scores"
    ]


def without_far_rows(inputs: Mapping[str, Inputs]) -> dict[str, Inputs]:
    """Return all encoders' inputs without the rows that are far too long in any of them, so that they stay paired.

    Raises:
        UserError: a class, or a file, has no other rows.
    """
    found = dict(inputs)
    for part in ("train", "unseen", "test"):
        while (beyond := _far_in_any(found, part)).any():
            kept = (~beyond).nonzero().flatten()
            for name, one in found.items():
                table = getattr(one, part)
                fewer = table.take(kept)
                empty = [k for k, count in enumerate(fewer.counts()) if part == "train" and not count]
                if empty or not len(kept):
                    which = f"class {one.names[empty[0]]!r}" if empty else "the file"
                    named = [note for other in inputs.values() for note in far_notes(getattr(other, part))]
                    raise UserError(f"{named[0]}; {which} has no other rows: mend or remove them")
                found[name] = replace(one, **{part: fewer})
    return found


def _far_in_any(inputs: Mapping[str, Inputs], part: str) -> Tensor:
    """Return which rows of a part are far too long in some encoder's file, bool [n]; none where there is no file."""
    tables = [table for one in inputs.values() if (table := getattr(one, part)) is not None]
    return torch.stack([far(lengths_of(table)) for table in tables]).any(dim=0) if tables else torch.zeros(0).bool()


def fit_scale(inputs: Inputs) -> int:
    """Return the power of two by which all of an encoder's features are multiplied before classifiers are fitted."""
    return exponent(lengths_of(inputs.train), lengths_of(inputs.unseen))


def doubts(inputs: Mapping[str, Inputs]) -> list[str]:
    """Return why no verdict may be given on these files; what is found in one encoder's holds for all of them.

    A check is made where those before it found nothing: at another scale, labels seem to differ as well.
    """
    for check in (_lengths, _labels, _copies):
        found: dict[str, None] = {}
        for one in inputs.values():
            for option, held_out in (("--unseen", one.unseen), ("--test", one.test)):
                if held_out is not None:
                    found |= dict.fromkeys(check(one, held_out, f"{option} ({named(held_out.source)})"))
        if found:
            return list(found)
    return []


def doubts_of_outcomes(inputs: Inputs, outcomes: "Outcomes") -> list[str]:
    """Return why no verdict may be given on these outcomes: a classifier that is worse than guessing."""
    train = _train(inputs)
    if inputs.classifier is not None:
        reasons = _classifier(inputs, outcomes.predicted_train, f"--classifier ({named(inputs.classifier.source)})")
        if reasons:
            return reasons
    low = (outcomes.bound.accuracy.ci95 or (0.0, 1.0))[0]
    most = np.bincount(outcomes.labels).max() / len(outcomes.labels)
    if not (below_chance(outcomes.predicted, outcomes.labels) and low > most):
        return []
    scored = f"{'--unseen' if inputs.test is None else '--test'} ({named(inputs.scored.source)})"
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
        rows = _listed([f"its row {row} gets class {names[k]!r} of --train" for k, row in sorted(mixed.items())])
        return [f"the rows of {name} and the labels of {_train(inputs)} seem to mean different classes: {rows}"]
    if below_chance(predicted, labels):
        right = f"{percent((predicted == labels).mean())} of {_train(inputs)}"
        return [f"{name} gets {right} right, fewer than guessing would: it seems to belong to other features"]
    return []


def withhold(judged: dict[str, Any], reasons: Sequence[str]) -> None:
    """Take the verdict back, in place: overall, of groups and of classes; advise to mend the files instead."""
    verdict = judged["verdict"]
    parts = [verdict, *filter(None, verdict["groups"].values()), *verdict["classes"]]
    for part in parts:
        part |= {"bottleneck": "undecided", "reason": reasons[0]}
    verdict["withheld"] = list(reasons)
    text = "No remedy can be advised before the files belong together: see the first warning."
    judged["advice"] = [
        {"about": "evidence", "text": text, "remedy": None, "classes": [], "gain": None, "at_most": True}
    ]


def _labels(inputs: Inputs, held_out: FeatureTable, name: str) -> list[str]:
    """Say where the labels of held-out samples mean other classes than those of training samples."""
    match = _match(inputs.train, held_out, inputs.names)
    if match.agree:
        return []
    option = name.split()[0]
    pairs = [
        f"class {inputs.names[a]!r} of {option} looks like class {inputs.names[b]!r} of --train" for a, b in match.pairs
    ]
    which = f": {_listed(pairs)}" if pairs else ", or their features do not come from one encoder"
    return [f"the labels of {name} and of {_train(inputs)} seem to mean different classes{which}"]


def _match(train: FeatureTable, held_out: FeatureTable, names: Sequence[str]) -> Match:
    return match_labels(*_grouped(train, held_out, names))


def _grouped(train: FeatureTable, held_out: FeatureTable, names: Sequence[str]) -> list[ClassRows]:
    """Return both files' rows by class, at one scale where nothing overflows."""
    sides = [group_rows(table.features, table.labels, names, table.source) for table in (train, held_out)]
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


def _lengths(inputs: Inputs, held_out: FeatureTable, name: str) -> list[str]:
    """Say where rows of two files are not of one scale: one was normalised or multiplied, the other not."""
    sides = [lengths[lengths > -math.inf] for lengths in (lengths_of(inputs.train), lengths_of(held_out))]
    if min(map(len, sides)) < FEW:
        return []
    apart = sides[1].median().item() - sides[0].median().item()
    spreads = [side.std().item() for side in sides]
    if abs(apart) > math.log2(MOST_APART):
        how = f"are {2.0 ** max(-1000.0, min(1000.0, apart)):.2g} times as long as those of {_train(inputs)}"
    elif min(spreads) < EVEN and max(spreads) > UNEVEN and inputs.train.width > 2:
        even, other = (name, _train(inputs)) if spreads[1] < spreads[0] else (_train(inputs), name)
        how = f"and of {_train(inputs)} differ: those of {even} are all of one length, those of {other} are not"
    elif (factor := common_factor(*_grouped(inputs.train, held_out, inputs.names))) is not None:
        how = f"lie {factor:.2g} times as far apart as those of {_train(inputs)}, within classes and between them"
    else:
        return []
    return [f"the rows of {name} {how}; one file seems to be scaled or normalised: extract both in the same way"]


def _copies(inputs: Inputs, held_out: FeatureTable, name: str) -> list[str]:
    """Say where most held-out samples are training samples, unless equal rows are usual within the training samples."""
    first, second = (
        group_rows(table.features, table.labels, inputs.names, table.source) for table in (inputs.train, held_out)
    )
    share = unseen_copies(first, second).double().mean().item()
    if share <= 0.5:
        return []
    own = (gather(first, first, k)[: first.count(k)] for k in range(len(first.starts) - 1))
    if sum(find_copies(rows, len(rows)).repeats for rows in own) > len(inputs.train) / 2:
        return []
    return [
        f"{percent(share, 0)} of the rows of {name} are also in {_train(inputs)}: too few held-out samples are left "
        "to judge by; give samples that had no part in training"
    ]


def _listed(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return ", ".join(texts[:NAMED]) + more


def _train(inputs: Inputs) -> str:
    return f"--train ({named(inputs.train.source)})"
