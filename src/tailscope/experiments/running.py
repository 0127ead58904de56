"""Running experiments: the device, the processes that share the work, the data that can be read, and the results."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from rich.console import Console

from tailscope.data import subsets
from tailscope.data.decoding import readable
from tailscope.data.sources import ImageData, load
from tailscope.device import Runtime, Solo, Team, form
from tailscope.errors import UserError, one_line
from tailscope.experiments.options import FileOptions, Request
from tailscope.experiments.plans import geometry, ladder, swap
from tailscope.experiments.runs import Settings, store_root
from tailscope.experiments.stages import Stages, follow, require_trainable
from tailscope.groups import assign_groups
from tailscope.progress import Progress, shown_on
from tailscope.results import check_free, versions, write
from tailscope.store import Store, make_folder
from tailscope.training.recipes import Recipe

EXPERIMENTS = {"swap": swap, "ladder": ladder, "geometry": geometry}


@dataclass(frozen=True)
class Processes:
    """The processes that work on a data set, and this one that leads them."""

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
        require_trainable(self.data, self.team, recipe.stage1, recipe.augment)
        return recipe

    def stages(self, store: Store, progress: Progress, tell: Callable[[str], object] = str) -> Stages:
        """Return the stages on the images that can be read; with `verify`, `tell` gets a line for each that cannot.

        Raises:
            UserError: as `decoding.readable`.
        """
        data, workers = self.data, self.options.workers
        if not data.in_memory:
            verify = self.options.verify
            data = readable(data, store, verify=verify, workers=workers, progress=progress, tell=tell)
        return Stages(data, store, replace(self.runtime, progress=progress), self.team, workers)


@contextmanager
def start_processes(data: ImageData, options: FileOptions, runtime: Runtime) -> Iterator[Processes]:
    """Start the processes that the options ask for; only their leader comes back from here, the others serve it.

    Raises:
        UserError: the options are for images in files and these are in memory; or as `form`.
    """
    if data.in_memory:
        if any(getattr(options, option.name) != option.default for option in fields(FileOptions)):
            raise UserError(
                f"{data.name}: --devices, --num-nodes, --micro-batches, --workers and --verify are for images in files"
                " (folder:, list: or hf:)"
            )
        yield Processes(data, runtime, Solo(), options)
        return
    team = form(options.devices, options.num_nodes, runtime.device.type)
    runtime = replace(runtime, device=team.device or runtime.device)
    if team.rank > 0:
        follow(team, runtime, options.workers)
    try:
        yield Processes(data, runtime, team, options)
    finally:
        team.dismiss()


def run(request: Request, verbs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Run experiments that share a store, and the verb `subset`; write their results where the request names an OUT.

    Everything that can be refused is refused before the first training. Returns the results by verb.

    Raises:
        UserError: an option, the data or OUT is not usable.
    """
    console = request.console or Console(quiet=True)
    notes = partial(Console(stderr=True, quiet=console.quiet).out, highlight=False)
    settings = Settings.of(request)
    data = load(request.data, data_root=request.data_root)
    runtime = Runtime.choose(request.device, engine=request.engine)
    with start_processes(data, request, runtime) as processes, shown_on(console) as progress:
        settings = settings.model_copy(update={"recipe": processes.recipe(settings.recipe)})
        for note in data.notes():
            notes(f"warning: {one_line(note)}")
        for seed in settings.seeds:
            subsets.draw(data.train, settings.profile, settings.protocol, settings.subset_seed_of(seed))
        if request.out is not None:
            make_folder(request.out, "--out")
        if data.in_memory:  # which files can be read, and so the spec, is known later
            _check_free(data, settings, request, verbs)
        stages = processes.stages(Store(store_root(request.out, request.store)), progress, notes)
        results = _run(stages, settings, request, verbs)
    if stages.trained == 0:
        console.print(f"Nothing was trained: all {stages.recalled} stages were in the store.")
    return results


def _run(stages: Stages, settings: Settings, request: Request, verbs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Run the experiments and write their results, unless OUT holds others."""
    drawn = _check_free(stages.data, settings, request, verbs)
    results: dict[str, dict[str, Any]] = {}
    for verb in verbs:
        result = drawn if verb == "subset" else EXPERIMENTS[verb](stages, settings)
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


def describe_subset(data: ImageData, profile: str, protocol: str, seed: int) -> dict[str, Any]:
    """Draw a long-tailed subset and return it as `subset.json` holds it.

    Raises:
        UserError: the profile, protocol or seed does not fit the data.
    """
    drawn = subsets.draw(data.train, profile, protocol, seed)
    groups, rule = assign_groups(drawn.counts)
    return {
        "schema": "tailscope.subset/1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "spec": {
            "data": data.name,
            "fingerprint": data.fingerprint,
            "profile": subsets.canonical(profile),
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
