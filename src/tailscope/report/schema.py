"""What the report reads of a result file, field by field: files come from anybody, and are checked before use.

Fields that are not named here may hold any JSON. Numbers are finite and moderate, so that nothing that is computed or
drawn from them overflows; an accuracy lies between 0 and 1.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tailscope.errors import UserError
from tailscope.geometry.fields import MOST
from tailscope.groups import GROUPS
from tailscope.report.measures import BY_FIELD

Number = Annotated[float, Field(ge=-MOST, le=MOST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Bounds = Annotated[list[Number], Field(min_length=2, max_length=2)]
Quantiles = Annotated[list[Number], Field(min_length=5, max_length=5)]
Group = Literal["head", "body", "tail"] | None
Json = Any

CELLS = ("lt->lt", "lt->true", "true->lt", "true->true")
RUNGS = ("stage1", "stage2", "stage2_aa")
MEASURED = {*BY_FIELD, "spread_gap_p", "spread_gap_q", "center_shift_q"}
AGAIN = "run the verb again with --overwrite"


class _Part(BaseModel):
    """A part of a result: nothing is converted, and what is not named may be anything."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Dataset(_Part):
    name: str
    class_names: list[str]


class _Images(_Dataset):
    test_images: Count | None = None


class _Recipe(_Part):
    name: str
    card: str
    converged: bool


class _Hardware(_Part):
    cpu: str | None = None
    cores: Count | None = None
    gpu: str | None = None


class _Environment(_Part):
    versions: dict[str, str] = {}
    hardware: _Hardware = _Hardware()


class _Card(_Part):
    row: str
    seconds: Number | None = None


class _Classes(_Part):
    counts: Annotated[list[Count], Field(min_length=1)]
    warnings: list[str]
    environment: _Environment = _Environment()
    command: str | None = None
    created: str | None = None


class _Trained(_Classes):
    dataset: _Images
    recipe: _Recipe
    groups: list[Group]
    groups_rule: str
    seeds: Annotated[list[int], Field(min_length=1)]
    spec: dict[str, Json]
    provenance: list[_Card]
    subset_sha256: list[str] = []

    @model_validator(mode="after")
    def _of_all_classes(self) -> Self:
        names = self.dataset.class_names
        lengths = {"counts": len(self.counts), "groups": len(self.groups), "dataset.class_names": len(names)}
        if len(set(lengths.values())) > 1:
            text = ", ".join(f"{field} {length}" for field, length in lengths.items())
            raise ValueError(f"fields of different lengths ({text})")
        return self

    def _check_cells(self, cells: "dict[str, _Cell]", where: str) -> None:
        for name, cell in cells.items():
            _require_length(f"{where}.{name}.per_class", cell.per_class, len(self.counts))
            _require_length(f"{where}.{name}.accuracy", cell.accuracy, len(self.seeds))


class _Cell(_Part):
    accuracy: list[Share]
    mean: Share
    ci95: Bounds | None
    per_class: list[Share | None]
    groups: dict[str, Share | None]


class _Points(_Part):
    points: Number
    ci95: Bounds | None


class _Half(_Points):
    share: Number | None
    share_ci95: Bounds | None


class _Steps(_Part):
    imbalance: _Points
    sample_count: _Points


class _Attribution(_Part):
    gap: Number
    gap_ci95: Bounds | None
    representation: _Half
    classifier: _Half
    interaction: Number
    interaction_ci95: Bounds | None
    order_matters: bool
    matched: dict[str, _Steps] | None = None


class _Swap(_Trained):
    cells: Annotated[dict[Annotated[str, Field(pattern=r"^[^>]+->[^>]+$")], _Cell], Field(min_length=1)]
    stage1: dict[str, _Cell] = {}
    attribution: _Attribution | None

    @model_validator(mode="after")
    def _of_whole_cells(self) -> Self:
        self._check_cells(self.cells, "cells")
        for cell in CELLS if self.attribution is not None else ():
            if cell not in self.cells:
                raise ValueError(f"field 'cells.{cell}' is missing")
        return self


class _Ladder(_Trained):
    augmentations: dict[str, dict[str, _Cell | None]]

    @model_validator(mode="after")
    def _of_some_rungs(self) -> Self:
        for name, rungs in self.augmentations.items():
            self._check_cells({rung: cell for rung, cell in rungs.items() if cell}, f"augmentations.{name}")
        if not any(rungs.get(rung) for rungs in self.augmentations.values() for rung in RUNGS):
            raise ValueError(f"field 'augmentations' has none of {', '.join(RUNGS)}")
        return self


