"""Running experiments: the device, the processes that share the work, the data that can be read, and the results."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tailscope.data import subsets
from tailscope.data.decoding import readable
from tailscope.data.profiles import canonical, resolve
from tailscope.data.sources import ImageData, load
from tailscope.device import Runtime
from tailscope.errors import UserError, one_line
from tailscope.experiments.geometry import geometry
from tailscope.experiments.options import FileOptions, Request
from tailscope.experiments.settings import Settings, store_root
from tailscope.experiments.stages import Lab, check, follow
from tailscope.experiments.swap import ladder, swap
from tailscope.groups import assign_groups
from tailscope.progress import Progress, shown_on
from tailscope.results import check_free, versions, write
from tailscope.store import Store, make_folder
from tailscope.training.recipes import Recipe
from tailscope.training.team import Solo, Team, form

EXPERIMENTS: dict[str, Callable[[Lab, Settings], dict[str, Any]]] = {
    "swap": swap,
    "ladder": ladder,
    "geometry": geometry,
}


@dataclass(frozen=True)
class Workplace:
    """A runtime and a team that this process leads, for a data set."""

    data: ImageData
    runtime: Runtime
    team: Team
    options: FileOptions

    def recipe(self, recipe: Recipe) -> Recipe:
        """Return the recipe with its batches cut for the team.

        Raises:
            UserError: the recipe does not suit the data, or the team.
        """
        recipe = recipe.with_micro_batches(self.options.micro_batches or self.team.size)
        check(self.data, self.team, recipe.stage1, recipe.augment)
        return recipe

    def lab(self, store: Store, progress: Progress, tell: Callable[[str], object] = str) -> Lab:
        """Return a lab that works here, on the images that can be read.

        Args:
            store: of the lab.
            progress: receives the work done.
            tell: receives a line for every image that cannot be read, where the options say `verify`.

        Raises:
            UserError: as `decoding.readable`.
        """
        verify, workers = self.options.verify, self.options.workers
        data = readable(self.data, store, verify=verify, workers=workers, progress=progress, tell=tell)
        return Lab(data, store, replace(self.runtime, progress=progress), self.team, workers)


@contextmanager
def workplace(data: ImageData, options: FileOptions, runtime: Runtime) -> Iterator[Workplace]:
    """Start the processes that the options ask for; only their leader comes back from here, the others serve it.

    Raises:
        UserError: the options are for images in files and these are in memory; or as `form`.
    """
    if data.in_memory and options != FileOptions():
        raise UserError(
            f"{data.name}: --devices, --num-nodes, --micro-batches, --workers and --verify are for images in files"
            " (folder:, list: or hf:)"
        )
    team = Solo() if data.in_memory else form(options.devices, options.num_nodes, runtime.device.type)
    if team.device is not None:
        runtime = replace(runtime, device=team.device)
    if team.rank > 0:
        follow(team, runtime, options.workers)
    try:
        yield Workplace(data, runtime, team, options)
    finally:
        team.dismiss()


def run(request: Request, verbs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Run experiments that share a store, and the verb `subset`; write their results where the request names an OUT.

    Everything that can be refused is refused before the first training.

    Returns:
        the results by verb.

    Raises:
        UserError: an option, the data or OUT is not usable.
    """
    console = request.console or Console(quiet=True)
    notes = partial(Console(stderr=True, quiet=console.quiet).out, highlight=False)
    settings = Settings.of(request)
    data = opened(request.data, request.data_root)
    runtime = Runtime.choose(request.device, engine=request.engine)
    with workplace(data, request.on_files, runtime) as place, shown_on(console) as progress:
        settings = settings.model_copy(update={"recipe": place.recipe(settings.recipe)})
        for note in data.notes():
            notes(f"warning: {one_line(note)}")
        for seed in settings.seeds:
            draw(data, settings.profile, settings.protocol, settings.subset_seed_of(seed))
        if request.out is not None:
            make_folder(request.out, "--out")
        if data.in_memory:  # which files can be read, and so the spec, is known later
            _check_free(data, settings, request, verbs)
        lab = place.lab(Store(store_root(request.out, request.store)), progress, notes)
        results = _run(lab, settings, request, verbs)
    if lab.trained == 0:
        console.print(f"Nothing was trained: all {lab.recalled} stages were in the store.")
    return results


def _run(lab: Lab, settings: Settings, request: Request, verbs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Run the experiments and write their results, unless OUT holds others."""
    drawn = _check_free(lab.data, settings, request, verbs)
    results: dict[str, dict[str, Any]] = {}
    for verb in verbs:
        result = drawn if verb == "subset" else EXPERIMENTS[verb](lab, settings)
        if verb != "subset":
            results[verb] = result
        if request.out is not None:
            write(request.out, verb, result)
    return results


def _check_free(data: ImageData, settings: Settings, request: Request, verbs: Sequence[str]) -> dict[str, Any]:
    """Refuse to replace results of another spec in OUT; return the subset of the first seed."""
    drawn = describe_subset(data, settings.profile, settings.protocol, settings.subset_seed_of(settings.seeds[0]))
    if request.out is not None:
        for verb in verbs:
            spec = drawn["spec"] if verb == "subset" else settings.spec(data)
            check_free(request.out, verb, spec, overwrite=request.overwrite)
    return drawn


def opened(data: str | ImageData, data_root: Path | None) -> ImageData:
    """Return a data set that is given by name or as it is.

    Raises:
        UserError: as `sources.load`.
    """
    return load(data, data_root=data_root) if isinstance(data, str) else data


def draw(data: ImageData, profile: str, protocol: str, seed: int) -> subsets.Subset:
    """Draw a long-tailed subset of a data set's training images.

    Raises:
        UserError: the profile, protocol or seed does not fit the data.
    """
    return subsets.subset(data.train.labels, resolve(profile, data.train.counts()), protocol=protocol, seed=seed)


def describe_subset(data: ImageData, profile: str, protocol: str, seed: int) -> dict[str, Any]:
    """Draw a long-tailed subset and return it as `subset.json` holds it.

    Raises:
        UserError: the profile, protocol or seed does not fit the data.
    """
    drawn = draw(data, profile, protocol, seed)
    groups, rule = assign_groups(drawn.counts)
    return {
        "schema": "tailscope.subset/1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "spec": {
            "data": data.name,
            "fingerprint": data.fingerprint,
            "profile": canonical(profile),
            "protocol": protocol,
            "seed": seed,
        },
        "environment": {"versions": versions()},
        "dataset": {"name": data.name, "class_names": list(data.train.class_names)},
        "counts": drawn.counts,
        "groups": groups,
        "groups_rule": rule,
        "warnings": data.notes(),
        "sha256": drawn.sha256,
        "indices": [kept.tolist() for kept in drawn.indices],
    }
