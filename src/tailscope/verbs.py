"""What the command line's verbs do, between parsing options and printing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tailscope import report
from tailscope.data import splits
from tailscope.data.filedata import Data, FileData, load
from tailscope.data.profiles import KNOWN, canonical, resolve
from tailscope.errors import one_line
from tailscope.experiments.geometry import geometry
from tailscope.experiments.lab import Lab
from tailscope.experiments.ladder import ladder
from tailscope.experiments.settings import Settings, parse_backbones, parse_bn_mode, parse_seeds, store_root
from tailscope.experiments.swap import swap
from tailscope.experiments.workplace import FileOptions, workplace
from tailscope.groups import assign_groups
from tailscope.methods import AUGMENTATIONS, LOSSES, MIXINGS, SAMPLERS
from tailscope.methods.photos import PHOTO_AUGMENTATIONS
from tailscope.models import MODELS
from tailscope.origin import versions
from tailscope.progress import shown_on
from tailscope.registry import Registry
from tailscope.result_files import check_free, write
from tailscope.store import Store, make_folder
from tailscope.training.recipes import RECIPES, recipe_by_name
from tailscope.training.runtime import Runtime
from tailscope.training.schedules import SCHEDULES

EXPERIMENTS: dict[str, Callable[[Lab, Settings], dict[str, Any]]] = {
    "swap": swap,
    "ladder": ladder,
    "geometry": geometry,
}
REGISTRIES: dict[str, Registry[Any]] = {
    "models": MODELS,
    "losses": LOSSES,
    "samplers": SAMPLERS,
    "augmentations": AUGMENTATIONS,
    "augmentations of photographs in files": PHOTO_AUGMENTATIONS,
    "mixings": MIXINGS,
    "schedules": SCHEDULES,
}


@dataclass(frozen=True)
class Request:
    """The options of an experiment's verb, as typed."""

    data: str
    profile: str
    recipe: str
    seeds: str
    out: Path
    protocol: str = "nested"
    subset_seed: int | None = None
    matched: bool = False
    permutations: int = 999
    data_root: Path | None = None
    store: Path | None = None
    device: str = "auto"
    engine: str = "auto"
    overwrite: bool = False
    backbones: str | None = None
    bn_mode: str = "frozen"
    model: str | None = None
    loss: str | None = None
    files: FileOptions = field(default_factory=FileOptions)

    def settings(self) -> Settings:
        """Return the checked part that decides results."""
        return Settings(
            profile=canonical(self.profile),
            protocol=self.protocol,
            recipe=recipe_by_name(self.recipe)
            .with_bn_mode(parse_bn_mode(self.bn_mode))
            .with_backbone(self.model, self.loss),
            seeds=parse_seeds(self.seeds),
            subset_seed=self.subset_seed,
            matched=self.matched,
            permutations=self.permutations,
            backbones=parse_backbones(self.backbones, matched=self.matched),
        )


def experiments(request: Request, verbs: Sequence[str], console: Console) -> dict[str, dict[str, Any]]:
    """Run experiments that share an OUT and a store, write their results, and build the report.

    Everything that can be refused is refused before the first training.

    Raises:
        UserError: an option, the data or OUT is not usable.
    """
    settings = request.settings()
    data = load(request.data, data_root=request.data_root)
    with (
        workplace(data, request.files, Runtime.choose(request.device, engine=request.engine)) as place,
        shown_on(console) as progress,
    ):
        settings = settings.model_copy(update={"recipe": place.recipe(settings.recipe)})
        for note in data.notes() if isinstance(data, FileData) else ():
            Console(stderr=True).out(f"warning: {one_line(note)}", highlight=False)
        for seed in settings.seeds:
            draw(data, settings.profile, settings.protocol, settings.subset_seed_of(seed))
        make_folder(request.out, "--out")
        if not isinstance(data, FileData):  # which files can be read, and so the spec, is known later
            _check_free(data, settings, request, verbs)
        store = Store(store_root(request.out, request.store))
        lab = place.lab(store, progress, partial(Console(stderr=True).out, highlight=False))
        results = _run(lab, settings, request, verbs)
    report.build(request.out)
    if lab.trained == 0:
        console.print(f"Nothing was trained: all {lab.recalled} stages were in the store.")
    return results


