"""From one request to the paper's tables: plan, train or recall, decide the claims, write everything side by side.

The plan says what will be trained, what is stored already, and how long the rest takes on this machine. Times come from
what the store remembers of trainings here, else from a measurement of a few seconds.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tailscope import paper
from tailscope.data.images import ImageSet
from tailscope.device import Runtime, arithmetic_of
from tailscope.errors import UserError
from tailscope.experiments import hours
from tailscope.experiments.options import Reproduction
from tailscope.experiments.planned import Augment, Plan, other_work, planned
from tailscope.experiments.plans import EXPERIMENTS, RUNS, start_processes
from tailscope.experiments.runs import Run, Settings, evaluate, require_parts, store_root, training_sets
from tailscope.experiments.stages import Stages
from tailscope.experiments.trainings import make_ahead
from tailscope.methods.augmentations import build
from tailscope.progress import Progress, Quiet, duration
from tailscope.report.reading import read
from tailscope.reproduce import claims
from tailscope.reproduce.evidence import Evidence, Outcomes
from tailscope.results import check_free, write
from tailscope.seeds import torch_stream
from tailscope.store import Store, make_folder
from tailscope.training.extract import extract
from tailscope.training.loop import Training, new_model
from tailscope.training.recipes import Recipe
from tailscope.training.step import REPLAYED_AFTER, capturing

SECONDS = 8.0
"""How long `measure` takes, unless single operations take longer than their share of it."""
FEWEST = 5
"""How often each operation is timed at least: on a busy machine a single time may be anything."""
AUGMENTED, EXTRACTED = 1_024, 256
"""How many images the measurement augments at once, and extracts features of."""

Tell = Callable[[str], object]


def run_reproduce(
    reproduction: Reproduction, *, tell: Tell = print, progress: Progress | None = None
) -> dict[str, Any]:
    """Say what will be trained and how long it takes; train it; write results, claims and tables to OUT.

    OUT gets the experiments' results, claims.json and tables/paper-*.{csv,md,tex}. Results of the same spec that OUT
    already holds join the claims and the tables. A killed run continues where it stopped when it is started again.
    Returns `label` (what the results may be called), `plan`, and unless only that is wanted what `conclude` returns.

    Raises:
        UserError: something about the reproduction, the data or OUT is not usable; before any training.
    """
    reproduction.settings(), reproduction.wanted()
    if reproduction.plan and paper.benchmark(reproduction.dataset).in_files:
        return _plan_of_files(reproduction, tell)
    runtime = Runtime.choose(reproduction.own_device(reproduction.device), engine=reproduction.engine)
    with start_processes(reproduction.open(), reproduction.on_files, runtime) as place:
        recipe = place.recipe(reproduction.settings().recipe)
        settings = reproduction.settings().model_copy(update={"recipe": recipe})
        make_folder(reproduction.out, "--out")
        lab = place.stages(Store(store_root(reproduction.out, reproduction.store)), progress or Quiet(), tell)
        return _reproduce(reproduction, lab, settings, tell)


def _plan_of_files(reproduction: Reproduction, tell: Tell) -> dict[str, Any]:
    """Plan a reproduction on files: no process is started, no image checked, and the images need not be there."""
    lab, settings = hours.opened(reproduction.open(), reproduction.settings(), reproduction)
    plan = make_plan(lab, settings, reproduction.wanted())
    label = claims.label_of(settings.recipe.model_dump())
    _tell_plan(tell, reproduction, settings, plan, label)
    found = hours.estimate(lab, settings.recipe, plan, reproduction)
    if reproduction.data is None:
        tell("without --data: ImageNet's numbers of images, and made photographs of its size to measure with")
    for line in hours.lines(found):
        tell(line)
    return {"label": label, "plan": asdict(plan), **found}


def _reproduce(reproduction: Reproduction, lab: Stages, settings: Settings, tell: Tell) -> dict[str, Any]:
    """Plan, run and conclude on an opened data set."""
    wanted = reproduction.wanted()
    for experiment in wanted:
        check_free(reproduction.out, experiment, settings.spec(lab.data), overwrite=reproduction.overwrite)
    plan = make_plan(lab, settings, wanted)
    label = claims.label_of(settings.recipe.model_dump())
    _tell_plan(tell, reproduction, settings, plan, label)
    done: dict[str, Any] = {"label": label, "plan": asdict(plan)}
    if not plan.complete and not lab.data.in_memory:
        tell("estimated time: see --plan, which measures it for images in files; progress shows images a second")
    elif not plan.complete:
        busy = other_work()  # before we add to it
        rates = measure(lab, settings.recipe, plan)
        done["estimated_seconds"] = seconds = rates.estimate(plan)
        by = f"; rates {rates.sources(plan)}" if plan.to_train else ""
        tell(f"estimated time here: {duration(seconds)}{by}; geometry's tests come on top{busy and f'; {busy}'}")
    if reproduction.plan:
        return done
    needed = [run for experiment in wanted for run in runs(lab, settings, experiment)]
    make_ahead(lab, [needed], reproduction, reproduction.device, tell)
    for experiment in wanted:
        result = EXPERIMENTS[experiment](lab, settings)
        check_free(reproduction.out, experiment, result["spec"], overwrite=reproduction.overwrite)  # still
        write(reproduction.out, experiment, result)
    return {**done, **conclude(lab, settings, reproduction.out)}


def _tell_plan(tell: Tell, reproduction: Reproduction, settings: Settings, plan: Plan, label: str) -> None:
    seeds = " ".join(map(str, settings.seeds))
    tell(f"{reproduction.what} of {reproduction.dataset}, seeds {seeds}, subset seed {settings.subset_seed}; {label}")
    for line in plan.lines():
        tell(f"  {line}")


# -- what results say -----------------------------------------------------------------------------------------------


def conclude(lab: Stages, settings: Settings, out: Path) -> dict[str, Any]:
    """Decide the claims and build the tables on every result in OUT of this data and recipe; write both.

    Their seeds, and the backbones of a swap, may differ from the settings'. Returns `results` by experiment, `claims`
    as claims.json has them, and `tables`: rows by name.
    """
    spec = fixed_part(settings.spec(lab.data))
    stored = {verb: path for verb in RUNS if (path := out / f"{verb}.json").exists()}  # not claims, which are replaced
    found: dict[str, Any] = {verb: read(path, verb) for verb, path in stored.items()}
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
    quiet = lab.working(replace(lab.runtime, progress=Quiet()))
    found: dict[str, list[Any]] = {}
    for run in runs(lab, settings, experiment):
        backbone = quiet.backbone(run.stage1, run.trained_on.rows, run.seed, run.encoder)
        found.setdefault(run.row, []).append(evaluate(quiet, run, backbone, run.row))
    return {row: np.stack(per_seed) for row, per_seed in found.items()}


def _recalled(lab: Stages, settings: Settings, results: Mapping[str, Any]) -> Outcomes:
    """Return the per-item outcomes of those results whose stages are all stored."""
    found: Outcomes = {}
    for experiment in [verb for verb in ("swap", "ladder") if verb in results]:
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


# -- what is to be done ---------------------------------------------------------------------------------------------


def runs(lab: Stages, settings: Settings, experiment: str) -> Iterator[Run]:
    """Yield the runs of `swap`, `ladder` or `geometry` over all seeds, those of a backbone together."""
    for seed in settings.seeds:
        yield from RUNS[experiment](settings, training_sets(lab, settings, seed), seed)


def make_plan(lab: Stages, settings: Settings, experiments: Sequence[str]) -> Plan:
    """Look up in the store every stage that the experiments need; `UserError` where a part of one cannot be made."""
    needed = {experiment: list(runs(lab, settings, experiment)) for experiment in experiments}
    require_parts(lab.data, chain.from_iterable(needed.values()))
    return planned(lab, needed)


# -- how long it takes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Seconds that an image takes on this machine: in stage 1, by what augments it, and in extracting features.

    Those `remembered` come from stored trainings, the others from single steps.
    """

    training: dict[Augment, float]
    view: float
    clean: float
    remembered: frozenset[Augment] = frozenset()

    def estimate(self, plan: Plan) -> float:
        """Return the seconds that the plan's training and extraction take; geometry's permutations come on top."""
        training = sum(b.images_left * self.training[b.augment] for b in plan.to_train)
        return training + plan.views * self.view + plan.clean * self.clean

    def sources(self, plan: Plan) -> str:
        """Return where the rates of the plan's trainings come from, in words."""
        known = [b.augment in self.remembered for b in plan.to_train]
        measured = "measured on single steps, not compiled"
        if not any(known):
            return measured
        stored = "by trainings that the store remembers from this machine"
        return stored if all(known) else f"{stored}, where it knows such ones ({sum(known)}), else {measured}"


