"""Rows of a feature matrix, grouped by class once and checked once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailscope.errors import UserError
from tailscope.geometry.lengths import far, log2_lengths, row_blocks, without


@dataclass(frozen=True)
class ClassRows:
    """The usable rows of one feature matrix [n, d], sorted by class: class k owns `order[starts[k]:starts[k + 1]]`.

    `dropped[k]` counts the class's rows without a direction (of length 0, or as good as 0) and `far[k]` those over 100
    times as long as the median row, which `order` leaves out; `alive`, bool [d], says which features are not 0 in every
    row, and `lengths`, float64 [n], are the binary logarithms of the rows' lengths.
    """

    features: Tensor
    order: Tensor
    starts: list[int]
    dropped: list[int]
    alive: Tensor
    far: list[int]
    lengths: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """float64 for float64 features, float32 for every other kind."""
        return torch.float64 if self.features.dtype == torch.float64 else torch.float32

    def index(self, k: int) -> Tensor:
        """Return the row numbers of class k in the original matrix."""
        return self.order[self.starts[k] : self.starts[k + 1]]

    def count(self, k: int) -> int:
        """Return the number of usable rows of class k."""
        return self.starts[k + 1] - self.starts[k]

    def labels(self) -> Tensor:
        """Return the class of each entry of `order`."""
        counts = torch.tensor(self.starts).diff()
        return torch.repeat_interleave(counts).to(self.order.device)


def group_rows(features: Tensor, labels: Tensor, class_names: Sequence[str], what: str) -> ClassRows:
    """Check features [n, d] and labels [n] and group the rows by class with one stable sort.

    Args:
        features: any floating dtype, any device.
        labels: integers in 0 ... C-1.
        class_names: C names, used in messages.
        what: "train" or "unseen", used in messages.

    Raises:
        UserError: wrong shapes or dtypes, labels out of range, features that are NaN, infinite or subnormal.
    """
    features = features.detach()
    _check_shapes(features, labels, len(class_names), what)
    lengths = log2_lengths(features, f"{what} features")
    nothing, beyond = without(lengths), far(lengths)
    labels = labels.to(device=features.device, dtype=torch.long)
    classes = len(class_names)
    kept = (~(nothing | beyond)).nonzero().flatten()
    order = kept[torch.argsort(labels[kept], stable=True)]
    counts = torch.bincount(labels[kept], minlength=classes)
    dropped, distant = (torch.bincount(labels[rows], minlength=classes).tolist() for rows in (nothing, beyond))
    starts = [0, *torch.cumsum(counts, 0).tolist()]
    return ClassRows(features, order, starts, dropped, _alive(features), distant, lengths)


def gather(train: ClassRows, unseen: ClassRows, k: int) -> Tensor:
    """Return a copy of class k's rows [n + m, d], training rows first."""
    n, m = train.count(k), unseen.count(k)
    dtype = torch.promote_types(train.dtype, unseen.dtype)
    rows = torch.empty(n + m, train.features.shape[1], dtype=dtype, device=train.features.device)
    for part, source in ((rows[:n], train), (rows[n:], unseen)):
        if source.features.dtype == dtype:
            torch.index_select(source.features, 0, source.index(k), out=part)
        else:
            part.copy_(source.features[source.index(k)])
    return rows


def _check_shapes(features: Tensor, labels: Tensor, classes: int, what: str) -> None:
    if features.ndim != 2 or not features.is_floating_point():
        got = f"{features.dtype} {list(features.shape)}"
        raise UserError(f"{what} features: expected floating-point numbers of shape [n, d], got {got}")
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
        raise UserError(f"{what} labels: expected integers of shape [n], got {labels.dtype} {list(labels.shape)}")
    if len(labels) != len(features):
        raise UserError(f"{what}: {len(features)} feature rows but {len(labels)} labels")
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        low, high = int(labels.min()), int(labels.max())
        raise UserError(f"{what} labels: found {low} to {high}, expected 0 to {classes - 1} for {classes} class names")


def _alive(features: Tensor) -> Tensor:
    """Return which features are ever not 0, bool [d]."""
    alive = torch.zeros(features.shape[1], dtype=torch.bool, device=features.device)
    for block in row_blocks(features):
        alive |= (block != 0).any(dim=0)
        if bool(alive.all()):
            break
    return alive
