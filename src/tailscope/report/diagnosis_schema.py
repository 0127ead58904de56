"""What the report reads of a diagnosis, field by field, as `schema` has it for experiments."""

from typing import Annotated, Literal, NotRequired

from pydantic import AfterValidator
from typing_extensions import TypedDict

from tailscope.groups import GROUPS
from tailscope.report.schema import (
    AnyResult,
    Bounds,
    Collapse,
    Count,
    Dataset,
    Group,
    Measured,
    MeasuredClass,
    Number,
    Points,
    Share,
    measures_are_numbers,
    require_fields,
    require_length,
)

Accuracy = Literal["current", "rebalanced", "classifier_bound"]
ACCURACIES: dict[Accuracy, str] = {"current": "in use", "rebalanced": "re-balanced", "classifier_bound": "best fitted"}


class _Samples(Dataset):
    unseen_images: Count


class _Input(TypedDict):
    """A file and the SHA-256 of its numbers; of its class names, groups and ids where it has some."""

    source: str
    sha256: str
    class_names: NotRequired[str]
    groups: NotRequired[str]
    ids: NotRequired[str]


class _DiagnosisSpec(TypedDict):
    permutations: Count
    encoders: dict[str, dict[str, _Input | None]]


class _DiagnosedClass(MeasuredClass):
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
    """How often one classifier is right; of the classifier bound also what it is extrapolated to.

    A result from before has no `g_mean`, `h_mean` and `shots`.
    """

    classifier: str
    mean: Share
    ci95: Bounds | None
    per_class: list[Share | None]
    groups: dict[str, Share | None]
    g_mean: NotRequired[Share | None]
    h_mean: NotRequired[Share | None]
    shots: NotRequired[dict[str, Share | None]]
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
    accuracy: Accuracies | None


Kind = Literal["nearest_misses", "farthest_out", "likely_mislabelled"]
KINDS: dict[Kind, str] = {
    "nearest_misses": "nearest miss",
    "farthest_out": "farthest out",
    "likely_mislabelled": "likely mislabelled",
}


class Sample(TypedDict):
    """A sample that is listed."""

    row: Count
    id: str | None
    predicted: str
    confidence: Share
    true_probability: Number
    angle_deg: Number | None
    suspected: str | None
    suspected_probability: Share | None


class _Listed(TypedDict):
    """How many samples there are of a kind, and the first of them."""

    count: Count
    first: list[Sample]


class _SampledClass(TypedDict):
    scored: Count
    precision: Share | None
    recall: Share | None
    f1: Share | None
    samples: dict[Kind, _Listed]


class _Confusion(TypedDict):
    true: str
    predicted: str
    count: Count
    share: Share


class _Confusions(TypedDict):
    matrix: list[list[Count]] | None
    top: list[_Confusion]


class _Map(TypedDict):
    """Places of samples on a plane, each within [-1, 1]."""

    method: str
    explained: list[Number] | None
    x: list[Number]
    y: list[Number]
    label: list[Count]
    predicted: list[Count]
    sample: list[str]


class DrillDown(TypedDict):
    """From classes to samples."""

    file: str
    scored: Count
    listed: Count
    confusions: _Confusions
    classes: list[_SampledClass]
    map: _Map


class Diagnosis(AnyResult):
    """diagnosis.json."""

    dataset: _Samples
    spec: _DiagnosisSpec
    classes: list[Annotated[_DiagnosedClass, AfterValidator(measures_are_numbers)]]
    groups: dict[str, Annotated[_DiagnosedGroup, AfterValidator(measures_are_numbers)] | None]
    collapse: NotRequired[Collapse | None]
    accuracy: Accuracies | None
    verdict: Verdict | None
    advice: list[_Advice]
    pairs: list[_Pair]
    encoders: NotRequired[dict[str, _Diagnosed]]
    comparison: NotRequired[Comparison | None]
    drilldown: NotRequired[DrillDown | None]


def _check_drilldown(found: DrillDown, number: int) -> None:
    require_length("drilldown.classes", found["classes"], number)
    for k, entry in enumerate(found["classes"]):
        require_fields(f"drilldown.classes.{k}.samples", entry["samples"], KINDS)
    if (matrix := found["confusions"]["matrix"]) is not None:
        require_length("drilldown.confusions.matrix", matrix, number)
        for k, cells in enumerate(matrix):
            require_length(f"drilldown.confusions.matrix.{k}", cells, number)
    drawn = found["map"]
    for name, column in drawn.items():
        if isinstance(column, list) and name != "explained":
            require_length(f"drilldown.map.{name}", column, len(drawn["x"]))
    if max(drawn["label"] + drawn["predicted"], default=0) >= number:
        raise ValueError("field 'drilldown.map' names no class")


def check_diagnosis(result: Diagnosis) -> Diagnosis:
    """Check what one field says of another."""
    number, verdict, accuracy = len(result["counts"]), result["verdict"], result["accuracy"]
    require_length("dataset.class_names", result["dataset"]["class_names"], number)
    require_length("classes", result["classes"], number)
    if verdict is not None:
        require_length("verdict.classes", verdict["classes"], number)
        if accuracy is None:
            raise ValueError("field 'accuracy' is null beside a verdict")
    if accuracy is not None:
        require_fields("accuracy", accuracy, ACCURACIES)
        for name in ACCURACIES:
            require_length(f"accuracy.{name}.per_class", accuracy[name]["per_class"], number)
            require_fields(f"accuracy.{name}.groups", accuracy[name]["groups"], GROUPS)
    if (found := result.get("drilldown")) is not None:
        _check_drilldown(found, number)
    for encoder, one in result.get("encoders", {}).items():
        require_fields(
            f"encoders.{encoder}.accuracy", ACCURACIES if one["accuracy"] is None else one["accuracy"], ACCURACIES
        )
    for k, entry in enumerate(result["classes"]):
        if (entry["nearest_center_true_class"] or 0) >= number:
            raise ValueError(f"field 'classes.{k}.nearest_center_true_class' is no class")
    return result
