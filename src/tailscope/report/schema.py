"""What the report reads of a result file, field by field: files come from anybody, and are checked before use.

Each declaration is the type of a part of a result and what it is checked by. Fields that are not named here may hold
any JSON. Numbers are finite and moderate, so that nothing that is computed or drawn from them overflows; an accuracy
lies between 0 and 1.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from tailscope.errors import UserError
from tailscope.groups import GROUPS
from tailscope.measures.fields import MEASURES, MOST, NUMBERS
from tailscope.report.text import writable
from tailscope.results import read_json

Number = Annotated[float, Field(ge=-MOST, le=MOST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Bounds = Annotated[list[Number], Field(min_length=2, max_length=2)]
Quantiles = Annotated[list[Number], Field(min_length=5, max_length=5)]
Group = Literal["head", "body", "tail"]
Accuracy = Literal["current", "rebalanced", "classifier_bound"]
Verb = Literal["swap", "ladder", "geometry"]

TRAINED: tuple[Verb, ...] = ("swap", "ladder", "geometry")
"""The verbs that train, whose results one report tells together."""

PARTS: tuple[Literal["representation", "classifier"], ...] = ("representation", "classifier")
CELLS = ("lt->lt", "lt->true", "true->lt", "true->true")
RUNGS = ("stage1", "stage2", "stage2_aa")
VARIANTS = ("paper", "calibrated")
ACCURACIES: dict[Accuracy, str] = {"current": "in use", "rebalanced": "re-balanced", "classifier_bound": "best fitted"}
AGAIN = "run the verb again with --overwrite"


# ---- parts that several results have


class _Dataset(TypedDict):
    name: str
    class_names: list[str]
    test_images: NotRequired[Count | None]


class _Environment(TypedDict):
    versions: NotRequired[dict[str, str]]
    hardware: NotRequired[dict[str, Any]]


class Points(TypedDict):
    """A difference of accuracies, with its interval."""

    points: Number
    ci95: Bounds | None


@with_config(ConfigDict(strict=True, extra="allow"))
class AnyResult(TypedDict):
    """What results on a data set have in common."""

    counts: Annotated[list[Count], Field(min_length=1)]
    warnings: list[str]
    environment: NotRequired[_Environment]
    command: NotRequired[str | None]
    created: NotRequired[str | None]


def _measures_are_numbers(entry: "Measured") -> "Measured":
    for name, value in entry.items():
        if value is None or name not in MEASURES or MEASURES[name].unit not in NUMBERS:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MOST:
            raise ValueError(f"field '{name}' is {_shown(value)}, no number that can be")
    return entry


class Measured(TypedDict):
    """Measures of a class or a group; those of `MEASURES` that are numbers are checked too."""

    angles_train_quantiles_deg: NotRequired[Quantiles | None]
    angles_true_quantiles_deg: NotRequired[Quantiles | None]
    unseen_count: NotRequired[Count | None]


class _MeasuredClass(Measured):
    index: Count


# ---- swap and ladder


class _Card(TypedDict):
    """How one row of a result was trained: any fields beside these."""

    row: str
    seconds: NotRequired[Number | None]


class _Recipe(TypedDict):
    name: str
    card: str
    converged: bool


class Trained(AnyResult):
    """What results of trainings have in common."""

    dataset: _Dataset
    recipe: _Recipe
    groups: list[Group | None]
    groups_rule: str
    seeds: Annotated[list[int], Field(min_length=1)]
    spec: dict[str, Any]
    provenance: list[_Card]
    subset_sha256: NotRequired[list[str]]


class Cell(TypedDict):
    """Accuracy of one pair of backbone and classifier, or of one rung."""

    accuracy: list[Share]
    mean: Share
    ci95: Bounds | None
    per_class: list[Share | None]
    groups: dict[str, Share | None]


class Part(Points):
    """What a half of the network costs."""

    share: Number | None
    share_ci95: Bounds | None


class _Steps(TypedDict):
    imbalance: Points
    sample_count: Points


class Attribution(TypedDict):
    """How the gap splits."""

    gap: Number
    gap_ci95: Bounds | None
    representation: Part
    classifier: Part
    interaction: Number
    interaction_ci95: Bounds | None
    order_matters: bool
    matched: NotRequired[dict[str, _Steps] | None]


class Swap(Trained):
    """swap.json."""

    cells: Annotated[dict[Annotated[str, Field(pattern=r"^[^>]+->[^>]+$")], Cell], Field(min_length=1)]
    stage1: NotRequired[dict[str, Cell]]
    attribution: Attribution | None


class _Ladder(Trained):
    augmentations: dict[str, dict[str, Cell | None]]


def _of_all_classes(result: Trained) -> None:
    number, names = len(result["counts"]), len(result["dataset"]["class_names"])
    if not number == len(result["groups"]) == names:
        lengths = f"counts {number}, groups {len(result['groups'])}, dataset.class_names {names}"
        raise ValueError(f"fields of different lengths ({lengths})")


def _check_cells(result: Trained, cells: Mapping[str, Cell], where: str) -> None:
    for name, cell in cells.items():
        _require_length(f"{where}.{name}.per_class", cell["per_class"], len(result["counts"]))
        _require_length(f"{where}.{name}.accuracy", cell["accuracy"], len(result["seeds"]))


def _check_swap(swap: Swap) -> Swap:
    _of_all_classes(swap)
    _check_cells(swap, swap["cells"], "cells")
    if swap["attribution"] is not None:
        _require_fields("cells", swap["cells"], CELLS)
    return swap


def _check_ladder(ladder: _Ladder) -> _Ladder:
    _of_all_classes(ladder)
    for name, rungs in ladder["augmentations"].items():
        _check_cells(ladder, {rung: cell for rung, cell in rungs.items() if cell}, f"augmentations.{name}")
    if not any(rungs.get(rung) for rungs in ladder["augmentations"].values() for rung in RUNGS):
        raise ValueError(f"field 'augmentations' has none of {', '.join(RUNGS)}")
    return ladder


# ---- geometry and claims


class _Run(TypedDict):
    """The geometry of one encoder's features: of one seed, or the mean over seeds."""

    classes: list[Annotated[_MeasuredClass, AfterValidator(_measures_are_numbers)]]
    groups: dict[str, Annotated[Measured, AfterValidator(_measures_are_numbers)] | None]
    warnings: NotRequired[list[str]]


