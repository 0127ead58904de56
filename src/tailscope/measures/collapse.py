"""How far features have collapsed to one point a class, and how clearly classes are apart: one number for all classes.

Every class counts once, however many samples it has. Variances have the denominator n - 1, and no sample is paired with
itself, so that features which know nothing of the classes have a class separation of 0 on average; for classes of one
size the formulas are otherwise the papers'. Classes with fewer than two samples take no part. The unit of the features
does not matter.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from tailscope.effort import are_many_pairs, nearest_step
from tailscope.measures.fields import COLLAPSE, MOST
from tailscope.measures.rows import BLOCK_ELEMENTS, row_blocks

Numbers = dict[str, float | None]
ROUNDING = 1e-10


def collapse(
    features: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    means: Tensor | None = None,
) -> Numbers:
    """Measure features [n, d] with labels [n] from 0 to C-1: the fields of `COLLAPSE`, None where undefined.

    - `class_separation`: R^2 = 1 - d_within / d_total, with mean cosine distances of two samples of one class, and of
      two samples of any two classes (Kornblith et al. 2021, section 4.1).
    - `nc1` to `nc4`: neural collapse (Papyan, Han & Donoho 2020), with S_W and S_B the covariances within and between
      classes. Of NC3 the weights, too, are taken from their mean, which changes no prediction.
    - `cdnv`: class-distance normalised variance (Galanti, György & Hutter 2022, section 3).

    Args:
        features: of any floating-point type; sums are in float64. A row of zeros has the cosine 0 with every other.
        labels: classes that occur once only take no part, but for `nc4`.
        weight: [C, d] of a linear classifier; without it `nc3` and `nc4` are None.
        bias: [C]; 0 where it is not given.
        means: [C, d], with which `nc4` compares; of unseen samples, those of the training samples. By default those of
            these samples; a class whose mean is NaN is nearest to nothing.

    >>> found = collapse(torch.eye(3).repeat_interleave(2, 0), torch.tensor([0, 0, 1, 1, 2, 2]), torch.eye(3))
    >>> [round(value, 6) + 0.0 for value in found.values()]
    [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    found: Numbers = dict.fromkeys(COLLAPSE)
    labels = labels.to(features.device)
    counts = torch.bincount(labels, minlength=0 if weight is None else len(weight))
    kept = (counts > 1).nonzero().flatten()
    if len(kept) > 1:
        code = torch.full_like(counts, -1)
        code[kept] = torch.arange(len(kept), device=kept.device)
        found |= _geometry(features, code[labels], counts[kept], None if weight is None else weight[kept])
    if weight is not None and len(features):
        means = class_means(features, labels, len(counts)) if means is None else means
        found["nc4"] = _disagreement(features, weight, weight.new_zeros(len(weight)) if bias is None else bias, means)
    return {name: value if value is not None and abs(value) <= MOST else None for name, value in found.items()}


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return each class's mean, float64 [C, d]; NaN for one without samples."""
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64, device=features.device)
    for rows, own in _blocks(features, labels):
        sums.index_add_(0, own, rows)
    return sums / torch.bincount(labels[labels >= 0], minlength=classes)[:, None]


