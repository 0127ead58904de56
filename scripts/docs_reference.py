"""The two references that the code writes: of the command line, from typer, and of result files, from their checks.

`scripts/docs_pages.py` writes them with the other pages that are generated.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from typer.main import get_command

from tailscope import cli
from tailscope.report.reading import KINDS

COMMAND_LINE = """# Command line

Every verb with all its options, as `tailscope VERB --help` shows them. This page is generated
(`python scripts/docs_pages.py`). In Python a verb is the function of the same name and takes the same options:
[Python](reference-api.md).

`tailscope --version` prints the version, and `tailscope --install-completion` teaches your shell to complete options.

## How a command ends

| exit code | what happened |
| --- | --- |
| 0 | Done. Results are written. |
| 1 | A bug in tailscope; a failed check; or standard output could not be written: result files are complete. |
| 2 | A mistake in the input, or a fault of the machine. One line names the file or the option, and what to do. |
| 128 + n | Ended by signal n: 130 is Ctrl-C, 143 a kill. The same command goes on where it was. |

`tailscope store verify` also ends with 1 where something is damaged, and `tailscope reproduce` where a piece failed.

`TAILSCOPE_DEBUG=1` shows the traceback of an unexpected error. `TAILSCOPE_STORE` is the default of `--store`.
`TAILSCOPE_GRAPHS=0` trains on a GPU without CUDA graphs ([Performance](performance.md)).
"""

RESULT_FILES = """# Result files

Verbs that measure or train write their results as JSON. [Results](results.md) and [Diagnose](diagnose.md) say what
the numbers mean, and [Measures](measures.md) defines the fields of each class. The tables below list the fields that
a report reads, and the type of each. All of them are checked before a report is built: one line names a field that is
missing or wrong. Files may hold more fields than these. This page is generated (`python scripts/docs_pages.py`).

`*` stands for any name, such as that of a group or an encoder, and `[]` for every item of a list. Accuracies are
fractions from 0 to 1, undefined is `null`, and every number is finite.

