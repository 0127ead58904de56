"""The verb `store`: what is trained and stored, checked, thinned out, and moved between machines as one archive."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from typer import Argument, Option

from tailscope.effort import parse_size
from tailscope.errors import UserError, unknown
from tailscope.experiments.options import StoreRoot
from tailscope.progress import shown_on

if TYPE_CHECKING:
    from tailscope.store import Row, Store

Options = dict[str, Any]
"""A verb's options as they were given, by the names of its parameters."""

app = typer.Typer(
    name="store", help="What is trained and stored: list, check, thin out, and move it between machines as one archive."
)


@app.callback(invoke_without_command=True)
def options(context: typer.Context) -> None:
    """Show the help where no command is given."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def list_(store: StoreRoot = None) -> dict[str, Any]:
    """List what a store holds: kind, key, what it is, size, age, what computed it, and whether it has digests.

    States: `digests` (has them, and every reading checks them), `unverified` (written before there were digests; gets
    them when it is first used), `damaged`, `unreadable`. Tensors are not read; `store verify` does that.

    Example: `tailscope store list --store out/store`
    """
    from tailscope.store import inventory

    return _listed(inventory(_open(store)))


def verify(store: StoreRoot = None, console: Console | None = None) -> dict[str, Any]:
    """Check every byte of a store against its digests, and name what is damaged.

    The exit code is 0 if all is whole, 1 if something is damaged or may not be read, and 2 if there is no store. What
    is damaged is made again by the run that needs it; entries without digests get them now, checkpoints with the next
    epoch.

    Example: `tailscope store verify --store out/store`
    """
    from tailscope.store import verify as verify_

    opened = _open(store)
    with shown_on(console) as progress:
        return _listed(verify_(opened, progress))


def pack(
    out: Annotated[Path, Option(help="The archive, FILE.tar; with --max-size also FILE-1.tar, FILE-2.tar ...")],
    keys: Annotated[list[str] | None, Argument(metavar="[KEYS]...", help="Beginnings of keys. [default: all]")] = None,
    kind: Annotated[str, Option(help="Kinds of entries.")] = "stage1,stage2,pretrained",
    checkpoints: Annotated[bool, Option("--checkpoints", help="Also the checkpoints of unfinished stages.")] = False,
    max_size: Annotated[
        str | None, Option(help="Bytes of an archive, such as 15MiB; what does not fit goes into a further one.")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace archives of these names.")] = False,
    store: StoreRoot = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Pack trained stages into one archive, with digests of every file: another machine recalls what this one trained.

    Examples: `tailscope store pack --store out/store --out stages.tar`;
    `tailscope store pack 2099 c95d --checkpoints --kind stage1 --max-size 15MiB --store out/store --out stages.tar`
    """
    from tailscope.store import KINDS
    from tailscope.store import pack as pack_

    opened = _open(store)
    limit = None if max_size is None else parse_size(max_size, "--max-size")
    kinds = kind.split(",")
    for name in kinds:
        if name not in KINDS:
            raise unknown("--kind", name, KINDS)
    entries, unfinished = _chosen(opened, keys or [], kinds, checkpoints)
    with shown_on(console) as progress:
        files = pack_(opened, out, entries, unfinished, limit, progress, overwrite=overwrite)
    return {"files": files, "entries": len(entries), "checkpoints": len(unfinished)}


def add(
    files: Annotated[list[Path], Argument(metavar="FILE...", help="Archives of `store pack`.")],
    replace: Annotated[
        bool, Option("--replace", help="Entries of another content are replaced by the archive's.")
    ] = False,
    store: StoreRoot = None,
    console: Console | None = None,
) -> dict[str, list[str]]:
    """Add what archives of `store pack` hold to a store; all is checked before anything appears in it.

    An entry that is there already is counted; one that is there with another content is left, and the exit code is 2
    (training twice gives other seconds, so this is no damage). A checkpoint is added where neither its entry nor one
    that is as far is there.

    Example: `tailscope store add stages.tar --store out/store`
    """
    from tailscope.store import add as add_

    with shown_on(console) as progress:
        return asdict(add_(_open(store, new=True), *files, replace=replace, progress=progress))