class _Encoder(TypedDict):
    seeds: Annotated[dict[str, dict[str, _Run]], Field(min_length=1)]
    mean: dict[str, _Run]


class _Geometry(Trained):
    encoders: Annotated[dict[str, _Encoder], Field(min_length=1)]


def _check_geometry(geometry: _Geometry) -> _Geometry:
    _of_all_classes(geometry)
    every = list(range(len(geometry["counts"])))
    for name, encoder in geometry["encoders"].items():
        for place, run in [
            ("mean", encoder["mean"]),
            *((f"seeds.{seed}", one) for seed, one in encoder["seeds"].items()),
        ]:
            _require_fields(f"encoders.{name}.{place}", run, VARIANTS)
            for variant in VARIANTS:
                if [entry["index"] for entry in run[variant]["classes"]] != every:
                    raise ValueError(
                        f"field 'encoders.{name}.{place}.{variant}.classes' does not hold class after class"
                    )
    return geometry


class _Claim(TypedDict):
    claim: str
    figure: str
    statistic: str
    estimate: Number | None
    ci95: Bounds | None
    verdict: str


@with_config(ConfigDict(strict=True, extra="allow"))
class _Claims(TypedDict):
    claims: list[_Claim]


class Results(TypedDict, total=False):
    """The results of one folder that a report tells together."""

    swap: Swap
    ladder: _Ladder
    geometry: _Geometry
    claims: _Claims


# ---- diagnosis


class _Samples(_Dataset):
    unseen_images: Count