In Python a result is a `dict` of the same fields; [Python](reference-api.md#results) says what else it can do.
"""

_SAID = {
    "swap": "What `tailscope swap` writes.",
    "ladder": "What `tailscope ladder` writes.",
    "geometry": "What `tailscope geometry` writes.",
    "claims": "What `tailscope reproduce` writes about the paper's claims.",
    "compare": "What `tailscope compare` writes.",
    "memorization": "What `tailscope memorization` writes.",
    "diagnosis": "What `tailscope diagnose` writes.",
}


def command_line() -> str:
    """Return the reference of the command line in Markdown."""
    return "\n".join([COMMAND_LINE, *_commands(get_command(cli.app), "tailscope", 2)])


def _commands(group: Any, path: str, level: int) -> Iterator[str]:
    """Yield a section for each command of a group, and below a group's its commands'."""
    for name, command in group.commands.items():
        whole = f"{path} {name}"
        yield f"{'#' * level} {whole.removeprefix('tailscope ')}\n"
        if hasattr(command, "commands"):
            yield f"{command.help}\n"
            yield from _commands(command, whole, level + 1)
        else:
            yield from _command(command, whole)


def _command(command: Any, path: str) -> Iterator[str]:
    said, _, examples = (
        re.sub(r"\n(?!\n)", " ", command.help).replace(" Examples: ", " Example: ").partition(" Example: ")
    )
    yield "\n\n".join(paragraph.strip() for paragraph in said.split("\n") if paragraph.strip()) + "\n"
    if shown := [line for line in re.findall(r"`([^`]+)`", examples) if line.startswith("tailscope ")]:
        yield "\n".join(["```console", *map(_typed, shown), "```\n"])
    yield "| option | default | what it does |\n| --- | --- | --- |"
    yield "\n".join(_option(option) for option in command.params) + "\n"


def _typed(line: str) -> str:
    """Return a command as one types it, on lines that a page has room for."""
    lines = ["$"]
    for word in re.split(r" (?=--)", line):
        if len(lines[-1]) + len(word) > 84:
            lines.append("   ")
        lines[-1] += f" {word}"
    return " \\\n".join(lines)


def _option(option: Any) -> str:
    """Return a row of the table of options."""
    text, _, told = str(option.help or "").partition(" [default: ")
    if not option.opts[0].startswith("-"):
        name = str(option.metavar or option.name.upper())
    else:
        names = [*option.opts, *option.secondary_opts]
        kind = "" if option.is_flag else f" {_takes(option)}"
        name = f"{' / '.join(names)}{kind}"
    if option.required:
        default = "required"
    elif told:
        default = told.removesuffix("]")
    elif option.is_flag and not option.secondary_opts:
        default = "off"
    else:
        default = "" if option.default is None else f"`{_plain(option)}`"
    more = f" Also `${option.envvar}`." if option.envvar else ""
    several = " May be repeated." if getattr(option, "multiple", False) and "epeat" not in text else ""
    cells = (f"`{name}`", default, f"{text}{more}{several}")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plain(option: Any) -> str:
    if option.is_flag:
        return str(option.opts[0] if option.default else option.secondary_opts[0])
    return str(option.default)


def _takes(option: Any) -> str:
    """Return what follows an option, as its type says."""
    name = re.sub(r".*\b(Path|str|int|float)\b.*", r"\1", str(option.type_descriptor.annotation))
    return {"Path": "PATH", "int": "N", "float": "X"}.get(name, "TEXT")


# -- result files ---------------------------------------------------------------------------------------------------


_KINDS = {
    "number": "number",
    "integer": "whole number",
    "string": "text",
    "boolean": "true or false",
    "null": "`null`",
}


def result_files() -> str:
    """Return the reference of result files in Markdown."""
    parts = []
    for verb, kind in KINDS.items():
        schema = kind.json_schema()
        rows = [f"| `{path}` | {of} |" for path, of in sorted(set(_fields(schema, schema, "")))]
        head = f"## {verb}.json\n\n{_SAID[verb]} `schema` is `tailscope.{verb}/1`.\n"
        parts.append("\n".join([head, "| field | holds |", "| --- | --- |", *rows, ""]))
    return "\n".join([RESULT_FILES, *parts])


def _fields(node: Mapping[str, Any], schema: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Yield the path of each field and what it holds."""
    node = _resolved(node, schema)
    for name, below in node.get("properties", {}).items():
        optional = "" if name in node.get("required", ()) else "optional: "
        whole = f"{path}.{name}" if path else name
        yield whole, optional + _holds(below, schema)
        yield from _fields(below, schema, whole)
    items = node.get("items")
    if isinstance(items, Mapping):
        yield from _fields(items, schema, f"{path}[]")
    for below in [node.get("additionalProperties"), *node.get("patternProperties", {}).values()]:
        if isinstance(below, Mapping):
            yield from _fields(below, schema, f"{path}.*")
    for choice in node.get("anyOf", ()):
        yield from _fields(choice, schema, path)


def _resolved(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = node.get("$ref")
    return schema["$defs"][reference.rpartition("/")[2]] if reference else node


def _holds(node: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Say in words what a field holds."""
    node = _resolved(node, schema)
    if "anyOf" in node:
        return " or ".join(_holds(choice, schema) for choice in node["anyOf"])
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if node.get("type") == "array":
        length = node.get("minItems") if node.get("minItems") == node.get("maxItems") else None
        return f"list of {f'{length} × ' if length else ''}{_holds(node['items'], schema)}"
    if node.get("type") == "object":
        by_name = "properties" not in node and isinstance(node.get("additionalProperties"), Mapping)
        return f"object, by name: {_holds(node['additionalProperties'], schema)}" if by_name else "object"
    if (node.get("minimum"), node.get("maximum")) == (0, 1):
        return "fraction"
    kinds = {
        "number": "number",
        "integer": "whole number",
        "string": "text",
        "boolean": "true or false",
        "null": "`null`",
    }
    return kinds.get(str(node.get("type")), "any JSON")
