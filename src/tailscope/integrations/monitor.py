"""Diagnoses a network every few epochs of its training, which goes on as if nobody had looked.

A diagnosis draws no random numbers from generators that it does not own. To go through a DataLoader does, for its base
seed and its order, and what augments images may use any of Python's, NumPy's and PyTorch's: all are put back.
"""

import inspect
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from tailscope import verbs
from tailscope.errors import UserError

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

    from tailscope.report.objects import Diagnosis

FOLDER = "epoch-{:04d}"


class Moment(NamedTuple):
    """A diagnosis and the epoch after which it was made."""

    epoch: int
    result: "Diagnosis"


class History(list[Moment]):
    """The diagnoses of a training, in their order."""

    def rows(self) -> list[dict[str, Any]]:
        """Return for each the epoch, the verdict (None where none was asked for) and `Diagnosis.scalars`."""
        return [
            {"epoch": epoch, "verdict": result["verdict"] and result["verdict"]["bottleneck"], **result.scalars()}
            for epoch, result in self
        ]

    def to_frame(self) -> "pd.DataFrame":
        """Return `rows` as a DataFrame; `UserError` where pandas is not installed."""
        try:
            import pandas as pd  # here because it is an extra
        except ImportError:
            raise UserError("to_frame needs pandas; pip install 'tailscope[pandas]', or take rows") from None
        return pd.DataFrame(self.rows())

    def plot(self) -> "alt.LayerChart":
        """Draw what classifier and representation cost after each epoch, with 95 % intervals, as an Altair chart."""
        import altair as alt  # here because it takes a second

        points = [
            {"epoch": row["epoch"], "of": part, "gap": row[f"{part}_gap"], **_bounds(row, part)}
            for row in self.rows()
            for part in _COLOURS
            if f"{part}_gap" in row
        ]
        colour = alt.Scale(domain=list(_COLOURS), range=list(_COLOURS.values()))
        base = alt.Chart(alt.Data(values=points)).encode(  # type: ignore[no-untyped-call]
            x=alt.X("epoch:Q", title="epoch", axis=alt.Axis(tickMinStep=1, format="d")),
            color=alt.Color("of:N", title=None, scale=colour),
        )
        percent = alt.Axis(format="%")
        band = base.mark_area(opacity=0.2).encode(alt.Y("low:Q", axis=percent, title="accuracy lost"), alt.Y2("high:Q"))
        line = base.mark_line(point=True).encode(alt.Y("gap:Q"))
        return cast("alt.LayerChart", band + line)


_COLOURS = {"classifier": "#cc79a7", "representation": "#0072b2"}
"""As in reports."""


def _bounds(row: dict[str, Any], part: str) -> dict[str, Any]:
    return {side: row.get(f"{part}_gap_{side}") for side in ("low", "high")}


class Monitor:
    """Diagnoses a network every few epochs: call it at the end of each.

    What it is called with stays as it was, to the bit: weights, modes, random states. Features are those of the
    network's last layer but one, of every image once: give loaders that do not augment. Where a diagnosis is not
    possible, a warning says why, and the training goes on.

    Example:
        >>> images, labels = torch.randn(40, 1, 2, 2), torch.arange(40) % 2
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> monitor = Monitor((images, labels), (images + 0.1, labels), every=2, verdict=False)
        >>> for epoch in range(4):
        ...     # train an epoch here
        ...     _ = monitor(network, epoch)
        >>> print(*(moment.epoch for moment in monitor.history))
        1 3

    Attributes:
        history: the diagnoses so far.
    """

    def __init__(
        self,
        train: Any,
        heldout: Any,
        *,
        every: int = 1,
        out: Path | str | None = None,
        overwrite: bool = False,
        permutations: int = 0,
        **options: Any,
    ) -> None:
        """Say on which samples to diagnose, and how often.

        Args:
            train: the training images, un-augmented: a DataLoader, or a pair (images [N, C, H, W], labels [N]).
            heldout: in the same form, images that have no part in training.
            every: diagnose after so many epochs: 5 means the epochs 4, 9, 14 ..., counted from 0.
            out: folder for diagnosis.json and report.html of each, as `epoch-0004`; without, nothing is written.
            overwrite: whether `out` may hold those of an earlier training.
            permutations: of each test of the geometry; 0 leaves them out, which is faster.
            options: further ones of `tailscope.diagnose`, such as `test`, `ceiling`, `bound_at` or `report`.

        Raises:
            UserError: `every` is not positive, or `out` has diagnoses of an earlier training.
            TypeError: `tailscope.diagnose` has no such option.
        """
        if every < 1:
            raise UserError(f"every: {every}; give a number of epochs of at least 1")
        self._out = None if out is None else Path(out)
        if self._out is not None and not overwrite and any(self._out.glob("epoch-*")):
            raise UserError(f"out: {out} has the diagnoses of an earlier training; take another, or overwrite=True")
        self._given = {"train": train, "unseen": heldout, "permutations": permutations, **options}
        inspect.signature(verbs.diagnose).bind(**self._given)
        self._every = every
        self.history = History()

    def __call__(self, model: nn.Module, epoch: int) -> "Diagnosis | None":
        """Diagnose after every n-th epoch, counted from 0; return the diagnosis, or None after the others."""
        if (epoch + 1) % self._every:
            return None
        try:
            return self.diagnose(model, epoch)
        except UserError as error:
            warnings.warn(f"epoch {epoch}: not diagnosed: {error}", stacklevel=2)
            return None

    def diagnose(self, model: nn.Module, epoch: int) -> "Diagnosis":
        """Diagnose now, whatever the epoch.

        Raises:
            UserError: as `tailscope.diagnose`.
        """
        to = None if self._out is None else self._out / FOLDER.format(epoch)
        with _undisturbed([*self._given.values()]):
            # Its device is the network's own; a `device` would be of the rest, and might set flags of CUDA.
            result = verbs.diagnose(**{"device": "cpu", **self._given}, model=model, out=to, overwrite=True)
        self.history.append(Moment(epoch, result))
        return result


@contextmanager
def _undisturbed(loaders: list[Any]) -> Iterator[None]:
    """Put random states back at the end: Python's, NumPy's, PyTorch's on every device, and those of the loaders."""
    holders = [part for one in loaders for part in (one, getattr(one, "sampler", None))]
    found = [getattr(holder, "generator", None) for holder in holders]
    own = [(generator, generator.get_state()) for generator in found if isinstance(generator, torch.Generator)]
    kept, of_numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(kept)
        np.random.set_state(of_numpy)
        for generator, state in own:
            generator.set_state(state)
