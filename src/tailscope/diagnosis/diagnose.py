"""`diagnose`: measure, judge, advise, and put everything together as `diagnosis.json` holds it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tailscope.classifiers import CLASSIFIERS
from tailscope.device import Runtime
from tailscope.diagnosis.compare import compare, confusable_pairs, paired_inputs, same_names
from tailscope.diagnosis.inputs import Inputs, bursts, read_files, settle, without_far_rows
from tailscope.diagnosis.memory import within
from tailscope.diagnosis.soundness import doubts, doubts_of_outcomes
from tailscope.effort import nearest_step
from tailscope.errors import UserError, first_few
from tailscope.groups import GROUPS
from tailscope.measures import GeometryResult, describe
from tailscope.measures.chance import MOST_PERMUTATIONS
from tailscope.measures.collapse import class_means, collapse
from tailscope.measures.rows import scaled
from tailscope.plugins import Plugin, told
from tailscope.registry import plugins_named
from tailscope.report.text import percent
from tailscope.results import command, versions
from tailscope.tables.mapped import map_rows
from tailscope.tables.table import FeatureTable, LinearLayer, Source, several

if TYPE_CHECKING:
    from tailscope.diagnosis.outcomes import Outcomes

Several = Source | Sequence[Source]
MANY_COPIES = 0.01  # of the held-out samples: from there they may change a verdict
LEAST_ALPHA = 0.001  # a class alone among C is flagged after C / alpha permutations


@dataclass(frozen=True)
class OtherBound:
    """The classifier bound of another encoder of the same images, as its diagnosis `source` has it."""

    source: str
    mean: float
    ci95: list[float]

    @classmethod
    def of(cls, path: Path, stored: dict[str, Any], inputs: Inputs, bound_at: int | None) -> "OtherBound":
        """Take it from what `read` found.

        Raises:
            UserError: it is of other images, at another number of samples, or of the encoder that `inputs` are of.
        """
        where, counts = f"--ceiling-from {path}", inputs.train.counts()
        theirs = stored["dataset"]["class_names"], stored["counts"], stored["dataset"]["unseen_images"]
        if theirs != (list(inputs.names), counts, len(inputs.unseen)):
            raise UserError(f"{where}: give a diagnosis of the same images as {inputs.train.source}")
        name, found = cls._best(path, stored)
        samples = stored["spec"]["encoders"].get(name, {}).get("train")
        if samples and samples["sha256"] == inputs.fingerprints["train"]["sha256"]:
            which = f"the best of its encoders, {name}," if "encoders" in stored else "its encoder"
            raise UserError(f"{where}: {which} is that of --train; leave out --ceiling-from")
        if found["bound_at"] != (bound_at or max(counts)):
            raise UserError(f"{where}: its bound is at {found['bound_at']} samples a class; give that as --bound-at")
        return cls(f"{path.name}, {name}" if "encoders" in stored else path.name, found["mean"], found["ci95"])

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """Read the diagnosis.json that `of` takes it from.

        Raises:
            UserError: it is none, of several encoders none is best, or it has only a lower limit.
        """
        from tailscope.report.reading import read as read_result  # here because pydantic takes time to import

        mend = "give the diagnosis.json of another encoder"
        stored: dict[str, Any] = read_result(path, "diagnosis", option="--ceiling-from ", mend=mend)
        cls._best(path, stored)
        return stored

    @staticmethod
    def _best(path: Path, stored: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Return a diagnosis's encoder, the best of several, and its bound."""
        several_there, of = "encoders" in stored, stored["spec"]["encoders"]
        name = (stored.get("comparison") or {}).get("best") if several_there else next(iter(of), None)
        if name not in stored.get("encoders", of):
            alone = "diagnose one of them by itself, and give that diagnosis.json"
            raise UserError(f"--ceiling-from {path}: none of its encoders is clearly the best; {alone}")
        one = stored["encoders"][name] if several_there else stored
        found = ((one["accuracy"] or {}).get("classifier_bound") or {}).get("extrapolated") or {}
        if "bound_at" not in found:
            why = "field 'accuracy.classifier_bound.extrapolated' has no bound, only a lower limit is known"
            raise UserError(f"--ceiling-from {path}: {why}; give an accuracy by --ceiling instead")
        return name, found


