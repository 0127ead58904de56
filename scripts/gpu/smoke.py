"""A first look at a GPU: do captured, compiled and concurrent steps train alike, and at what rate?

    smoke.py plain|compiled [--device cuda:0] [--seconds 2.5] [--miniature]      measure, in a process of its own
    smoke.py choose                                                             print the table and choose

Results go to FOLDER/smoke.jsonl, a line as soon as it is known: what hangs or dies afterwards spoils nothing. `choose`
writes FOLDER/options, what `tailscope reproduce` is to be given, and FOLDER/graphs: 0 where captures go wrong, else 1.
"""

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from unittest.mock import patch

import torch

from tailscope.data.images import ImageSet
from tailscope.data.sources import ImageData
from tailscope.device import Runtime
from tailscope.experiments.places import Here
from tailscope.experiments.runs import Run
from tailscope.experiments.stages import Stages
from tailscope.experiments.trainings import Trainings
from tailscope.progress import Deadline, Quiet
from tailscope.store import Store
from tailscope.training import loop
from tailscope.training.recipes import RECIPES

ENGINES = {"plain": "eager", "compiled": "compiled"}
"""What each part measures."""
COMPILING_COSTS = 0.8
"""What is left of a compiled rate where each kind of step is compiled within the time that is measured out."""
PATIENCE = 60.0
"""Seconds in which every training must have seen its images three times."""
PAPER = 24 * 4_280_000
"""About how many images the CIFAR half of the paper is."""
FEW, EPOCHS, SEEDS = 1_400, 6, 4
"""Of what is compared: ten full batches an epoch and a short one, whose graph is replayed in three of the epochs."""
CLOSE = 0.05
"""How far losses may differ at least; those of weights that begin apart by a millionth do by up to 1 % in the end."""


class Enough(Exception):
    """Ends trainings whose rate is known."""


@contextmanager
def not_captured() -> Iterator[list[str]]:
    """Collect, and show, the warnings of captures that failed: steps go on, and their losses are right."""
    found: list[str] = []

    def emit(record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)
        found.extend([record.getMessage()] * ("is not captured as a CUDA graph" in record.getMessage()))

    handler, log = logging.Handler(logging.WARNING), logging.getLogger("tailscope")
    with patch.object(handler, "emit", emit):
        log.addHandler(handler)
        try:
            yield found
        finally:
            log.removeHandler(handler)


class Bench:
    """Trainings of random images, as many as CIFAR-10-LT has, by the paper's recipe."""

    def __init__(self, device: str, *, engine: str, miniature: bool) -> None:
        count = 660 if miniature else 12_406  # either leaves a short batch
        stream = torch.Generator().manual_seed(0)
        images = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=stream)
        self.images = ImageSet(images, torch.arange(count) % 10, tuple("0123456789"))
        self.runtime = Runtime.choose(device, engine=engine)
        self.recipe = RECIPES["miniature" if miniature else "paper"]

    @contextmanager
    def trainings(
        self, images: ImageSet, jobs: int, seeds: int, epochs: int
    ) -> Iterator[tuple[Trainings, Stages, list[str]]]:
        """Have `seeds` backbones trained, `jobs` at a time, in a store that does not last."""
        with tempfile.TemporaryDirectory() as folder:
            lab = Stages(ImageData("smoke", images, images), Store(Path(folder)), self.runtime)
            short = self.recipe.stage1.model_copy(update={"epochs": epochs, "steps": None, "schedule": "multistep"})
            stage, true = self.recipe.model_copy(update={"stage1": short}).backbone(lab.true().spec), lab.true()
            runs = [Run("smoke", seed, "smoke", stage, true) for seed in range(seeds)]
            with Trainings(Here(jobs), self.runtime, Deadline(Quiet(), 3600.0), 0.0, str) as trainings:
                trainings.add(lab, runs)
                yield trainings, lab, [run.backbone_key for run in runs]

    def losses(self, jobs: int) -> list[float]:
        """Return the mean loss of the last epoch for each seed; NaN where a training or a capture failed."""
        few = self.images.take(range(min(FEW, len(self.images))))
        with not_captured() as failed, self.trainings(few, jobs, SEEDS, EPOCHS) as (trainings, lab, keys):
            while trainings.train(keys) or trainings.busy:
                time.sleep(0.01)
            stored = [lab.store.has("stage1", key) for key in keys]
            metas = [lab.store.meta("stage1", key) if there else {} for key, there in zip(keys, stored, strict=True)]
        return [float("nan") if failed else meta.get("losses", [float("nan")])[-1] for meta in metas]

    def rate(self, jobs: int, seconds: float) -> dict[str, object]:
        """Return the images/s of `jobs` trainings at a time, everything included but for their first epochs."""
        found: dict[str, object] = {"jobs": jobs, "images_per_second": 0}
        with suppress(Enough), self.trainings(self.images, max(2, jobs), jobs, 200) as (trainings, _, _):
            began = time.monotonic()
            while min(trainings.images()) < 3 * len(self.images):
                if time.monotonic() - began > PATIENCE or not trainings.busy:
                    raise Enough
                time.sleep(0.01)
            before, started = sum(trainings.images()), time.monotonic()
            time.sleep(seconds)
            rate = (sum(trainings.images()) - before) / (time.monotonic() - started)
            found |= {"images_per_second": round(rate), "warm_up": round(started - began, 1)}
            raise Enough
        return found


