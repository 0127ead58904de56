"""As much of the paper as fits into a time limit, most valuable first, and the rest another time.

A *piece* is one experiment on one data set with the seeds so far. Pieces are worked off in order; each is written, with
claims, tables and the report, when it is finished. When the time is up the work stops at the end of an epoch or of an
extraction, which the store keeps, and the same command goes on from there.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tailscope.data.sources import load
from tailscope.experiments.lab import Lab
from tailscope.experiments.settings import Settings, store_root
from tailscope.origin import command
from tailscope.paper import ahead, side_by_side, targets
from tailscope.paper.reproduce import EXPERIMENTS, Reproduction, Tell, conclude, fixed_part
from tailscope.paper.timing import duration, parse_duration
from tailscope.progress import Deadline, Progress, Quiet, TimeIsUp
from tailscope.result_files import check_free, stored_spec, write
from tailscope.store import Store, make_folder
from tailscope.training.runtime import Runtime

EVERYTHING = "everything"
DATASETS = ("cifar10-lt", "cifar100-lt")
"""What `everything` is: the CIFAR half of the paper."""
SCHEMA = "tailscope.reproduce/1"


@dataclass(frozen=True)
class Piece:
    """One experiment on one data set, with the seeds that its result file then holds."""

    dataset: str
    experiment: str
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        """Return the piece as people read it."""
        seeds = f"seed {self.seeds[0]}" if len(self.seeds) == 1 else f"seeds {' '.join(map(str, self.seeds))}"
        return f"{self.experiment} of {self.dataset}, {seeds}"


def order(wanted: Mapping[str, Sequence[str]], seeds: Sequence[int]) -> list[Piece]:
    """Return the pieces, most valuable first: everything with one seed before anything with two.

    Args:
        wanted: the experiments of each data set, both in the order of their value.
        seeds: in the order in which they are added.

    >>> [str(piece) for piece in order({"cifar10-lt": ["swap", "ladder"], "cifar100-lt": ["swap"]}, [0, 1])]
    ... # doctest: +NORMALIZE_WHITESPACE
    ['swap of cifar10-lt, seed 0', 'ladder of cifar10-lt, seed 0', 'swap of cifar100-lt, seed 0',
     'swap of cifar10-lt, seeds 0 1', 'ladder of cifar10-lt, seeds 0 1', 'swap of cifar100-lt, seeds 0 1']
    """
    return [
        Piece(dataset, experiment, tuple(seeds[:n]))
        for n in range(1, len(seeds) + 1)
        for dataset, experiments in wanted.items()
        for experiment in experiments
    ]


def run_queue(reproduction: Reproduction, *, tell: Tell = print, progress: Progress | None = None) -> dict[str, Any]:
    """Work off the pieces of a reproduction until they are done or the time is up; write OUT/reproduce.json.

    `everything` takes both CIFAR data sets, each in a folder of its own such as OUT/cifar10-paper, and keeps trained
    stages beside OUT (in OUT-store, unless told otherwise), so that OUT holds no weights. Other reproductions use OUT
    itself.

    Args:
        reproduction: what to do; its `time_limit` counts from now.
        tell: receives lines for people.
        progress: receives the work done.

    Returns:
        What reproduce.json holds.

    Raises:
        UserError: something about the reproduction, the data or OUT is not usable; before any training.
    """
    started = time.monotonic()
    limit = None if reproduction.time_limit is None else parse_duration(reproduction.time_limit)
    deadline = Deadline(progress or Quiet(), float("inf") if limit is None else limit)
    reproductions = _by_dataset(reproduction)
    settings = {dataset: one.settings() for dataset, one in reproductions.items()}
    first = next(iter(settings.values()))
    pieces = order({dataset: one.wanted() for dataset, one in reproductions.items()}, first.seeds)
    runtime = replace(Runtime.choose(reproduction.device), progress=deadline)
    labs = {dataset: _lab(one, runtime) for dataset, one in reproductions.items()}
    state = [_is_done(piece, reproductions, settings, labs) for piece in pieces]
    tell(f"{len(pieces)} pieces, {sum(state)} done before; {side_by_side.label_of(first.recipe.model_dump())}")
    jobs = reproduction.jobs
    with _training_ahead(list(_left(pieces, state)), jobs, settings, labs, tell, deadline) as trained:
        for k, piece in enumerate(pieces):
            if state[k]:
                continue
            tell(f"piece {k + 1} of {len(pieces)}: {piece}")
            lab, out = labs[piece.dataset], reproductions[piece.dataset].out
            own = settings[piece.dataset].model_copy(update={"seeds": piece.seeds})
            if not (trained(piece) and _finish(piece.experiment, lab, own, out, deadline)):
                break
            state[k] = True
    document = _document(reproduction, reproductions, pieces, state, time.monotonic() - started, limit)
    make_folder(reproduction.out, "--out")
    write(reproduction.out, "reproduce", document)
    tell(_summary(document))
    return document


@contextmanager
def _training_ahead(
    pieces: Sequence[Piece],
    jobs: int,
    settings: Mapping[str, Settings],
    labs: Mapping[str, Lab],
    tell: Tell,
    deadline: Deadline,
) -> Iterator[Callable[[Piece], bool]]:
    """Train the pieces' backbones, several at a time, while pieces whose backbones are there are worked off.

    Yields what waits for the backbones of a piece and returns False where the time was too short for them. With one
    job nothing is trained ahead.
    """
    if jobs == 1:
        yield lambda piece: True
        return
    needed = {
        piece: ahead.missing(
            labs[piece.dataset], settings[piece.dataset].model_copy(update={"seeds": piece.seeds}), piece.experiment
        )
        for piece in pieces
    }
    backbones = {key: backbone for of_piece in needed.values() for key, backbone in of_piece.items()}
    tell(f"{len(backbones)} backbones to train, {jobs} at a time")
    with ahead.training(list(backbones.values()), jobs, deadline) as trained:
        yield lambda piece: all(map(trained, needed[piece]))
        done = sum(map(trained, backbones))
    tell(f"{done} of {len(backbones)} backbones trained")


def _by_dataset(reproduction: Reproduction) -> dict[str, Reproduction]:
    """Return a reproduction for each data set, each with the folder of its results."""
    if reproduction.what != EVERYTHING:
        return {reproduction.dataset: reproduction}
    recipe = replace(reproduction, what="all", dataset=DATASETS[0]).settings().recipe.name
    store = reproduction.store or reproduction.out.with_name(f"{reproduction.out.name}-store")
    return {
        dataset: replace(
            reproduction,
            what="all",
            dataset=dataset,
            out=reproduction.out / f"{dataset.removesuffix('-lt')}-{recipe}",
            store=store,
        )
        for dataset in DATASETS
    }


def _lab(reproduction: Reproduction, runtime: Runtime) -> Lab:
    data = load(targets.benchmark(reproduction.dataset).data, data_root=reproduction.data_root)
    make_folder(reproduction.out, "--out")
    return Lab(data, Store(store_root(reproduction.out, reproduction.store)), runtime)


def _is_done(
    piece: Piece, reproductions: Mapping[str, Reproduction], settings: Mapping[str, Settings], labs: Mapping[str, Lab]
) -> bool:
    """Return whether the piece's file holds its seeds, and perhaps more.

    Raises:
        UserError: it holds a result that this piece may not replace.
    """
    reproduction = reproductions[piece.dataset]
    own = settings[piece.dataset].model_copy(update={"seeds": piece.seeds}).spec(labs[piece.dataset].data)
    stored = stored_spec(reproduction.out / f"{piece.experiment}.json")
    if stored is not None and fixed_part(stored) == fixed_part(own):
        known, seeds = tuple(stored["seeds"]), piece.seeds
        both = min(len(known), len(seeds))
        whole = stored.get("backbones") == own.get("backbones")
        if known[:both] == seeds[:both] and (whole or "backbones" not in own):  # half a swap may become a whole one
            return whole and len(known) >= len(seeds)
    check_free(reproduction.out, piece.experiment, own, overwrite=reproduction.overwrite)
    return False


def _finish(experiment: str, lab: Lab, settings: Settings, out: Path, deadline: Deadline) -> bool:
    """Run an experiment and write everything about it; return False, with nothing written, where the time is up."""
    from tailscope import report  # here because it imports drawing libraries, for a second

    if deadline.passed:
        return False
    try:
        write(out, experiment, EXPERIMENTS[experiment](lab, settings))
    except TimeIsUp:
        return False
    conclude(lab, settings, out)
    report.build(out)
    return True


def _document(
    reproduction: Reproduction,
    reproductions: Mapping[str, Reproduction],
    pieces: Sequence[Piece],
    state: Sequence[bool],
    seconds: float,
    limit: float | None,
) -> dict[str, Any]:
    listed = [
        {
            **asdict(piece),
            "seeds": list(piece.seeds),
            "folder": _below(reproductions[piece.dataset].out, reproduction.out),
            "done": done,
        }
        for piece, done in zip(pieces, state, strict=True)
    ]
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "finished": all(state),
        "seconds": seconds,
        "time_limit_seconds": limit,
        "pieces": listed,
        "left": [str(piece) for piece in _left(pieces, state)],
    }


def _left(pieces: Sequence[Piece], state: Sequence[bool]) -> Iterator[Piece]:
    return (piece for piece, done in zip(pieces, state, strict=True) if not done)


def _below(folder: Path, out: Path) -> str:
    return "." if folder == out else folder.name


def _summary(document: Mapping[str, Any]) -> str:
    """Return one line on what is done and what is left."""
    done, total = sum(piece["done"] for piece in document["pieces"]), len(document["pieces"])
    spent = f"{done} of {total} pieces done, {duration(document['seconds'])} this time"
    if document["finished"]:
        return f"{spent}; nothing is left"
    return f"{spent}; UNFINISHED, left: {'; '.join(document['left'])}; the same command goes on"