def prune(
    kind: Annotated[str | None, Option(help="All entries of these kinds, such as views,features.")] = None,
    scratch: Annotated[
        bool, Option("--scratch", help="Unfinished work: checkpoints, and what killed runs left.")
    ] = False,
    damaged: Annotated[bool, Option("--damaged", help="Check every byte; what is damaged goes.")] = False,
    keep: Annotated[list[str] | None, Option(help="Beginning of a key that stays; may be repeated.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only say what would go.")] = False,
    store: StoreRoot = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Free space: remove what can be made again, the easiest first; what a running process works on stays.

    `views` and `features` are extracted again in seconds to minutes, `stage2` is fitted again in about as long,
    `stage1` is trained again.

    Examples: `tailscope store prune --kind views,features --dry-run --store out/store`;
    `tailscope store prune --scratch --keep c95d --store out/store`
    """
    from tailscope.store import prune as prune_

    opened = _open(store)
    if not (kind or scratch or damaged):
        raise UserError(f"say what may go: --kind, --scratch or --damaged; {opened.root} holds {_summary(opened)}")
    options = {"scratch": scratch, "damaged": damaged, "dry_run": dry_run}
    with shown_on(console) as progress:
        done = prune_(opened, kinds=kind.split(",") if kind else (), keep=keep or (), progress=progress, **options)
    return {"removed": [asdict(row) for row in done.removed], "busy": done.busy, "dry_run": dry_run}


# -- helpers --------------------------------------------------------------------------------------------------------


def _open(root: Path | str | None, *, new: bool = False) -> "Store":
    """Open a store, which may be `new` or has to be there."""
    from tailscope.store import Store

    if root is None:
        raise UserError("which store? give its folder with --store, OUT/store of an experiment, or as $TAILSCOPE_STORE")
    if not new and not Path(root).is_dir():
        raise UserError(f"--store {root}: no such folder")
    return Store(Path(root))


def _chosen(
    store: "Store", beginnings: list[str], kinds: list[str], checkpoints: bool
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return kind and key of the entries and of the checkpoints that are asked for."""
    from tailscope.store import inventory

    rows = [row for row in inventory(store) if row.kind in kinds and (checkpoints or not row.checkpoint)]
    for beginning in beginnings:
        if not any(row.key.startswith(beginning) for row in rows):
            raise UserError(f"{beginning}: no such key among {', '.join(kinds)}; {store.root} holds {_summary(store)}")
    rows = [row for row in rows if row.key.startswith(tuple(beginnings or [""]))]
    if not rows:
        raise UserError(f"{store.root}: nothing to pack; it holds {_summary(store)}")
    rows.sort(key=lambda row: (kinds.index(row.kind), row.key))
    return [(r.kind, r.key) for r in rows if not r.checkpoint], [(r.kind, r.key) for r in rows if r.checkpoint]


def _summary(store: "Store") -> str:
    from tailscope.store import inventory

    sizes: dict[str, list[int]] = {}
    for row in inventory(store):
        sizes.setdefault("checkpoints" if row.checkpoint else row.kind, []).append(row.bytes)
    return ", ".join(f"{len(of)} {kind} ({decimal(sum(of))})" for kind, of in sizes.items()) or "nothing"


def _listed(rows: "Sequence[Row]") -> dict[str, Any]:
    return {"schema": "tailscope.store-list/1", "entries": [asdict(row) for row in rows]}


# -- what people see ------------------------------------------------------------------------------------------------


def _show_entries(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each entry, in columns."""
    lines = [
        (
            row["kind"] + (" checkpoint" if row["checkpoint"] else ""),
            row["key"][:12],
            decimal(row["bytes"]),
            _age(time.time() - row["written"]),
            row["state"],
            "; ".join(filter(None, (row["what"] or row["problem"], row["arithmetic"]))),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _bad(listed: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in listed["entries"] if row["problem"] is not None]


def _show_verified(listed: dict[str, Any], _: Options) -> Iterator[str]:
    from tailscope.store import Row

    bad = _bad(listed)
    yield from (f"{row['state']}: {Row(**row).name}: {row['problem']}" for row in bad)
    unverified = sum(row["state"] == "unverified" for row in listed["entries"])
    whole = len(listed["entries"]) - len(bad) - unverified
    yield f"{whole} whole, {unverified} readable without digests, {len(bad)} damaged or unreadable"


def _end_verified(listed: dict[str, Any]) -> None:
    if _bad(listed):
        raise typer.Exit(1)


def _show_packed(packed: dict[str, Any], _: Options) -> Iterator[str]:
    yield from (f"{file}: {decimal(file.stat().st_size)}" for file in packed["files"])
    counts = f"{packed['entries']} entries, {packed['checkpoints']} checkpoints"
    yield f"{counts}; `tailscope store add` puts them into another store"


def _show_added(added: dict[str, list[str]], _: Options) -> Iterator[str]:
    words = {"added": "added", "replaced": "replaced", "equal": "there already", "unneeded": "not needed"}
    yield ", ".join(f"{len(added[field])} {word}" for field, word in words.items() if added[field]) or "nothing to add"


def _end_added(added: dict[str, list[str]]) -> None:
    """Name what was left out."""
    for field, why in (
        ("differing", "there with another content, and left; --replace takes the archive's"),
        ("busy", "left, for a running process is working on it; add again when it has ended"),
    ):
        if names := added[field]:
            raise UserError(f"{', '.join(names[:3])}{' ...' if names[3:] else ''}: {why}")


def _show_pruned(done: dict[str, Any], _: Options) -> Iterator[str]:
    removed, word = done["removed"], "would go" if done["dry_run"] else "removed"
    yield from _show_entries(removed)
    yield f"{len(removed)} {word}, {decimal(sum(row['bytes'] for row in removed))}; {len(done['busy'])} in use stayed"


def _age(seconds: float) -> str:
    """Return a time as people read it.

    >>> _age(40), _age(7200), _age(86400 * 3)
    ('now', '2 h ago', '3 d ago')
    """
    for name, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {name} ago"
    return "now"


Command = tuple[Callable[..., Any], Callable[[Any, Options], Iterator[str]], Callable[[Any], object]]
COMMANDS: list[Command] = [
    (list_, lambda listed, _: _show_entries(listed["entries"]), bool),
    (verify, _show_verified, _end_verified),
    (pack, _show_packed, bool),
    (add, _show_added, _end_added),
    (prune, _show_pruned, bool),
]
"""Each verb, what it shows, and how it ends."""
