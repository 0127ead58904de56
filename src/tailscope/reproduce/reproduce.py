"""From one request to the paper's tables: plan, train or recall, decide the claims, write everything side by side."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tailscope import paper
from tailscope.data.sources import ImageData, load
from tailscope.device import Runtime
from tailscope.errors import UserError
from tailscope.experiments.geometry import geometry
from tailscope.experiments.options import FileOptions
from tailscope.experiments.running import start_processes
from tailscope.experiments.runs import Settings, evaluate, parse_backbones, parse_seeds, store_root
from tailscope.experiments.stages import Stages
from tailscope.experiments.swap import ladder, swap
from tailscope.progress import Progress, Quiet, duration
from tailscope.report.rows import load as load_results
from tailscope.reproduce import claims
from tailscope.reproduce.evidence import Evidence, Outcomes
from tailscope.reproduce.plan import Plan, make_plan, measure, other_work, runs
from tailscope.results import check_free, write
from tailscope.store import Store, make_folder
from tailscope.training.recipes import recipe_by_name

Experiment = Callable[[Stages, Settings], dict[str, Any]]
EXPERIMENTS: dict[str, Experiment] = {"swap": swap, "ladder": ladder, "geometry": geometry}
Tell = Callable[[str], object]


@dataclass(frozen=True)
class Reproduction:
    """What is to be reproduced, and how.

    Attributes:
        what: table1, fig2 ... fig8, or all.
        dataset: cifar10-lt, cifar100-lt or imagenet-lt.
        out: folder for results.
        seeds: N or a list; the subset's seed is always 0.
        recipe: name of a recipe; by default the paper's.
        quick: a shortened run with the recipe `fast` or `imagenet-fast`, which is no reproduction.
        data_root, store, device, overwrite: as for every experiment.
        backbones: those that Table 1 trains, such as `lt`; by default all.
        time_limit: such as `9m`; see `tailscope.reproduce.queue`.
        jobs: backbones that are trained at a time under a time limit or by `everything`.
        compile: whether training steps are compiled; by default where it pays.
        wait_for_data: take a data set in when its NAME.npz appears in `data_root`, under a time limit or by
            `everything`.
        bundle: folder that gets results and trained stages as archives, for another machine; likewise.
        data: of imagenet-lt: the whole of ImageNet as `list:TRAIN.txt,TEST.txt` or `folder:PATH`.
        files: of imagenet-lt: devices, workers and what to do with images that cannot be read.
    """

    what: str
    dataset: str
    out: Path
    _: KW_ONLY
    seeds: str = "3"
    recipe: str | None = None
    quick: bool = False
    data_root: Path | None = None
    store: Path | None = None
    device: str = "auto"
    overwrite: bool = False
    backbones: str | None = None
    time_limit: str | None = None
    data: str | None = None
    files: FileOptions = field(default_factory=FileOptions)
    jobs: int = 1
    engine: str = "auto"
    wait_for_data: bool = False
    bundle: Path | None = None

    def open(self) -> ImageData:
        """Return the data set.

        Raises:
            UserError: imagenet-lt without `data`, or another with it; or as `sources.load`.
        """
        known = paper.benchmark(self.dataset)
        if known.in_files != (self.data is not None):
            if known.in_files:
                raise UserError(
                    f"--dataset {self.dataset}: give all of ImageNet with --data list:TRAIN.txt,TEST.txt (and"
                    " --data-root) or --data folder:DIR"
                )
            raise UserError(f"--data {self.data}: only imagenet-lt takes it; --data-root says where {known.data} lies")
        data = load(self.data or known.data, data_root=self.data_root)
        if known.in_files and data.in_memory:
            raise UserError(f"--data {self.data}: imagenet-lt is read from image files; give list: or folder:")
        return replace(data, name=known.data)

    def wanted(self) -> list[str]:
        """Return the experiments that the reproduction needs.

        Raises:
            UserError: the table or figure is unknown, or needs backbones that were not asked for.
        """
        wanted = paper.experiments(self.what, self.dataset)
        if self.backbones is not None and wanted != ["swap"]:
            raise UserError(f"--backbones {self.backbones}: only table1 and fig2 can do without a backbone")
        return wanted

    def settings(self) -> Settings:
        """Return the checked part that decides results.

        Raises:
            UserError: the recipe, the seeds or the data set is not usable.
        """
        known = paper.benchmark(self.dataset)
        if self.quick and self.recipe not in (None, known.quick):
            raise UserError(f"--quick means --recipe {known.quick}; leave out --recipe {self.recipe} or --quick")
        return Settings(
            profile=known.profile,
            protocol=known.protocol,
            recipe=recipe_by_name(self.recipe or (known.quick if self.quick else known.recipe)),
            seeds=parse_seeds(self.seeds),
            subset_seed=paper.SUBSET_SEED,
            backbones=parse_backbones(self.backbones),
        )


def run_reproduce(
    reproduction: Reproduction, *, tell: Tell = print, progress: Progress | None = None, plan_only: bool = False
) -> dict[str, Any]:
    """Say what will be trained and how long it takes; train it; write results, claims and tables to OUT.

    OUT gets swap.json, ladder.json and geometry.json as far as they are asked for, claims.json and
    tables/paper-*.{csv,md,tex}. Results of the same spec that OUT already holds join the claims and the tables.
    A killed run continues where it stopped when it is started again: every finished stage is in the store, and an
    unfinished one has a checkpoint after every epoch.

    Args:
        reproduction: what to do.
        tell: receives lines for people.
        progress: receives the work done.
        plan_only: stop after the plan.

    Returns:
        `label` (what the results may be called), `plan`, and unless `plan_only`: `results`, `claims` and `tables`
        (rows by table).

    Raises:
        UserError: something about the reproduction, the data or OUT is not usable; before any training.
    """
    reproduction.settings(), reproduction.wanted()
    runtime = Runtime.choose(reproduction.device, engine=reproduction.engine)
    with start_processes(reproduction.open(), reproduction.files, runtime) as place:
        recipe = place.recipe(reproduction.settings().recipe)
        settings = reproduction.settings().model_copy(update={"recipe": recipe})
        make_folder(reproduction.out, "--out")
        lab = place.stages(Store(store_root(reproduction.out, reproduction.store)), progress or Quiet(), tell)
        return _reproduce(reproduction, lab, settings, tell, plan_only)


def _reproduce(
    reproduction: Reproduction, lab: Stages, settings: Settings, tell: Tell, plan_only: bool
) -> dict[str, Any]:
    """Plan, run and conclude on an opened data set."""
    wanted = reproduction.wanted()
    for experiment in wanted:
        check_free(reproduction.out, experiment, settings.spec(lab.data), overwrite=reproduction.overwrite)
    plan = make_plan(lab, settings, wanted)
    label = claims.label_of(settings.recipe.model_dump())
    _tell_plan(tell, reproduction, settings, plan, label)
    done: dict[str, Any] = {"label": label, "plan": asdict(plan)}
    if not plan.complete and not lab.data.in_memory:
        tell("estimated time here: not measured for images in files; progress shows images a second")
    elif not plan.complete:
        busy = other_work()  # before we add to it
        rates = measure(lab, settings.recipe, plan)
        done["estimated_seconds"] = seconds = rates.estimate(plan)
        by = f"; rates {rates.sources(plan)}" if plan.to_train else ""
        tell(f"estimated time here: {duration(seconds)}{by}; geometry's tests come on top{busy and f'; {busy}'}")
    if plan_only:
        return done
    for experiment in wanted:
        write(reproduction.out, experiment, EXPERIMENTS[experiment](lab, settings))
    return {**done, **conclude(lab, settings, reproduction.out)}


def conclude(lab: Stages, settings: Settings, out: Path) -> dict[str, Any]:
    """Decide the claims and build the tables on every result in OUT of this data and recipe; write both.

    Their seeds, and the backbones of a swap, may differ from the settings'.

    Returns:
        `results` by experiment, `claims` as claims.json has them, `tables`: rows by name.
    """
    spec = fixed_part(settings.spec(lab.data))
    found: dict[str, Any] = {verb: result for verb, result in load_results(out).items() if verb in EXPERIMENTS}
    results = {verb: result for verb, result in found.items() if fixed_part(result["spec"]) == spec}
    evidence = Evidence(results, _recalled(lab, settings, results))
    document = claims.document(evidence, claims.check(evidence), datetime.now(UTC).isoformat(timespec="seconds"))
    write(out, "claims", document)
    tables = list(claims.build(evidence))
    claims.write(out, tables)
    return {
        "results": results,
        "claims": document["claims"],
        "tables": {numbers.name: list(numbers.rows) for numbers, _ in tables},
    }


def draw(out: Path, tell: Tell) -> None:
    """Build the report of a folder; without a library that draws, only its tables, and tell so."""
    from tailscope import report  # here because it imports those libraries, for a second

    try:
        report.build(out)
    except ModuleNotFoundError as missing:
        if missing.name not in ("altair", "vl_convert"):
            raise
        report.write_tables(out, report.load(out))
        tell(f"{missing.name} is not installed: no figures, no report.html; where it is, `tailscope report {out.name}`")


def outcomes(lab: Stages, settings: Settings, experiment: str) -> Outcomes:
    """Return which test images each row of `swap` or `ladder` gets right; everything must have been trained."""
    quiet = with_progress(lab, Quiet())
    found: dict[str, list[Any]] = {}
    for run in runs(lab, settings, experiment):
        backbone = quiet.backbone(run.stage1, run.trained_on.rows, run.seed, run.encoder)
        found.setdefault(run.row, []).append(evaluate(quiet, run, backbone, run.row))
    return {row: np.stack(per_seed) for row, per_seed in found.items()}


def with_progress(lab: Stages, progress: Progress) -> Stages:
    """Return the same lab with a model of its own, which reports to another progress: for another thread, say."""
    other = copy.copy(lab)
    other.runtime = replace(lab.runtime, progress=progress)
    return other


def _recalled(lab: Stages, settings: Settings, results: Mapping[str, Any]) -> Outcomes:
    """Return the per-item outcomes of those results whose stages are all stored."""
    found: Outcomes = {}
    for experiment in ("swap", "ladder"):
        if experiment in results:
            spec = results[experiment]["spec"]
            grown = {"seeds": tuple(spec["seeds"]), "backbones": tuple(spec.get("backbones") or ()) or None}
            own = settings.model_copy(update=grown)
            if make_plan(lab, own, [experiment]).complete:
                found |= outcomes(lab, own, experiment)
    return found


def fixed_part(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result's spec without what may grow from run to run.

    >>> fixed_part({"data": "cifar10", "seeds": [0], "backbones": ["lt"]})
    {'data': 'cifar10'}
    """
    return {name: value for name, value in spec.items() if name not in ("seeds", "backbones")}


def _tell_plan(tell: Tell, reproduction: Reproduction, settings: Settings, plan: Plan, label: str) -> None:
    seeds = " ".join(map(str, settings.seeds))
    tell(f"{reproduction.what} of {reproduction.dataset}, seeds {seeds}, subset seed {settings.subset_seed}; {label}")
    for backbone in plan.backbones:
        tell(f"  seed {backbone.seed}, backbone {backbone.encoder}: {backbone.describe()}")
    if plan.classifiers or plan.classifiers_stored:
        tell(f"  classifiers: {plan.classifiers} to fit, {plan.classifiers_stored} stored")
    if plan.complete:
        tell("  nothing to train: every stage is stored")
