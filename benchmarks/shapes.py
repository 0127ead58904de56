"""Shapes of feature sets, and the arithmetic that measuring them needs at least."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Features: rows, dimension, classes, and of how many classes the rival is measured."""

    rows: int
    dimension: int
    classes: int
    measured: int

    def __str__(self) -> str:
        """Name the shape."""
        return f"({self.rows:,}, {self.dimension:,}, {self.classes:,})"

    @property
    def features_bytes(self) -> int:
        """Size of the float32 features."""
        return 4 * self.rows * self.dimension


def train_counts(rows: int, classes: int) -> list[int]:
    """Return a long-tailed training count a class: from half of a class's rows down to a hundredth of that, at least 2.

    The class's other rows are unseen.

    >>> train_counts(50_000, 100)[0], train_counts(50_000, 100)[-1]
    (250, 2)
    """
    most = rows // classes // 2
    return [max(2, int(most * 100 ** (-k / (classes - 1)))) for k in range(classes)]


def flops(shape: Shape) -> float:
    """Return the floating-point operations of the matrix products that the definitions need.

    Per class the smaller of the Gram matrix and the covariance, unseen against training samples for the leave-one-out
    angles, and every sample against the classes' centres: training samples against both kinds.

    >>> flops(Shape(rows=40, dimension=10, classes=2, measured=1))
    12800.0
    """
    d, classes = shape.dimension, shape.classes
    per_class = shape.rows // classes
    total = 0.0
    for n in train_counts(shape.rows, classes):
        total += 2 * per_class * d * min(per_class, d)
        total += 2 * n * (per_class - n) * d
        total += 2 * d * classes * (n + per_class)
    return total