def _geometry(features: Tensor, code: Tensor, counts: Tensor, weight: Tensor | None) -> Numbers:
    """Return what is measured on classes of two samples or more; rows with the code -1 take no part."""
    means = class_means(features, code, len(counts))
    centred = means - means.mean(dim=0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    real = sizes > ROUNDING * torch.linalg.vector_norm(means, dim=1).max()
    basis = axes[real].T / sizes[real]  # of the inverse root of S_B, but for a factor that cancels
    scatter, projected = _within(features, code, means, basis)
    found: Numbers = {"class_separation": _separation(features, code, counts)}
    if bool(real.any()):
        found["nc1"] = (projected / (counts - 1)).mean().item()
        found |= _simplex(centred) | {"nc3": _duality(centred, weight), "cdnv": _cdnv(means, scatter / (counts - 1))}
    return found


def _blocks(features: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows in float64, a block at a time, and their labels; rows with the label -1 take no part."""
    start = 0
    for block in row_blocks(features):
        own = labels[start : start + len(block)]
        used = own >= 0
        yield (block.double(), own) if bool(used.all()) else (block[used].double(), own[used])
        start += len(block)


def _within(features: Tensor, code: Tensor, means: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return each class's squared deviations from its mean, summed, as they are and after a projection, [C] each."""
    scatter, projected = (means.new_zeros(len(means)) for _ in range(2))
    narrow = torch.float64 if features.dtype == torch.float64 else torch.float32
    for rows, own in _blocks(features, code):
        deviations = rows - means[own]
        scatter.index_add_(0, own, deviations.square().sum(dim=1))
        along = deviations.to(narrow) @ basis.to(narrow)
        projected.index_add_(0, own, along.square().sum(dim=1).double())
    return scatter, projected


def _separation(features: Tensor, code: Tensor, counts: Tensor) -> float | None:
    """Return 1 - d_within / d_total by the class means of unit vectors: mean cosines are their products."""
    means = features.new_zeros(len(counts), features.shape[1], dtype=torch.float64)
    squares, number = means.new_zeros(len(counts)), len(counts)
    for rows, own in _blocks(features, code):
        unit = functional.normalize(rows, eps=1e-300)
        means.index_add_(0, own, unit)
        squares.index_add_(0, own, unit.square().sum(dim=1))
    cosines = (means.square().sum(dim=1) - squares) / (counts * (counts - 1))
    means /= counts[:, None]
    between = (means.sum(dim=0).square().sum() - means.square().sum()) / (number * (number - 1))
    within, apart = (1 - cosines.mean()).item(), (1 - between).item()
    total = within / number + apart * (number - 1) / number
    return 1 - within / total if total > ROUNDING else None


def _simplex(centred: Tensor) -> Numbers:
    """Return how far class means, taken from their mean, are from equal lengths and equal angles."""
    lengths = torch.linalg.vector_norm(centred, dim=1)
    found: Numbers = {"nc2_lengths": (lengths.std(correction=0) / lengths.mean()).item()}
    if lengths.min() > ROUNDING * lengths.max():
        number = len(centred)
        unit = centred / lengths[:, None]
        if are_many_pairs(number):
            total = sum((part @ unit.T + 1 / (number - 1)).abs().sum().item() for part in row_blocks(unit, number))
            own = (unit.square().sum(dim=1) + 1 / (number - 1)).sum().item()
            found["nc2_angles"] = (total - own) / (number * (number - 1))
            return found
        off = ~torch.eye(number, dtype=torch.bool, device=unit.device)
        found["nc2_angles"] = ((unit @ unit.T)[off] + 1 / (number - 1)).abs().mean().item()
    return found


def _duality(centred: Tensor, weight: Tensor | None) -> float | None:
    if weight is None:
        return None
    other = weight.to(centred)
    other = other - other.mean(dim=0)
    length = torch.linalg.vector_norm(other)
    return (other / length - centred / torch.linalg.vector_norm(centred)).square().sum().item() if length > 0 else None


def _cdnv(means: Tensor, variances: Tensor) -> float | None:
    """Return the mean over pairs of classes; None where two means are the same."""
    total, number = 0.0, len(means)
    if are_many_pairs(number):
        return _cdnv_in_blocks(means, variances)
    for k in range(number - 1):
        apart = (means[k + 1 :] - means[k]).square().sum(dim=1)
        if not apart.min() > 0:
            return None
        total += ((variances[k] + variances[k + 1 :]) / (2 * apart)).sum().item()
    return total / (number * (number - 1) / 2)


def _cdnv_in_blocks(means: Tensor, variances: Tensor) -> float | None:
    """Return the same for many classes: squared distances come from products, good to nine digits."""
    centred, total, number = means - means.mean(dim=0), 0.0, len(means)
    squares = centred.square().sum(dim=1)
    for block in torch.split(torch.arange(number, device=means.device), max(1, BLOCK_ELEMENTS // number)):
        sums = squares[block, None] + squares
        apart = sums - 2 * centred[block] @ centred.T
        apart[torch.arange(len(block)), block] = torch.inf
        if not (apart > ROUNDING * sums).all():
            return None
        total += ((variances[block, None] + variances) / (4 * apart)).sum().item()
    return total / (number * (number - 1) / 2)


def _disagreement(features: Tensor, weight: Tensor, bias: Tensor, means: Tensor) -> float:
    """Return the share of rows whose largest logit and nearest mean are not of one class, of every k-th of many."""
    origin = means[~means.isnan().any(dim=1)].mean(dim=0)
    centres = (means - origin).to(features.device)
    half = torch.nan_to_num(0.5 * centres.square().sum(dim=1), nan=torch.inf)
    centres, wide, other = torch.nan_to_num(centres), weight.double(), 0
    features = features[:: nearest_step(len(features), features.shape[1], len(weight))]
    for rows, _ in _blocks(features, torch.zeros(len(features), device=features.device)):
        for part in row_blocks(rows, len(weight)):
            by_logit = (part @ wide.T + bias.double()).argmax(dim=1)
            other += int((by_logit != ((part - origin) @ centres.T - half).argmax(dim=1)).sum())
    return other / len(features)