class _Input(TypedDict):
    source: str
    sha256: str


class _DiagnosisSpec(TypedDict):
    permutations: Count
    encoders: dict[str, dict[str, _Input | None]]


class _DiagnosedClass(_MeasuredClass):
    name: str
    group: Group | None
    train_count: Count
    nearest_center_true_class: Count | None
    spread_gap_deg: NotRequired[Number | None]
    spread_gap_flagged: bool | None
    spread_gap_material: bool | None


class _DiagnosedGroup(Measured):
    train_count: Count
    classes: NotRequired[Count | None]


class _Extrapolated(TypedDict):
    """The classifier bound at a number of samples a class; a result from before learning curves has no mean."""

    mean: NotRequired[Share]
    ci95: Bounds | None
    bound_at: NotRequired[Count]


class Recalls(TypedDict):
    """How often one classifier is right; of the classifier bound also what it is extrapolated to."""

    classifier: str
    mean: Share
    ci95: Bounds | None
    per_class: list[Share | None]
    groups: dict[str, Share | None]
    extrapolated: NotRequired[_Extrapolated | None]


class _Estimate(TypedDict):
    mean: Share
    ci95: Bounds | None


class _Calibration(TypedDict):
    """The expected calibration error of the classifier in use and of the best remedy, in `bins` bins of confidence."""

    bins: Count
    current: _Estimate
    rebalanced: _Estimate


class Accuracies(TypedDict):
    """What was scored on the same samples; a result from before has no calibration."""

    current: Recalls
    rebalanced: Recalls
    classifier_bound: Recalls
    calibration: NotRequired[_Calibration]


class Judged(TypedDict):
    """What holds back a class or a group."""

    bottleneck: str
    kind: NotRequired[str | None]
    reason: NotRequired[str | None]
    classifier_gap: NotRequired[Points | None]
    representation_gap: NotRequired[Points | None]


class _JudgedGroup(Judged):
    current: Share


class Verdict(TypedDict):
    """What holds back the classifier in use."""

    bottleneck: str
    kind: NotRequired[str | None]
    reason: str
    withheld: NotRequired[list[str] | None]
    caveats: NotRequired[list[str] | None]
    above_chance: NotRequired[bool]
    ceiling: Share
    classifier_gap: Points
    rebalancing_gap: Points
    representation_gap: Points
    groups: dict[str, _JudgedGroup | None]
    classes: list[Judged]


class _Advice(TypedDict):
    text: str


class _Pair(TypedDict):
    first: str
    second: str
    angle_deg: Number | None
    first_as_second: Share | None
    second_as_first: Share | None


class _Aspect(TypedDict):
    difference: Number | None
    ci95: Bounds | None
    better: str | None
    note: NotRequired[str | None]


Better = Literal["other", "reference"]


class Differences(TypedDict):
    """Accuracies of an encoder minus those of the first; a result from before two bounds has the first three only."""

    current: Points | None
    rebalanced: Points | None
    classifier_bound: Points | None
    attained: NotRequired[Points | None]
    extrapolated: NotRequired[Points | None]
    scored: NotRequired[Count]
    reason: NotRequired[str | None]
    better: NotRequired[Better | None]


class Compared(TypedDict):
    """An encoder beside the first."""

    better: NotRequired[Better | None]
    points: NotRequired[Number | None]
    ci95: NotRequired[Bounds | None]
    text: NotRequired[str]
    reason: NotRequired[str | None]
    accuracy: Differences | None
    by_group: NotRequired[dict[Group, Differences | None]]
    groups: dict[str, dict[Literal["localises", "separates", "compacts", "margin"], _Aspect]]


class Comparison(TypedDict):
    """Every encoder beside the first, and which is best."""

    reference: str
    ranking: NotRequired[list[str]]
    best: NotRequired[str | None]
    text: NotRequired[str]
    encoders: dict[str, Compared]


class _Diagnosed(TypedDict):
    accuracy: dict[str, Recalls] | None


