"""`diagnose`: measure, judge, advise, and put everything together as `diagnosis.json` holds it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailscope.device import Runtime
from tailscope.diagnosis.compare import compare, confusable_pairs, pair_up, same_names
from tailscope.diagnosis.inputs import Inputs, bursts, read, without_far_rows
from tailscope.diagnosis.soundness import doubts, doubts_of_outcomes
from tailscope.errors import UserError
from tailscope.groups import GROUPS
from tailscope.measures import GeometryResult, describe
from tailscope.progress import Progress
from tailscope.results import command, versions
from tailscope.tables.table import FeatureTable, Source, is_pair

if TYPE_CHECKING:
    from tailscope.diagnosis.outcomes import Outcomes

Several = Source | Sequence[Source]
LEAST_ALPHA = 0.001  # a class alone among C is flagged after C / alpha permutations
MOST_PERMUTATIONS = 10**6


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

    def __post_init__(self) -> None:
        if not 0 < self.ceiling <= 1:
            raise UserError(f"--ceiling {self.ceiling}: expected an accuracy above 0 and at most 1")
        if not LEAST_ALPHA <= self.alpha < 1:
            raise UserError(f"--alpha {self.alpha}: expected a number from {LEAST_ALPHA} to below 1")
        if not 0 <= self.permutations <= MOST_PERMUTATIONS:
            raise UserError(f"--permutations {self.permutations}: expected 0 to {MOST_PERMUTATIONS:,}")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: expected a whole number of at least 0")

    @property
    def too_few_permutations(self) -> bool:
        """Whether no group's p-value, 1 / (permutations + 1) at least, can be as low as alpha."""
        return 0 < self.permutations < 1 / self.alpha - 1


def prepare(
    train: Several, unseen: Several, test: Several | None, classifier: Any, settings: DiagnosisSettings
) -> dict[str, Inputs]:
    """Read and check the inputs of every encoder; of several, the samples are paired.

    Raises:
        UserError: as `read`; or the lists differ in length or samples.
    """
    trains, others = _many(train), [_many(given) for given in (unseen, test, classifier)]
    for given, option in zip(others, ("--unseen", "--test", "--classifier"), strict=True):
        if given and len(given) != len(trains):
            raise UserError(f"{option}: {len(given)} given for {len(trains)} --train; give one for each, in this order")
    if not trains or not others[0]:
        raise UserError("--train and --unseen: give both")
    filled = [given or [None] * len(trains) for given in others]
    found: dict[str, Inputs] = {}
    for first, second, third, linear in zip(trains, *filled, strict=True):
        table = FeatureTable.of(first, "train")
        reference = next(iter(found.values()), None)
        if reference is not None:
            table = same_names(reference.train, table)
        inputs = read(table, second, third, linear, drop_duplicates=settings.drop_duplicates)
        name = _free_name(Path(table.source).stem, found)
        found[name] = inputs if reference is None else _paired(reference, inputs)
    return found


def spec(inputs: dict[str, Inputs], settings: DiagnosisSettings) -> dict[str, Any]:
    """Return what the result depends on: the numbers of every input, and the settings."""
    return {"encoders": {name: one.fingerprints for name, one in inputs.items()}, **asdict(settings)}


def run(inputs: dict[str, Inputs], settings: DiagnosisSettings, runtime: Runtime) -> dict[str, Any]:
    """Diagnose prepared inputs; of several encoders the first is the reference, flat at the top of the result.

    Raises:
        UserError: the unseen samples are too few for a verdict.
    """
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
    if len(inputs) > 1:
        result |= {"encoders": results, "comparison": compare(kept, results, outcomes)}
    return result


def _one(
    inputs: Inputs, counts: list[int], reasons: list[str], settings: DiagnosisSettings, runtime: Runtime
) -> "tuple[dict[str, Any], Outcomes | None]":
    """Return the part of a diagnosis that is one encoder's.

    Args:
        inputs: without rows that are far too long.
        counts: training samples of each class, with them.
        reasons: why no verdict may be given.
        settings: of the diagnosis.
        runtime: where it is measured.
    """
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
        needed = math.ceil(1 / settings.alpha - 1)
        warnings.insert(
            0, f"{settings.permutations} permutations cannot flag a group at {settings.alpha}; give {needed} or more"
        )
    outcomes = None
    if settings.verdict:
        judged, outcomes, reasons, caveats = _judge(inputs, geometry, reasons, settings, runtime.progress)
        warnings += caveats
    else:
        pairs = confusable_pairs(geometry.centers, names)
        judged = {"accuracy": None, "verdict": None, "advice": [], "pairs": pairs}
    found = {
        "counts": counts,
        "groups_rule": geometry.groups_rule,
        "classes": geometry.classes,
        "groups": geometry.groups,
        **judged,
        "warnings": list(dict.fromkeys([*reasons, *warnings])),
    }
    return found, outcomes


def _judge(
    inputs: Inputs, geometry: GeometryResult, reasons: list[str], settings: DiagnosisSettings, progress: Progress
) -> "tuple[dict[str, Any], Outcomes, list[str], list[str]]":
    """Return the fields that rest on fitted classifiers, what these get right, why the verdict is withheld, caveats."""
    from tailscope.diagnosis.outcomes import score  # here because scikit-learn takes seconds to import
    from tailscope.diagnosis.verdict import accuracies, advise, judge, withhold

    outcomes = score(inputs, settings.seed, progress)
    pairs = confusable_pairs(geometry.centers, inputs.names, outcomes.labels, outcomes.predicted)
    accuracy = accuracies(outcomes, [entry["group"] for entry in geometry.classes])
    pooled = dict.fromkeys(GROUPS) if settings.too_few_permutations else geometry.groups
    verdict, caveats = judge(outcomes, geometry.classes, pooled, settings.ceiling)
    reasons = reasons or doubts_of_outcomes(inputs, outcomes)
    advice = withhold(verdict, reasons) if reasons else advise(accuracy, verdict, geometry.classes, pairs)
    return {"accuracy": accuracy, "verdict": verdict, "advice": advice, "pairs": pairs}, outcomes, reasons, caveats


def _paired(reference: Inputs, inputs: Inputs) -> Inputs:
    """Return another encoder's inputs with the samples in the reference's order."""
    if inputs.names != reference.names or (inputs.test is None) != (reference.test is None):
        raise UserError(f"{inputs.train.source}: other classes than {reference.train.source}; compare the same data")
    paired: dict[str, Any] = {part: pair_up(table, inputs.tables[part]) for part, table in reference.tables.items()}
    return replace(inputs, **paired)


def _many(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) and not is_pair(given) else [given]


def _free_name(name: str, taken: dict[str, Inputs]) -> str:
    """Return the name, numbered where it is taken."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name} {number}"
    return free
