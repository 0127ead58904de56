"""What the user asked for: one frozen value that every experiment takes and every result file repeats."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast, get_args

from pydantic import BaseModel, ConfigDict

from tailscope.data.profiles import canonical
from tailscope.data.sources import ImageData
from tailscope.errors import UserError, expanded
from tailscope.experiments.options import Request
from tailscope.spec import BnMode
from tailscope.training.recipes import Recipe, recipe_by_name

MAX_SEEDS = 1_000
MAX_DIGITS = 30
"""Limits that only a slip of the pen exceeds."""


class Settings(BaseModel):
    """The data, the shape of its tail, the recipe and the seeds of an experiment.

    Attributes:
        profile: shape of the long-tailed training counts.
        protocol: rule that draws the subset.
        recipe: how the stages are trained.
        seeds: one run of everything for each.
        subset_seed: draws the same subset for all seeds; None lets each seed draw its own.
        matched: adds the third level, class-balanced with as many images as lt.
        permutations: of the geometry's tests; 0 leaves calibration out.
        backbones: those that a swap trains; None for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: str
    protocol: str
    recipe: Recipe
    seeds: tuple[int, ...]
    subset_seed: int | None = None
    matched: bool = False
    permutations: int = 999
    backbones: tuple[str, ...] | None = None

    @classmethod
    def of(cls, request: Request) -> Self:
        """Return the part of a request that decides results, checked.

        Raises:
            UserError: an option is wrong.
        """
        recipe = recipe_by_name(request.recipe).with_bn_mode(parse_bn_mode(request.bn_mode))
        return cls(
            profile=canonical(request.profile),
            protocol=request.protocol,
            recipe=recipe.with_backbone(request.model, request.loss),
            seeds=parse_seeds(request.seeds),
            subset_seed=request.subset_seed,
            matched=request.matched,
            permutations=request.permutations,
            backbones=parse_backbones(request.backbones, matched=request.matched),
        )

    def spec(self, data: ImageData) -> dict[str, Any]:
        """Return what a result depends on, as result files store it.

        `backbones` is left out where all are trained, as in the files from before there was a choice.
        """
        return {
            **self.model_dump(mode="json", exclude={"backbones"} if self.backbones is None else None),
            "profile": canonical(self.profile),
            "data": data.name,
            "fingerprint": data.fingerprint,
        }

    def subset_seed_of(self, seed: int) -> int:
        """Return the seed that draws the subset of a run."""
        return seed if self.subset_seed is None else self.subset_seed


def parse_seeds(given: str | int | Sequence[int]) -> tuple[int, ...]:
    """Return the seeds that `N` (0 ... N-1) or a list `0,3` means.

    >>> parse_seeds("3"), parse_seeds("0,3"), parse_seeds("7,"), parse_seeds([7])
    ((0, 1, 2), (0, 3), (7,), (7,))

    Raises:
        UserError: there is no seed or a great many, or one is negative, repeated or not a whole number.
    """
    text = str(given) if isinstance(given, str | int) else ",".join(map(str, given)) + ","
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and len(part) <= MAX_DIGITS for part in parts):
        raise UserError(f"--seeds {text}: expected a number of seeds of at least 1, or a list like 0,3")
    values = [int(part) for part in parts]
    if "," in text:
        if len(set(values)) < len(values):
            raise UserError(f"--seeds {text}: a seed is given twice")
        return tuple(values)
    if values[0] < 1:
        raise UserError(f"--seeds {text}: at least one seed is needed")
    if values[0] > MAX_SEEDS:
        raise UserError(f"--seeds {text}: more than {MAX_SEEDS:,} seeds; for the seed {text} itself write `{text},`")
    return tuple(range(values[0]))


def parse_backbones(text: str | None, *, matched: bool = False) -> tuple[str, ...] | None:
    """Return the backbones that a list like `lt` or `lt,true` names, in order; None where that is all of them.

    >>> parse_backbones("lt"), parse_backbones("true,lt"), parse_backbones(None)
    (('lt',), None, None)

    Raises:
        UserError: one is unknown, or there is none.
    """
    if text is None:
        return None
    known = ("lt", "true", "matched") if matched else ("lt", "true")
    asked = [part.strip() for part in text.split(",") if part.strip()]
    if not asked or not set(asked) <= set(known):
        raise UserError(f"--backbones {text}: expected some of {', '.join(known)}, separated by commas")
    chosen = tuple(name for name in known if name in asked)
    return None if chosen == known else chosen


def parse_bn_mode(text: str) -> BnMode:
    """Return the batch-norm mode of that name.

    Raises:
        UserError: there is none.
    """
    if text not in get_args(BnMode):
        raise UserError(f"--bn-mode {text}: expected {' or '.join(get_args(BnMode))}")
    return cast(BnMode, text)


def store_root(out: Path | None, store: Path | str | None) -> Path:
    """Return the folder of trained stages: `store`, else `$TAILSCOPE_STORE`, else OUT/store, else the user's cache."""
    if store is not None:
        return Path(store)
    if out is not None and not os.environ.get("TAILSCOPE_STORE"):
        return out / "store"
    return expanded(os.environ.get("TAILSCOPE_STORE") or "~/.cache/tailscope/store")
