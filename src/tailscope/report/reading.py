"""Read result files: each is checked, field by field, as its schema says."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter, ValidationError

from tailscope.errors import UserError
from tailscope.report.diagnosis_schema import Diagnosis, check_diagnosis
from tailscope.report.schema import (
    AGAIN,
    ALONE,
    TRAINED,
    Claims,
    Comparison,
    Geometry,
    Ladder,
    Memorization,
    Swap,
    check_comparison,
    check_geometry,
    check_ladder,
    check_memorization,
    check_swap,
    shown,
)
from tailscope.report.text import writable
from tailscope.results import read_json

KINDS: dict[str, TypeAdapter[Any]] = {
    "swap": TypeAdapter(Annotated[Swap, AfterValidator(check_swap)]),
    "ladder": TypeAdapter(Annotated[Ladder, AfterValidator(check_ladder)]),
    "geometry": TypeAdapter(Annotated[Geometry, AfterValidator(check_geometry)]),
    "claims": TypeAdapter(Claims),
    "compare": TypeAdapter(Annotated[Comparison, AfterValidator(check_comparison)]),
    "memorization": TypeAdapter(Annotated[Memorization, AfterValidator(check_memorization)]),
    "diagnosis": TypeAdapter(Annotated[Diagnosis, AfterValidator(check_diagnosis)]),
}
"""The results that the report knows, by the verb that writes them."""


def read(path: Path, verb: str, *, option: str = "", mend: str = AGAIN) -> Any:
    """Read a result file of a verb, whoever wrote it: a value of the type that is declared above.

    Messages begin with the option that named it, if any, and end with the mend.

    Raises:
        UserError: it cannot be read, or a field is missing or cannot be so; the line names file and field.
    """
    try:
        result = writable(read_json(path))
    except UserError as error:
        raise UserError(f"{option}{error}; {mend}") from None
    found = result.get("schema") if isinstance(result, dict) else type(result).__name__
    if found != f"tailscope.{verb}/1":
        raise UserError(f"{option}{path}: field 'schema' is {shown(found)}, expected 'tailscope.{verb}/1'; {mend}")
    try:
        KINDS[verb].validate_python(result)
    except ValidationError as error:
        raise UserError(f"{option}{path}: {_first(error)}; {mend}") from None
    return result


def _first(error: ValidationError) -> str:
    """Return what is wrong with the first field that is wrong."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(step) for step in first["loc"])
    if first["type"] == "value_error":  # of a check above, which names its fields
        return f"{first['ctx']['error']}{f', in {shown(field)}' if field else ''}"
    if first["type"] == "missing":
        return f"field {shown(field)} is missing"
    return f"field {shown(field)} is {shown(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"


def page_name(out: Path, verb: str) -> str:
    """Return the name of a result's page in a folder: of its own where the folder holds results of another kind too."""
    others = any((out / f"{other}.json").exists() for other in (*ALONE, *TRAINED) if other != verb)
    return f"{verb}.html" if others and verb in ALONE else "report.html"