@dataclass(frozen=True)
class DiagnosisSettings:
    """What a diagnosis depends on besides its inputs; what each means, `diagnose` says.

    Raises:
        UserError: a value is out of range.
    """

    ceiling: float
    permutations: int
    alpha: float
    verdict: bool
    drop_duplicates: bool
    seed: int
    bound_at: int | None = None
    ceiling_from: OtherBound | None = None
    remedies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.ceiling <= 1:
            raise UserError(f"--ceiling {self.ceiling}: expected an accuracy above 0 and at most 1")
        if self.ceiling_from is not None and self.ceiling != 1:
            raise UserError("--ceiling and --ceiling-from: give one of them")
        if self.bound_at is not None and self.bound_at < 1:
            raise UserError(f"--bound-at {self.bound_at}: expected a whole number of at least 1")
        if not LEAST_ALPHA <= self.alpha < 1:
            raise UserError(f"--alpha {self.alpha}: expected a number from {LEAST_ALPHA} to below 1")
        if not 0 <= self.permutations <= MOST_PERMUTATIONS:
            raise UserError(f"--permutations {self.permutations}: expected 0 to {MOST_PERMUTATIONS:,}")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: expected a whole number of at least 0")

    @property
    def plugins(self) -> list[Plugin]:
        """The code from outside the package that the remedies name, each once, by name."""
        return plugins_named((CLASSIFIERS, call) for call in self.remedies) if self.remedies else []

    @property
    def too_few_permutations(self) -> bool:
        """Whether no group's p-value, 1 / (permutations + 1) at least, can be as low as alpha."""
        return 0 < self.permutations < 1 / self.alpha - 1


def prepare(
    train: Several | None,
    unseen: Several | None,
    test: Several | None,
    classifier: Any,
    name: str | None,
    settings: DiagnosisSettings,
) -> dict[str, Inputs]:
    """Read and check the inputs of every encoder; of several, the samples are paired.

    `name` is what results call the data; without, it is the name of the training file.

    Raises:
        UserError: as `read_files` and `settle`; or the lists differ in length or samples.
    """
    trains, others = several(train), [several(given) for given in (unseen, test, classifier)]
    if not trains or not others[0]:
        raise UserError("--train and --unseen: give both, or a network and images by --model and --data")
    for given, option in zip(others, ("--unseen", "--test", "--classifier"), strict=True):
        if given and len(given) != len(trains):
            raise UserError(f"{option}: {len(given)} given for {len(trains)} --train; give one for each, in this order")
    filled = [given or [None] * len(trains) for given in others]
    found: dict[str, Inputs] = {}
    for first, second, third, linear in zip(trains, *filled, strict=True):
        table = FeatureTable.of(first, "train")
        reference = next(iter(found.values()), None)
        if reference is not None:
            table = same_names(reference.train, table)
        inputs = read_files(table, second, third, linear)
        own = _free_name(name or Path(table.source).stem, found)
        found[own] = inputs if reference is None else paired_inputs(reference, inputs)
    return settle(found, settings.drop_duplicates)


def spec(inputs: dict[str, Inputs], settings: DiagnosisSettings) -> dict[str, Any]:
    """Return what the result depends on: the numbers of every input, and the settings.

    Further remedies are left out where there are none, as in the files from before there were any.
    """
    found = {"encoders": {name: one.fingerprints for name, one in inputs.items()}, **asdict(settings)}
    found["remedies"] = list(settings.remedies)  # as it comes back from the file
    if not settings.remedies:
        del found["remedies"]
    if settings.plugins:
        found["plugins"] = {plugin.name: plugin.sha256 for plugin in settings.plugins}
    return found


def run(
    inputs: dict[str, Inputs], settings: DiagnosisSettings, runtime: Runtime, memory: int | None = None
) -> tuple[dict[str, Any], LinearLayer | None]:
    """Diagnose prepared inputs; of several encoders the first is the reference, flat at the top of the result.

    Beside the result is the re-balanced classifier of the first, as a linear layer; None where none is advised.
    No more than `memory` bytes are held; None: as `within` says.

    Raises:
        UserError: the unseen samples are too few for a verdict; or the memory does not suffice.
    """
    with within(inputs, settings.verdict, settings.permutations, memory):
        return _run(inputs, settings, runtime)


