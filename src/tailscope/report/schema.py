"""What the report reads of a result file, field by field: files come from anybody, and are checked before use.

Each declaration is the type of a part of a result and what it is checked by. Fields that are not named here may hold
any JSON. Numbers are finite and moderate, so that nothing that is computed or drawn from them overflows; an accuracy
lies between 0 and 1.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import AfterValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from tailscope.intervals import CELLS
from tailscope.measures.fields import MEASURES, MOST, NUMBERS

Number = Annotated[float, Field(ge=-MOST, le=MOST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Bounds = Annotated[list[Number], Field(min_length=2, max_length=2)]
Quantiles = Annotated[list[Number], Field(min_length=5, max_length=5)]
Group = Literal["head", "body", "tail"]
Verb = Literal["swap", "ladder", "geometry"]

TRAINED: tuple[Verb, ...] = ("swap", "ladder", "geometry")
"""The verbs that train, whose results one report tells together."""

ALONE = "diagnosis", "compare", "memorization"
"""The results that have a page each."""

PARTS: tuple[Literal["representation", "classifier"], ...] = ("representation", "classifier")
RUNGS = ("stage1", "stage2", "stage2_aa")
VARIANTS = ("paper", "calibrated")
AGAIN = "run the verb again with --overwrite"


# ---- parts that several results have


class Dataset(TypedDict):
    """What a result says of its data."""

    name: str
    class_names: list[str]
    test_images: NotRequired[Count | None]


class _Plugin(TypedDict):
    """Code from outside the package that the result depends on."""

    name: str
    version: str | None
    sha256: str


class _Environment(TypedDict):
    versions: NotRequired[dict[str, str]]
    hardware: NotRequired[dict[str, Any]]
    plugins: NotRequired[list[_Plugin]]


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


def measures_are_numbers(entry: "Measured") -> "Measured":
    """Refuse a measure that is no number, or no moderate one."""
    for name, value in entry.items():
        if value is None or name not in MEASURES or MEASURES[name].unit not in NUMBERS:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MOST:
            raise ValueError(f"field '{name}' is {shown(value)}, no number that can be")
    return entry


class Measured(TypedDict):
    """Measures of a class or a group; those of `MEASURES` that are numbers are checked too."""

    angles_train_quantiles_deg: NotRequired[Quantiles | None]
    angles_true_quantiles_deg: NotRequired[Quantiles | None]
    unseen_count: NotRequired[Count | None]


class MeasuredClass(Measured):
    """A class's measures, and which class it is."""

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

    dataset: Dataset
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
    g_mean: NotRequired[Share | None]
    h_mean: NotRequired[Share | None]


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


class Ladder(Trained):
    """ladder.json."""

    augmentations: dict[str, dict[str, Cell | None]]


def _of_all_classes(result: Trained) -> None:
    number, names = len(result["counts"]), len(result["dataset"]["class_names"])
    if not number == len(result["groups"]) == names:
        lengths = f"counts {number}, groups {len(result['groups'])}, dataset.class_names {names}"
        raise ValueError(f"fields of different lengths ({lengths})")


def _check_cells(result: Trained, cells: Mapping[str, Cell], where: str) -> None:
    for name, cell in cells.items():
        require_length(f"{where}.{name}.per_class", cell["per_class"], len(result["counts"]))
        require_length(f"{where}.{name}.accuracy", cell["accuracy"], len(result["seeds"]))


def check_swap(swap: Swap) -> Swap:
    """Check what one field says of another."""
    _of_all_classes(swap)
    _check_cells(swap, swap["cells"], "cells")
    if swap["attribution"] is not None:
        require_fields("cells", swap["cells"], CELLS)
    return swap


def check_ladder(ladder: Ladder) -> Ladder:
    """Check what one field says of another."""
    _of_all_classes(ladder)
    for name, rungs in ladder["augmentations"].items():
        _check_cells(ladder, {rung: cell for rung, cell in rungs.items() if cell}, f"augmentations.{name}")
    if not any(rungs.get(rung) for rungs in ladder["augmentations"].values() for rung in RUNGS):
        raise ValueError(f"field 'augmentations' has none of {', '.join(RUNGS)}")
    return ladder


# ---- geometry and claims


class Collapse(TypedDict):
    """How far features have collapsed to one point a class."""

    train: dict[str, Number | None]
    unseen: dict[str, Number | None]


class _Run(TypedDict):
    """The geometry of one encoder's features: of one seed, or the mean over seeds."""

    classes: list[Annotated[MeasuredClass, AfterValidator(measures_are_numbers)]]
    groups: dict[str, Annotated[Measured, AfterValidator(measures_are_numbers)] | None]
    collapse: NotRequired[Collapse]
    warnings: NotRequired[list[str]]


class _Encoder(TypedDict):
    seeds: Annotated[dict[str, dict[str, _Run]], Field(min_length=1)]
    mean: dict[str, _Run]


class Geometry(Trained):
    """geometry.json."""

    encoders: Annotated[dict[str, _Encoder], Field(min_length=1)]