class _Measures(_Part):
    """Measures of a class or group."""

    angles_train_quantiles_deg: Quantiles | None = None
    angles_true_quantiles_deg: Quantiles | None = None
    unseen_count: Count | None = None

    @model_validator(mode="after")
    def _of_numbers(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name in MEASURED and value is not None and not _is_number(value):
                raise ValueError(f"field '{name}' is {_shown(value)}, no number that can be")
        return self


class _ClassMeasures(_Measures):
    index: Count


class _Variant(_Part):
    classes: list[_ClassMeasures]
    groups: dict[str, _Measures | None]
    warnings: list[str] = []


class _Encoder(_Part):
    seeds: Annotated[dict[str, dict[str, _Variant]], Field(min_length=1)]
    mean: dict[str, _Variant]


class _Geometry(_Trained):
    encoders: Annotated[dict[str, _Encoder], Field(min_length=1)]

    @model_validator(mode="after")
    def _of_every_class(self) -> Self:
        for name, encoder in self.encoders.items():
            runs = {"mean": encoder.mean, **{f"seeds.{seed}": run for seed, run in encoder.seeds.items()}}
            for place, run in runs.items():
                for variant in ("paper", "calibrated"):
                    where = f"encoders.{name}.{place}.{variant}"
                    if variant not in run:
                        raise ValueError(f"field '{where}' is missing")
                    if [entry.index for entry in run[variant].classes] != list(range(len(self.counts))):
                        raise ValueError(f"field '{where}.classes' does not hold class after class")
        return self


class _Claim(_Part):
    claim: str
    figure: str
    statistic: str
    estimate: Number | None
    ci95: Bounds | None
    verdict: str


class _Claims(_Part):
    claims: list[_Claim]


class _Samples(_Dataset):
    unseen_images: Count
    test_images: Count | None


class _Input(_Part):
    source: str
    sha256: str


class _DiagnosisSpec(_Part):
    permutations: Count
    encoders: dict[str, dict[str, _Input | None]]


class _DiagnosedClass(_ClassMeasures):
    name: str
    group: Group
    train_count: Count
    nearest_center_true_class: Count | None
    spread_gap_flagged: bool | None
    spread_gap_material: bool | None


class _DiagnosedGroup(_Measures):
    train_count: Count
    classes: Count | None = None


class _Recalls(_Part):
    classifier: str
    mean: Share
    ci95: Bounds | None
    per_class: list[Share | None]
    groups: dict[Literal["head", "body", "tail"], Share | None]


class _Accuracies(_Part):
    current: _Recalls
    rebalanced: _Recalls
    classifier_bound: _Recalls


class _Judged(_Part):
    bottleneck: str
    reason: str | None = None
    classifier_gap: _Points | None = None
    representation_gap: _Points | None = None


class _JudgedGroup(_Judged):
    current: Share


class _Verdict(_Part):
    bottleneck: str
    reason: str
    ceiling: Share
    classifier_gap: _Points
    rebalancing_gap: _Points
    representation_gap: _Points
    groups: dict[str, _JudgedGroup | None]
    classes: list[_Judged]


class _Advice(_Part):
    text: str


class _Pair(_Part):
    first: str
    second: str
    angle_deg: Number | None
    first_as_second: Share | None
    second_as_first: Share | None


class _Aspect(_Part):
    difference: Number | None
    ci95: Bounds | None
    better: str | None


class _Compared(_Part):
    accuracy: dict[Literal["current", "rebalanced", "classifier_bound"], _Points | None] | None
    groups: dict[str, dict[Literal["localises", "separates", "compacts", "margin"], _Aspect]]


class _Comparison(_Part):
    reference: str
    encoders: dict[str, _Compared]


class _Diagnosis(_Classes):
    dataset: _Samples
    spec: _DiagnosisSpec
    classes: list[_DiagnosedClass]
    groups: dict[str, _DiagnosedGroup | None]
    accuracy: _Accuracies | None
    verdict: _Verdict | None
    advice: list[_Advice]
    pairs: list[_Pair]
    comparison: _Comparison | None = None
    command: str
    created: str

    @model_validator(mode="after")
    def _of_all_classes(self) -> Self:
        number = len(self.counts)
        _require_length("dataset.class_names", self.dataset.class_names, number)
        _require_length("classes", self.classes, number)
        if self.verdict is not None:
            _require_length("verdict.classes", self.verdict.classes, number)
            if self.accuracy is None:
                raise ValueError("field 'accuracy' is null beside a verdict")
        for name in ("current", "rebalanced", "classifier_bound") if self.accuracy is not None else ():
            recalls = getattr(self.accuracy, name)
            _require_length(f"accuracy.{name}.per_class", recalls.per_class, number)
            for group in GROUPS:
                if group not in recalls.groups:
                    raise ValueError(f"field 'accuracy.{name}.groups.{group}' is missing")
        for k, entry in enumerate(self.classes):
            if (entry.nearest_center_true_class or 0) >= number:
                raise ValueError(f"field 'classes.{k}.nearest_center_true_class' is no class")
        return self


KINDS: dict[str, type[BaseModel]] = {
    "swap": _Swap,
    "ladder": _Ladder,
    "geometry": _Geometry,
    "claims": _Claims,
    "diagnosis": _Diagnosis,
}
"""The results that the report knows, by the verb that writes them."""


def check(path: Path, result: Any, verb: str) -> None:
    """Refuse what is no result of the verb.

    Raises:
        UserError: its schema is another, or a field is missing or holds something that cannot be.
    """
    schema = f"tailscope.{verb}/1"
    found = result.get("schema") if isinstance(result, dict) else type(result).__name__
    if found != schema:
        raise UserError(f"{path}: field 'schema' is {_shown(found)}, expected {schema!r}; {AGAIN}")
    try:
        KINDS[verb].model_validate(result)
    except ValidationError as error:
        raise UserError(f"{path}: {_first(error)}; {AGAIN}") from None


def _first(error: ValidationError) -> str:
    """Return what is wrong with the first field that is wrong."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(step) for step in first["loc"])
    if first["type"] == "value_error":  # of a validator above, which names its fields
        return f"{first['ctx']['error']}{f', in {_shown(field)}' if field else ''}"
    if first["type"] == "missing":
        return f"field {_shown(field)} is missing"
    return f"field {_shown(field)} is {_shown(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _require_length(field: str, values: Collection[object], length: int) -> None:
    if len(values) != length:
        raise ValueError(f"field '{field}' has {len(values)} entries, expected {length}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