def _run(
    inputs: dict[str, Inputs], settings: DiagnosisSettings, runtime: Runtime
) -> tuple[dict[str, Any], LinearLayer | None]:
    results, outcomes = {}, {}
    kept = without_far_rows(inputs)
    reasons = doubts(kept)
    for name, one in kept.items():
        results[name], outcomes[name] = _one(one, inputs[name].train.counts(), reasons, settings, runtime)
    first = next(iter(inputs.values()))
    result = {
        "schema": "tailscope.diagnosis/1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "spec": spec(inputs, settings),
        "environment": {"versions": versions(), "hardware": runtime.describe()},
        "dataset": {
            "name": next(iter(inputs)),
            "class_names": list(first.names),
            "train_images": len(first.train),
            "unseen_images": len(first.unseen),
            "test_images": None if first.test is None else len(first.test),
        },
        **results[next(iter(inputs))],
    }
    if settings.plugins:
        result["environment"] |= told(settings.plugins)
    if len(inputs) > 1:
        from tailscope.diagnosis.advice import change_encoder  # here because scikit-learn takes seconds to import

        compared = compare(kept, results, outcomes)
        result |= {"encoders": results, "comparison": compared}
        result["advice"] = [*change_encoder(compared), *result["advice"]]
    return result, _layer(result, outcomes[next(iter(inputs))], first)


def _layer(result: dict[str, Any], outcomes: "Outcomes | None", inputs: Inputs) -> LinearLayer | None:
    """Return the best remedy that is a linear layer; None where there is none, or the advice is not to take it."""
    if outcomes is None or outcomes.layer is None:
        return None
    from tailscope.diagnosis.advice import recommends_another  # here because scikit-learn takes seconds to import

    if not recommends_another(result["verdict"]):
        return None
    weight, bias = (np.asarray(values, np.float32) for values in outcomes.layer[1:])
    return LinearLayer.from_arrays(weight, bias, class_names=inputs.names, source=outcomes.layer.name)


def _one(
    inputs: Inputs, counts: list[int], reasons: list[str], settings: DiagnosisSettings, runtime: Runtime
) -> "tuple[dict[str, Any], Outcomes | None]":
    """Return the part of a diagnosis that is one encoder's, without rows that are far too long; `counts` has them."""
    train, unseen, names = inputs.train, inputs.unseen, inputs.names
    first, second = bursts(train, unseen)
    with runtime.progress.task("geometry", len(names)) as advance:
        geometry = describe(
            train.features.to(runtime.device),
            train.labels,
            unseen.features.to(runtime.device),
            unseen.labels,
            names,
            train_counts=counts,
            permutations=settings.permutations,
            alpha=settings.alpha,
            seed=settings.seed,
            train_bursts=first,
            unseen_bursts=second,
            progress=lambda done, total: advance(1),
        )
    warnings = [*inputs.warnings, *geometry.warnings]
    if settings.too_few_permutations:
        needed = f"{math.ceil(1 / settings.alpha - 1)} or more"
        few = f"{settings.permutations} permutations cannot flag a group at {settings.alpha}; give {needed}"
        warnings = [few, *warnings]
    outcomes = None
    if settings.verdict:
        judged, outcomes, reasons, caveats = _judge(inputs, geometry, reasons, counts, settings, runtime)
        warnings += caveats
    else:
        pairs = confusable_pairs(geometry.centers, names)
        judged = {"accuracy": None, "verdict": None, "advice": [], "pairs": pairs, "drilldown": None}
    found = {
        "counts": counts,
        "provenance": {part: table.provenance or None for part, table in inputs.tables.items()},
        "groups_rule": geometry.groups_rule,
        "classes": geometry.classes,
        "groups": geometry.groups,
        "collapse": _collapse(inputs, outcomes, runtime),
        **judged,
        "warnings": list(dict.fromkeys([*reasons, *warnings, *_sampled(inputs, outcomes)])),
    }
    return found, outcomes


def _sampled(inputs: Inputs, outcomes: "Outcomes | None") -> list[str]:
    """Say of which files NC4 was measured on some rows only."""
    tables, classes = [inputs.train, inputs.unseen], len(inputs.names)
    steps = [nearest_step(len(table), table.width, classes) for table in tables]
    if max(steps) == 1 or (outcomes is None and inputs.classifier is None):
        return []
    some = " and ".join(f"every {k}th row of {table.source}" for table, k in zip(tables, steps, strict=True) if k > 1)
    return [f"nc4 was measured on {some}, for their number"]