def check_geometry(geometry: Geometry) -> Geometry:
    """Check what one field says of another."""
    _of_all_classes(geometry)
    every = list(range(len(geometry["counts"])))
    for name, encoder in geometry["encoders"].items():
        for place, run in [
            ("mean", encoder["mean"]),
            *((f"seeds.{seed}", one) for seed, one in encoder["seeds"].items()),
        ]:
            require_fields(f"encoders.{name}.{place}", run, VARIANTS)
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
class Claims(TypedDict):
    """claims.json; `spec` is that of the first result that decided them."""

    claims: list[_Claim]
    spec: NotRequired[dict[str, Any]]


# ---- comparison of methods


class _Errors(TypedDict):
    by_seed: list[Share]
    mean: Share


class _Seconds(TypedDict):
    backbone: Number
    classifier: Number


class _Tested(Points):
    p: Share | None
    p_holm: Share | None


class _Difference(_Tested):
    ci95_seeds: Bounds | None


class _Gaps(TypedDict):
    bound: Share
    representation: Points | None
    classifier: Points
    change: dict[Literal["representation", "classifier"], _Tested] | None


class ComparedMethod(Cell):
    """A method of a comparison."""

    name: str
    calls: Annotated[list[str], Field(min_length=1)]
    backbone: str
    calibration_error: _Errors
    seconds: _Seconds
    difference: _Difference | None
    gaps: _Gaps | None


class Comparison(Trained):
    """compare.json."""

    baseline: str
    tune: str
    rule: str
    methods: Annotated[list[ComparedMethod], Field(min_length=2)]
    reference: Cell | None


def check_comparison(comparison: Comparison) -> Comparison:
    """Check what one field says of another."""
    _of_all_classes(comparison)
    named = {method["name"]: method for method in comparison["methods"]}
    if len(named) < len(comparison["methods"]):
        raise ValueError("field 'methods' has a name twice")
    if comparison["baseline"] not in named:
        raise ValueError("field 'baseline' names none of 'methods'")
    reference = comparison["reference"]
    cells = {**{name: cast(Cell, method) for name, method in named.items()}, **({"": reference} if reference else {})}
    _check_cells(comparison, cells, "methods")
    for name, method in named.items():
        require_length(f"methods.{name}.calls", method["calls"], len(comparison["seeds"]))
        if (method["difference"] is None) != (name == comparison["baseline"]):
            raise ValueError(f"field 'methods.{name}.difference' must be there for all but the baseline")
        gaps = method["gaps"]
        if (gaps is None) != (named[comparison["baseline"]]["gaps"] is None):
            raise ValueError("field 'methods.*.gaps' must be there for all methods or for none")
        if gaps is not None:
            if (gaps["representation"] is None) != (reference is None):
                raise ValueError(f"field 'methods.{name}.gaps.representation' does not go with 'reference'")
            if (gaps["change"] is None) != (name == comparison["baseline"]):
                raise ValueError(f"field 'methods.{name}.gaps.change' must be there for all but the baseline")
            require_fields(f"methods.{name}.gaps.change", gaps["change"] or PARTS, PARTS)
    return comparison


# ---- memorisation


class RankCorrelation(TypedDict):
    """Spearman's correlation over classes."""

    spearman: Number | None
    ci95: Bounds | None


class Correlations(RankCorrelation):
    """The same, and what is left of it with the counts taken out."""

    classes: Count
    given_counts: RankCorrelation


class MemorizedClasses(TypedDict):
    """What is memorised of some images: of all, of a class or of a group."""

    memorization: Number | None
    ci95: NotRequired[Bounds | None]
    recall_kept: Share | None
    recall_left_out: Share | None
    above: Share | None
    above_by_chance: Share | None
    images: Count
    undefined: Count
    spread_gap_deg: NotRequired[Number | None]


class MemorizedClass(MemorizedClasses):
    """The same of one class, and which it is."""

    index: Count
    name: str
    group: Group | None
    count: Count
    put_back: Count
    spread_gap_ci95: Bounds | None


class Memorization(Trained):
    """memorization.json."""

    share: Share
    trainings: Annotated[int, Field(ge=2)]
    threshold: Number
    classes: list[MemorizedClass]
    by_group: dict[str, MemorizedClasses | None]
    total: MemorizedClasses
    correlation: Correlations


def check_memorization(memorization: Memorization) -> Memorization:
    """Check what one field says of another."""
    _of_all_classes(memorization)
    if [entry["index"] for entry in memorization["classes"]] != list(range(len(memorization["counts"]))):
        raise ValueError("field 'classes' does not hold class after class")
    for name, entry in memorization["by_group"].items():
        require_fields(f"by_group.{name}", entry or {"ci95": None, "spread_gap_deg": None}, ("ci95", "spread_gap_deg"))
    for entry in memorization["classes"]:
        require_fields(f"classes.{entry['index']}", entry, ("ci95", "spread_gap_deg"))
    return memorization


class Results(TypedDict, total=False):
    """The results of one folder that a report tells together."""

    swap: Swap
    ladder: Ladder
    geometry: Geometry
    claims: Claims


def require_length(field: str, values: Collection[object], length: int) -> None:
    """Refuse a list of another length."""
    if len(values) != length:
        raise ValueError(f"field '{field}' has {len(values)} entries, expected {length}")


def require_fields(where: str, values: Collection[str], names: Iterable[str]) -> None:
    """Refuse a dictionary that lacks one of these fields."""
    for name in names:
        if name not in values:
            raise ValueError(f"field '{where}.{name}' is missing")


def shown(value: object) -> str:
    """Return a value as a message shows it: not too much of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
