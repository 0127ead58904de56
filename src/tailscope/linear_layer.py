"""The linear layer that turns features into logits, as a file: `weight` [C, d], `bias` [C], optional `class_names`.

A single row, as scikit-learn has it for two classes, is a score for the second: it becomes two rows, minus and plus
half of it, whose softmax gives the same probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tailscope import array_files
from tailscope.errors import UserError
from tailscope.field_checks import match_names, require_finite, to_floats, to_names


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """`logits(x) = weight @ x + bias`. Build one with `load` or `from_arrays`, which check everything.

    Attributes:
        weight: floating-point [C, d], finite.
        bias: the same type, [C], finite.
        class_names: [C] names of the rows, or None: then row k is label k.
        source: what messages call this classifier: its file.
        notes: what was left out in reading the source.
    """

    weight: Tensor
    bias: Tensor
    class_names: tuple[str, ...] | None = None
    source: str = "the classifier"
    notes: tuple[str, ...] = ()

    @classmethod
    def from_arrays(
        cls,
        weight: npt.ArrayLike | Tensor,
        bias: npt.ArrayLike | Tensor | None = None,
        *,
        class_names: npt.ArrayLike | None = None,
        source: str = "the classifier",
        notes: Sequence[str] = (),
    ) -> "LinearLayer":
        """Check arrays or tensors and make a classifier of them; no bias is a bias of zero, a single row becomes two.

        >>> LinearLayer.from_arrays([[2.0, 4.0]], [1.0]).weight.tolist()
        [[-1.0, -2.0], [1.0, 2.0]]

        Raises:
            UserError: a field has the wrong type, shape or length, or values are NaN or infinite.
        """
        rows = to_floats(f"{source}: weight", weight, "[C, d]")
        offsets = rows.new_zeros(len(rows)) if bias is None else to_floats(f"{source}: bias", bias, "[C]").to(rows)
        names = None if class_names is None else to_names(source, class_names, numbers=True)
        if len(rows) == len(offsets) == 1:
            rows, offsets = (torch.cat([-half, half]) for half in (rows / 2, offsets / 2))
        for field, length in [("bias", len(offsets)), ("class_names", len(rows) if names is None else len(names))]:
            if length != len(rows):
                raise UserError(f"{source}: {field} has length {length}, but weight has {len(rows)} rows")
        require_finite(f"{source}: weight", rows)
        require_finite(f"{source}: bias", offsets[:, None])
        return cls(rows, offsets, names, source, tuple(notes))

    @classmethod
    def load(cls, path: Path) -> "LinearLayer":
        """Read a classifier from a file with the fields of `from_arrays`, or scikit-learn's names for them.

        Raises:
            UserError: as `FeatureTable.load`.
        """
        arrays, notes = array_files.read(path, ("weight",), ("bias", "class_names"))
        fields: dict[str, Any] = dict(arrays)
        return cls.from_arrays(**fields, source=array_files.shown(path), notes=notes)

    def save(self, path: Path) -> None:
        """Write the classifier as `.npz` or `.safetensors`, whole or not at all."""
        arrays: array_files.Arrays = {"weight": self.weight.cpu().numpy(), "bias": self.bias.cpu().numpy()}
        if self.class_names is not None:
            arrays["class_names"] = np.array(self.class_names, dtype=np.str_)
        array_files.write(path, arrays)

    def logits(self, features: Tensor) -> Tensor:
        """Features [n, d] -> logits [n, C], in float32 or the classifier's wider type."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return features.to(dtype) @ self.weight.to(dtype).T + self.bias.to(dtype)

    def aligned(self, class_names: Sequence[str], width: int, source: str) -> "LinearLayer":
        """Return the classifier with row k for `class_names[k]`: by name where it has names, else as it is.

        Args:
            class_names: the [C] classes of the features.
            width: their d.
            source: what messages call the features.

        Raises:
            UserError: d, the number of classes or the names differ.
        """
        if self.weight.shape[1] != width:
            raise UserError(f"{self.source}: weight takes d = {self.weight.shape[1]}, but {source} has d = {width}")
        if len(self.weight) != len(class_names):
            raise UserError(
                f"{self.source}: a classifier of {len(self.weight)} classes, but {source} has {len(class_names)}"
            )
        if self.class_names is None:
            return replace(self, class_names=tuple(class_names))
        order = torch.from_numpy(match_names(source, class_names, self.source, self.class_names))
        return replace(self, weight=self.weight[order], bias=self.bias[order], class_names=tuple(class_names))