def _collapse(inputs: Inputs, outcomes: "Outcomes | None", runtime: Runtime) -> dict[str, Any]:
    """Return how far training and unseen features have collapsed, and how far beside the classifier in use."""
    weight, bias, power, device = None, None, inputs.power, runtime.device
    if outcomes is not None:
        weight, bias = torch.as_tensor(outcomes.in_use.coef_), torch.as_tensor(outcomes.in_use.intercept_)
    elif inputs.classifier is not None:
        weight, bias = scaled(inputs.classifier.weight.double(), -power), inputs.classifier.bias
    if weight is not None and bias is not None:
        weight, bias = weight.to(device), bias.to(device)
    sets = {}
    for part in ("train", "unseen"):
        rows, table = inputs.rows[part], inputs.tables[part]
        every = len(rows.order) == len(table)  # else vectors of length 0 are left out
        used = table if every else table.take(rows.order)
        features = map_rows(used.features, lambda block: scaled(block, power)) if power else used.features
        sets[part] = features.to(device), used.labels.to(device)
    means = class_means(*sets["train"], len(inputs.names))
    return {part: collapse(*rows, weight, bias, means) for part, rows in sets.items()}


def _judge(
    inputs: Inputs,
    geometry: GeometryResult,
    reasons: list[str],
    counts: list[int],
    settings: DiagnosisSettings,
    runtime: Runtime,
) -> "tuple[dict[str, Any], Outcomes, list[str], list[str]]":
    """Return the fields that rest on fitted classifiers, what these get right, why the verdict is withheld, caveats."""
    from tailscope.diagnosis.advice import advise, withhold  # here because scikit-learn takes seconds to import
    from tailscope.diagnosis.outcomes import score
    from tailscope.diagnosis.samples import drill_down
    from tailscope.diagnosis.verdict import accuracies, judge
    from tailscope.intervals import Interval

    bound_at = settings.bound_at or max(counts)
    outcomes = score(inputs, bound_at, settings.seed, runtime.progress, settings.remedies, runtime.device)
    pairs = confusable_pairs(geometry.centers, inputs.names, outcomes.labels, outcomes.predicted)
    accuracy = accuracies(outcomes, [entry["group"] for entry in geometry.classes], counts)
    pooled = dict.fromkeys(GROUPS) if settings.too_few_permutations else geometry.groups
    ceiling, other = Interval(settings.ceiling, None, None, None), settings.ceiling_from
    if other is not None:
        ceiling = Interval(other.mean, (other.ci95[0], other.ci95[1]), None, "item")
    verdict, caveats = judge(outcomes, geometry.classes, pooled, ceiling)
    if inputs.copied >= MANY_COPIES:
        share = f"{percent(inputs.copied, 0)} of the held-out samples are training samples too"
        verdict["caveats"].insert(0, f"{share}: they flatter the encoder. --drop-duplicates leaves them out.")
    if outcomes.bound.withheld:
        verdict["caveats"].insert(0, _left_out([inputs.names[k] for k in outcomes.bound.withheld]))
    reasons = reasons or doubts_of_outcomes(inputs, outcomes)
    advice = withhold(verdict, reasons) if reasons else advise(accuracy, verdict, geometry.classes, pairs)
    found = {"accuracy": accuracy, "verdict": verdict, "advice": advice, "pairs": pairs}
    found["drilldown"] = drill_down(inputs, outcomes, geometry.centers, settings.seed)
    return found, outcomes, reasons, caveats


def _left_out(names: Sequence[str]) -> str:
    """Say which classes no number is of: a re-balanced classifier that takes from them looks better than it is."""
    has, them = ("has", "it") if len(names) == 1 else ("have", "them")
    cost = f"what re-balancing costs {them} is not seen"
    named = first_few([f"“{name}”" for name in names])
    return f"{named} {has} too few unseen samples: accuracies and gains leave {them} out, and {cost}. Add some."


def _free_name(name: str, taken: dict[str, Inputs]) -> str:
    """Return the name, numbered where it is taken."""
    numbered = (f"{name} {number}" for number in count(2))
    return next(free for free in chain([name], numbered) if free not in taken)
