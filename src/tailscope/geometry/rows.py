"""Rows of a feature matrix, grouped by class once and checked once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailscope.errors import UserError

BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class ClassRows:
    """The usable rows of one feature matrix [n, d], sorted by class: class k owns `order[starts[k]:starts[k + 1]]`.

    `dropped[k]` counts the class's rows without a direction (zero norm), which `order` leaves out; `alive`, bool [d],
    says which features are not 0 in every row.
    """

    features: Tensor
    order: Tensor
    starts: list[int]
    dropped: list[int]
    alive: Tensor

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
        UserError: wrong shapes or dtypes, labels out of range, NaN or infinite features.
    """
    features = features.detach()
    _check_shapes(features, labels, len(class_names), what)
    usable, alive = _usable(features, what)
    labels = labels.to(device=features.device, dtype=torch.long)
    classes = len(class_names)
    kept = usable.nonzero().flatten()
    order = kept[torch.argsort(labels[kept], stable=True)]
    counts = torch.bincount(labels[kept], minlength=classes)
    dropped = torch.bincount(labels[~usable], minlength=classes)
    starts = [0, *torch.cumsum(counts, 0).tolist()]
    return ClassRows(features, order, starts, dropped.tolist(), alive)


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


def _usable(features: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Return which rows have a direction and which features are ever not 0; refuse rows that are not finite."""
    wide = torch.promote_types(features.dtype, torch.float32)
    norms = []
    alive, all_alive = torch.zeros(features.shape[1], dtype=torch.bool, device=features.device), False
    for block in torch.split(features, max(1, BLOCK_ELEMENTS // max(1, features.shape[1]))):
        norms.append(torch.linalg.vector_norm(block, dim=1, dtype=wide))
        if not all_alive:
            alive |= (block != 0).any(dim=0)
            all_alive = bool(alive.all())
    norm = torch.cat(norms)
    wrong = (~torch.isfinite(norm)).nonzero().flatten()
    if len(wrong):
        huge = bool(torch.isfinite(features[wrong]).all())
        cause = f"too large to square in {str(wide).removeprefix('torch.')}" if huge else "NaN or infinite"
        mend = "; divide all features by one number" if huge else ""
        raise UserError(f"{what} features: {len(wrong)} rows are {cause}, the first is row {int(wrong[0])}{mend}")
    return norm > 0, alive