def _run(lab: Lab, settings: Settings, request: Request, verbs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Run the experiments and write their results, unless OUT holds others."""
    drawn = _check_free(lab.data, settings, request, verbs)
    results: dict[str, dict[str, Any]] = {}
    for verb in verbs:
        if verb == "subset":
            write(request.out, verb, drawn)
        else:
            results[verb] = EXPERIMENTS[verb](lab, settings)
            write(request.out, verb, results[verb])
    return results


def _check_free(data: Data, settings: Settings, request: Request, verbs: Sequence[str]) -> dict[str, Any]:
    """Refuse to replace results of another spec in OUT; return the subset of the first seed."""
    drawn = describe_subset(data, settings.profile, settings.protocol, settings.subset_seed_of(settings.seeds[0]))
    for verb in verbs:
        spec = drawn["spec"] if verb == "subset" else settings.spec(data)
        check_free(request.out, verb, spec, overwrite=request.overwrite)
    return drawn


def subset(
    source: str,
    profile: str,
    protocol: str,
    seed: int,
    out: Path | None,
    *,
    data_root: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Draw a long-tailed subset and, with `out`, write OUT/subset.json.

    Raises:
        UserError: an option, the data or OUT is not usable.
    """
    data = load(source, data_root=data_root)
    result = describe_subset(data, profile, protocol, seed)
    if out is not None:
        make_folder(out, "--out")
        check_free(out, "subset", result["spec"], overwrite=overwrite)
        write(out, "subset", result)
    return result


def draw(data: Data, profile: str, protocol: str, seed: int) -> splits.Subset:
    """Draw a long-tailed subset of a data set's training images.

    Raises:
        UserError: the profile, protocol or seed does not fit the data.
    """
    return splits.subset(data.train.labels, resolve(profile, data.train.counts()), protocol=protocol, seed=seed)


def describe_subset(data: Data, profile: str, protocol: str, seed: int) -> dict[str, Any]:
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
        "warnings": data.notes() if isinstance(data, FileData) else [],
        "sha256": drawn.sha256,
        "indices": [kept.tolist() for kept in drawn.indices],
    }


def show_subset(result: dict[str, Any], out: Path | None, console: Console) -> None:
    """Print a subset's counts as a bar chart, and its fingerprint."""
    counts = result["counts"]
    for warning in result["warnings"]:
        console.out(f"warning: {one_line(warning)}", highlight=False)
    console.out(f"{sum(counts):,} images, counts {' '.join(map(str, counts))}", highlight=False)
    console.out(f"sha256 {result['sha256']}", highlight=False)
    table = Table("class", "group", "images", "", box=None)
    for name, group, n in zip(result["dataset"]["class_names"], result["groups"], counts, strict=True):
        table.add_row(_plain(name), group or "-", str(n), "█" * max(1, round(40 * n / max(counts))))
    if len(counts) <= 100:
        console.print(table)
    if out is not None:
        console.out(f"written: {out / 'subset.json'}", highlight=False)


def show_story(out: Path, console: Console) -> None:
    """Print the story in ten lines and name the report."""
    table = Table(show_header=False, box=None)
    for name, value in report.story.summary_rows(report.load(out)):
        table.add_row(_plain(name), _plain(value))
    console.print(table)
    console.out(f"report: {out / 'report.html'}", highlight=False)


def list_methods() -> dict[str, Any]:
    """Return every registered entry with its defaults, and the recipes."""
    listed: dict[str, Any] = {
        kind: [{"name": e.name, "defaults": e.defaults, "summary": e.summary} for e in registry]
        for kind, registry in REGISTRIES.items()
    }
    listed["recipes"] = [recipe.model_dump(mode="json") for recipe in RECIPES.values()]
    listed["profiles"] = KNOWN.split(", ")
    return listed


def show_methods(console: Console) -> None:
    """Print what `list_methods` returns as tables."""
    for kind, registry in REGISTRIES.items():
        table = Table("call", "what it is", title=kind, title_justify="left")
        for entry in registry:
            table.add_row(_plain(registry.canonical(entry.name)), _plain(entry.summary))
        console.print(table)
    table = Table("recipe", "what it does", title="recipes", title_justify="left")
    for recipe in RECIPES.values():
        table.add_row(recipe.name, _plain(recipe.card))
    console.print(table)
    console.print(f"profiles: {KNOWN}", highlight=False)


def _plain(text: str) -> Text:
    """Return text in which rich looks for no markup and a terminal for no commands."""
    return Text(one_line(text))
