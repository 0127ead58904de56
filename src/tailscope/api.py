"""The verbs as Python functions: the same nouns as the command line, results as dictionaries."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tailscope.data.filedata import Data
from tailscope.data.filedata import load as load
from tailscope.errors import expanded
from tailscope.experiments import geometry as _geometry
from tailscope.experiments import ladder as _ladder
from tailscope.experiments import swap as _swap
from tailscope.experiments.lab import Lab
from tailscope.experiments.settings import Settings, parse_backbones, parse_bn_mode, parse_seeds
from tailscope.experiments.workplace import FileOptions, workplace
from tailscope.progress import Quiet
from tailscope.store import Store
from tailscope.training.recipes import recipe_by_name
from tailscope.training.runtime import Runtime


def swap(data: Data, **options: Any) -> dict[str, Any]:
    """Swap the data set between the two stages and attribute the gap: `swap.json` as a dictionary.

    Args:
        data: what `load` returned.
        options: as for `run`.
    """
    return run(_swap.swap, data, **options)


def ladder(data: Data, **options: Any) -> dict[str, Any]:
    """Climb the augmentation ladder on the long-tailed set: `ladder.json` as a dictionary; options as for `run`."""
    return run(_ladder.ladder, data, **options)


def geometry(data: Data, **options: Any) -> dict[str, Any]:
    """Measure what the representation does to each class: `geometry.json` as a dictionary; options as for `run`."""
    return run(_geometry.geometry, data, **options)


def run(
    experiment: Callable[[Lab, Settings], dict[str, Any]],
    data: Data,
    *,
    profile: str = "exp:100",
    recipe: str = "fast",
    model: str | None = None,
    loss: str | None = None,
    seeds: int | Sequence[int] = 3,
    protocol: str = "nested",
    subset_seed: int | None = None,
    matched: bool = False,
    permutations: int = 999,
    backbones: str | None = None,
    bn_mode: str = "frozen",
    store: Path | str | None = None,
    device: str = "auto",
    engine: str = "auto",
) -> dict[str, Any]:
    """Run one experiment.

    Args:
        experiment: one of the functions of `tailscope.experiments`.
        data: the data set.
        profile: shape of the long-tailed training counts, such as `exp:100`.
        recipe: name or call-string of a recipe: `fast`, `paper`, `imagenet(size=128)` ...
        model: another network than the recipe's, as a name or call-string.
        loss: another loss of stage 1 than the recipe's, such as `focal(gamma=1)`.
        seeds: a number N (0 ... N-1) or the seeds themselves.
        protocol: rule that draws the subset: nested or ldam.
        subset_seed: one subset for all seeds; None lets each seed draw its own.
        matched: adds the class-balanced level with as many images as lt.
        permutations: of the geometry's tests.
        backbones: those that a swap trains, such as `lt`; None for all.
        bn_mode: what stage 2 does with batch normalisation: frozen or shifted.
        store: folder of trained stages; default `$TAILSCOPE_STORE`, else `~/.cache/tailscope/store`.
        device: auto, cpu or cuda.
        engine: what computes training steps: eager, fused, compiled, or auto, the fastest here.

    Raises:
        UserError: an option is wrong, in one line.
    """
    chosen = parse_seeds(seeds if isinstance(seeds, int) else ",".join(map(str, seeds)) + ",")
    settings = Settings(
        profile=profile,
        protocol=protocol,
        recipe=recipe_by_name(recipe).with_bn_mode(parse_bn_mode(bn_mode)).with_backbone(model, loss),
        seeds=chosen,
        subset_seed=subset_seed,
        matched=matched,
        permutations=permutations,
        backbones=parse_backbones(backbones, matched=matched),
    )
    opened = Store(Path(store) if store else default_store())
    with workplace(data, FileOptions(), Runtime.choose(device, engine=engine)) as place:
        settings = settings.model_copy(update={"recipe": place.recipe(settings.recipe)})
        return experiment(place.lab(opened, Quiet()), settings)


def default_store() -> Path:
    """Return `$TAILSCOPE_STORE`, else the user's cache folder."""
    return expanded(os.environ.get("TAILSCOPE_STORE") or "~/.cache/tailscope/store")