class Diagnosis(AnyResult):
    """diagnosis.json."""

    dataset: _Samples
    spec: _DiagnosisSpec
    classes: list[Annotated[_DiagnosedClass, AfterValidator(_measures_are_numbers)]]
    groups: dict[str, Annotated[_DiagnosedGroup, AfterValidator(_measures_are_numbers)] | None]
    accuracy: Accuracies | None
    verdict: Verdict | None
    advice: list[_Advice]
    pairs: list[_Pair]
    encoders: NotRequired[dict[str, _Diagnosed]]
    comparison: NotRequired[Comparison | None]


def _check_diagnosis(result: Diagnosis) -> Diagnosis:
    number, verdict, accuracy = len(result["counts"]), result["verdict"], result["accuracy"]
    _require_length("dataset.class_names", result["dataset"]["class_names"], number)
    _require_length("classes", result["classes"], number)
    if verdict is not None:
        _require_length("verdict.classes", verdict["classes"], number)
        if accuracy is None:
            raise ValueError("field 'accuracy' is null beside a verdict")
    if accuracy is not None:
        _require_fields("accuracy", accuracy, ACCURACIES)
        for name in ACCURACIES:
            _require_length(f"accuracy.{name}.per_class", accuracy[name]["per_class"], number)
            _require_fields(f"accuracy.{name}.groups", accuracy[name]["groups"], GROUPS)
    for encoder, one in result.get("encoders", {}).items():
        _require_fields(
            f"encoders.{encoder}.accuracy", ACCURACIES if one["accuracy"] is None else one["accuracy"], ACCURACIES
        )
    for k, entry in enumerate(result["classes"]):
        if (entry["nearest_center_true_class"] or 0) >= number:
            raise ValueError(f"field 'classes.{k}.nearest_center_true_class' is no class")
    return result


# ---- reading

KINDS: dict[str, TypeAdapter[Any]] = {
    "swap": TypeAdapter(Annotated[Swap, AfterValidator(_check_swap)]),
    "ladder": TypeAdapter(Annotated[_Ladder, AfterValidator(_check_ladder)]),
    "geometry": TypeAdapter(Annotated[_Geometry, AfterValidator(_check_geometry)]),
    "claims": TypeAdapter(_Claims),
    "diagnosis": TypeAdapter(Annotated[Diagnosis, AfterValidator(_check_diagnosis)]),
}
"""The results that the report knows, by the verb that writes them."""


def read(path: Path, verb: str) -> Any:
    """Read a result file of a verb, whoever wrote it: a value of the type that is declared above.

    Raises:
        UserError: it cannot be read, or a field is missing or cannot be so; the line names file and field.
    """
    try:
        result = writable(read_json(path))
    except UserError as error:
        raise UserError(f"{error}; {AGAIN}") from None
    found = result.get("schema") if isinstance(result, dict) else type(result).__name__
    if found != f"tailscope.{verb}/1":
        raise UserError(f"{path}: field 'schema' is {_shown(found)}, expected 'tailscope.{verb}/1'; {AGAIN}")
    try:
        KINDS[verb].validate_python(result)
    except ValidationError as error:
        raise UserError(f"{path}: {_first(error)}; {AGAIN}") from None
    return result


def _first(error: ValidationError) -> str:
    """Return what is wrong with the first field that is wrong."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(step) for step in first["loc"])
    if first["type"] == "value_error":  # of a check above, which names its fields
        return f"{first['ctx']['error']}{f', in {_shown(field)}' if field else ''}"
    if first["type"] == "missing":
        return f"field {_shown(field)} is missing"
    return f"field {_shown(field)} is {_shown(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _require_length(field: str, values: Collection[object], length: int) -> None:
    if len(values) != length:
        raise ValueError(f"field '{field}' has {len(values)} entries, expected {length}")


def _require_fields(where: str, values: Collection[str], names: Iterable[str]) -> None:
    for name in names:
        if name not in values:
            raise ValueError(f"field '{where}.{name}' is missing")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