def difference(losses: list[float], reference: list[float]) -> float | None:
    """Return the largest relative difference; None where a loss is no number."""
    found = max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))
    return None if any(loss != loss for loss in (*losses, *reference)) else found


def equality(bench: Bench, jobs: int) -> dict[str, object]:
    """Return by how much losses differ from those of steps that are neither captured nor compiled, one at a time."""
    as_chosen, bench.runtime = bench.runtime, Runtime.choose(str(bench.runtime.device), engine="eager")
    with patch.object(loop, "capturing", lambda device: nullcontext()):
        eager, again = bench.losses(1), bench.losses(1)
    bench.runtime = as_chosen
    return {
        "noise": difference(again, eager),
        "alone": difference(bench.losses(1), eager),
        "together": difference(bench.losses(jobs), eager),
    }


def measure(asked: argparse.Namespace) -> None:
    """Write a line for each thing that is measured."""
    bench = Bench(asked.device, engine=ENGINES[asked.part], miniature=asked.miniature)
    jobs = (1, 2) if asked.miniature else (1, 4, 8, 2)

    def note(what: str, work: Callable[[], dict[str, object]]) -> None:
        started = time.monotonic()
        try:
            found = work()
        except Exception as error:  # the rest is still worth knowing
            found = {"error": f"{type(error).__name__}: {error}"}
        row = {"part": asked.part, "what": what, **found, "took": round(time.monotonic() - started, 1)}
        with (asked.folder / "smoke.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    versions = {"torch": torch.__version__, "python": platform.python_version(), **bench.runtime.describe()}
    note("versions", lambda: dict(versions))
    note("equality", lambda: equality(bench, max(jobs)))
    for number in jobs:
        note("rate", lambda number=number: bench.rate(number, asked.seconds))


def sound(rows: list[dict[str, object]], *names: str) -> bool:
    """Whether losses are those of eager steps, within ten times what two eager trainings differ by, or 5 %."""
    found = [row for row in rows if row["what"] == "equality"]
    values = [row.get(name) for row in found for name in ("noise", *(names or ("alone", "together")))]
    return bool(values) and None not in values and max(values[1:]) <= max(CLOSE, 10 * values[0])


def careful(rows: list[dict[str, object]]) -> tuple[str, int]:
    """Return the options, and whether to capture, where no rate is of use: one at a time if only many go wrong."""
    plain = [row for row in rows if row["part"] == "plain"]
    if plain and not sound(plain, "alone"):
        return "--jobs 2 --engine eager", 0
    return ("--jobs 2 --engine eager" if sound(plain) or not plain else "--jobs 1 --engine eager"), 1


def choose(folder: Path) -> None:
    """Print what was measured, and write the options of the best sound rate, else careful ones."""
    path = folder / "smoke.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    best, (options, graphs) = 0.0, careful(rows)
    for part in ENGINES:
        own = [row for row in rows if row["part"] == part]
        told = sound(own) if any(row["what"] == "equality" for row in own) else "not measured (yet)"
        print(f"{part}: trains as eager steps do: {told}")
        for row in own:
            images = row.get("images_per_second", 0)
            whole = f"; all 24 trainings in {PAPER / images:,.0f} s" if images else ""
            print("   ", {name: value for name, value in row.items() if name != "part"}, whole)
            score = images * (COMPILING_COSTS if part == "compiled" else 1.0) if sound(own) else 0.0
            if score > best:
                best, options, graphs = score, f"--jobs {row['jobs']} --engine {ENGINES[part]}", 1
    (folder / "options").write_text(f"{options}\n")
    (folder / "graphs").write_text(f"{graphs}\n")
    print("chosen:", options, "" if graphs else "without CUDA graphs (TAILSCOPE_GRAPHS=0)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=(*ENGINES, "choose"))
    parser.add_argument("--folder", type=Path, default=Path("out/gpu"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=2.5)
    parser.add_argument("--miniature", action="store_true", help="a rehearsal of seconds on a CPU")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    choose(given.folder) if given.part == "choose" else measure(given)
    sys.stdout.flush()
    os._exit(0)  # a training that hangs must not keep the process