def remembered(lab: Stages, recipe: Recipe, plan: Plan) -> dict[Augment, float]:
    """Return the seconds an image took in stored trainings like the plan's: the median, by augmentation.

    Alike are the data set, the network, the batch, the precision, the engine if one was asked for, and the hardware
    with its number of threads. Descriptions that cannot be read say nothing.
    """
    assert isinstance(lab.data.train, ImageSet)
    with lab.runtime.threads_for(recipe.stage1.batch * lab.data.train.images.shape[1:3].numel()):
        here = lab.runtime.describe()
    precision = str(lab.runtime.dtype(recipe.stage1.precision)).removeprefix("torch.")
    alike = (
        (lab.data.fingerprint, recipe.model, recipe.stage1.batch, precision),
        (here["gpu"], here["cpu"], here["threads"]),
    )
    wanted, asked = {b.augment for b in plan.to_train}, lab.runtime.engine
    found: dict[Augment, list[float]] = {}
    for key in lab.store.keys("stage1"):
        try:
            meta = lab.store.meta("stage1", key)
            spec, device = meta["spec"], meta["device"]
            augment = tuple(spec["augment"])
            trained = (spec["data"]["fingerprint"], spec["model"], spec["train"]["batch"], meta["precision"])
            hardware = (device["gpu"], device["cpu"], device["threads"])
            engine = arithmetic_of(meta)["engine"]
            rate = float(meta["images_per_second"])
        except (UserError, KeyError, TypeError, ValueError):
            continue
        if augment in wanted and (trained, hardware) == alike and asked in (None, engine) and rate > 0:
            found.setdefault(augment, []).append(1 / rate)
    return {augment: statistics.median(seconds) for augment, seconds in found.items()}


def measure(lab: Stages, recipe: Recipe, plan: Plan, seconds: float | None = None) -> Rates:
    """Time what the plan needs on the first training images: steps, augmentation, extraction.

    All together it takes `seconds`, by default `SECONDS`. Steps are timed without compiling, which would take longer
    than the measurement may. Where long trainings compile theirs, an estimate from these rates errs high.
    """
    runtime = replace(lab.runtime, progress=Quiet())
    known = remembered(lab, recipe, plan)
    unknown = {b.augment for b in plan.to_train} - known.keys()
    share = (SECONDS if seconds is None else seconds) / (4 + len(unknown))
    assert isinstance(lab.data.train, ImageSet)  # files are decoded while training: their rate is not measured here
    images, stream = lab.data.train.images, torch_stream(0, "measure", device=runtime.device)
    model = new_model(recipe.model, images.shape[-1], lab.data.train.num_classes, seed=0).to(runtime.device)
    augmented = images[:AUGMENTED].to(runtime.device)

    def augmentation(calls: Augment) -> float:
        augment = build(calls)
        return _seconds_each(lambda: augment(augmented, stream).cpu(), len(augmented), share)

    def extraction(dtype: torch.dtype) -> float:
        rows = images[:EXTRACTED]
        return _seconds_each(lambda: extract(model, rows, lab.normalize, dtype, runtime, "features"), len(rows), share)

    step = _step(lab, recipe, runtime, 2 * share) if unknown else 0.0
    return Rates(
        training=known | {calls: step + augmentation(calls) for calls in unknown},
        view=extraction(runtime.dtype(recipe.stage2.precision)),
        clean=extraction(torch.float32),
        remembered=frozenset(known),
    )


def _step(lab: Stages, recipe: Recipe, runtime: Runtime, seconds: float) -> float:
    assert isinstance(lab.data.train, ImageSet)
    train = recipe.stage1
    training = Training(recipe.backbone(lab.true().spec), lab.data.train, lab.normalize, 0, runtime, None, "timing")
    pixels = train.batch * lab.data.train.images.shape[1:3].numel()
    with capturing(runtime.device) as capture, runtime.threads_for(pixels):
        images, labels = (t[: train.batch].to(runtime.device) for t in (lab.data.train.images, lab.data.train.labels))
        stepper = training.stepper(capture)

        def step() -> float:
            return stepper(images, labels, 0.01).item()  # which waits for the device

        for _ in range(REPLAYED_AFTER if capture else 0):
            step()
        return _seconds_each(step, len(labels), seconds)


def _seconds_each(work: Callable[[], object], images: int, seconds: float) -> float:
    """Return the median of the seconds an image takes: `work` on `images`, for `seconds` and `FEWEST` times at least.

    The first time warms up, or builds kernels, and does not count.
    """
    work()
    begun, times = time.monotonic(), list[float]()
    while time.monotonic() - begun < seconds or len(times) < FEWEST:
        started = time.monotonic()
        work()
        times.append(time.monotonic() - started)
    return statistics.median(times) / images
