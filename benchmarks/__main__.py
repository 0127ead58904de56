"""Command line: `python -m benchmarks [--quick] [--only train,swap]`, `python -m benchmarks table` for the documents.

Full records go to results/bench and from there into docs/performance.md; quick ones to out/bench-quick. What is about
images in files (`--only images,hours`) runs only where it is asked for, and goes into docs/imagenet.md. The verdict's
own test (`--only verdicts`) goes to results/verdicts.json and docs/verdicts.md, what re-balancing gains in a user's
network (`--only rebalance`) to results/rebalance.json and docs/howto-export.md, and how long a stranger's first steps
take (`--only strangers`) to results/strangers.json and docs/get-started.md, and what a sweep on Ray costs (`--only
sweep`) to results/sweep.json and docs/howto-cluster.md.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.record import Options, Record
from tailscope.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
RECORDS = REPOSITORY / "results" / "bench"
DOCUMENT = REPOSITORY / "docs" / "performance.md"
NAMES = ("train", "augment", "concurrent", "swap", "stage2", "geometry", "scaling", "breakdown")
VERDICTS = "verdicts"
PAGES = {
    VERDICTS: "verdicts.md",
    "rebalance": "howto-export.md",
    "strangers": "get-started.md",
    "sweep": "howto-cluster.md",
}
"""What runs only where it is asked for, by itself: each has a result, results/NAME.json, and a page of its own."""
SCALE = "scale"
ASKED_FOR = {"images": "imagenet.md", "hours": "imagenet.md", SCALE: "scale.md", "classes": "scale.md"}
"""Timings that run only where they are asked for, since they take long or much disk, and the page that shows them."""


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen benchmarks, or fill the document's tables."""
    asked = _parse(arguments)
    if asked.action == "table":
        return fill_document(check=asked.check)
    unknown = [name for name in asked.only if name not in (*NAMES, *ASKED_FOR, *PAGES)]
    alone = [name for name in asked.only if name in PAGES]
    if unknown or (alone and len(asked.only) > 1):
        known = f"known are {', '.join((*NAMES, *ASKED_FOR))}, and by itself {' or '.join(PAGES)}"
        print(f"error: --only {','.join(unknown or asked.only)}: {known}", file=sys.stderr)
        return 2
    if alone:
        return examine_verdicts(asked) if alone == [VERDICTS] else examine(alone[0], asked)
    cache = str(asked.cache) if asked.cache else None
    options = Options("quick" if asked.quick else "full", find_images(asked.data_root), asked.device, cache)
    folder = asked.out or (REPOSITORY / "out" / "bench-quick" if asked.quick else RECORDS)
    with tempfile.TemporaryDirectory() as kept:
        # Every run compiles and chooses engines anew, so that warm-ups are comparable.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["XDG_CACHE_HOME"] = kept
        hardware = record.hardware(options)
        for name in asked.only or NAMES:
            run(name, options, folder, hardware)
    if folder == RECORDS:
        fill_document(check=False)
    return 0


def examine_verdicts(asked: argparse.Namespace) -> int:
    """Run the verdict's own test; stopped, the same command goes on."""
    from benchmarks.verdicts.run import run as examine  # here because it imports PyTorch
    from benchmarks.verdicts.sources import Place

    data = asked.data_root or Path(os.environ.get("TAILSCOPE_DATA") or user_cache() / "data")
    place = Place(data if data.is_dir() else None, asked.cache or user_cache() / VERDICTS, asked.store)
    folder = asked.out or (REPOSITORY / "out" / "bench-quick" if asked.quick else RECORDS.parent)
    try:
        code = examine(Options("quick" if asked.quick else "full"), place, folder, asked.processes, asked.on)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if folder == RECORDS.parent:
        fill_document(check=False)
    return code


def examine(name: str, asked: argparse.Namespace) -> int:
    """Run one of the others that have a page of their own."""
    options, started, load = Options("quick" if asked.quick else "full"), time.monotonic(), os.getloadavg()[0]
    content: dict[str, Any]
    if name == "rebalance":
        from benchmarks import rebalance  # here because it imports PyTorch

        data = asked.data_root or Path(os.environ.get("TAILSCOPE_DATA") or user_cache() / "data")
        if asked.store is None:
            print("error: --only rebalance: give --store, the folder of trained backbones", file=sys.stderr)
            return 2
        content = {"cases": rebalance.run(asked.store, data, asked.cache or user_cache() / name)}
    elif name == "sweep":
        from benchmarks import sweep

        content = sweep.run(options)
    else:
        from benchmarks import strangers

        content = strangers.run()
    document = record.document(name, options, load, time.monotonic() - started, **content)
    folder = asked.out or RECORDS.parent
    print(f"written: {record.write(folder, document)}", flush=True)
    if folder == RECORDS.parent:
        fill_document(check=False)
    return 0


def user_cache() -> Path:
    """Return the user's folder of what may be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tailscope"


def run(name: str, options: Options, folder: Path, hardware: dict[str, Any]) -> Path:
    """Run one benchmark, print its table, and write its record."""
    print(f"== {name} ({options.size})", flush=True)
    started, load = time.monotonic(), os.getloadavg()[0]
    found = benchmark(name)(options)
    content = found.to_json(hardware, load, time.monotonic() - started)
    path = record.write(folder, content)
    print(record.table(content), f"\nwritten: {path}\n", flush=True)
    return path


def benchmark(name: str) -> Callable[[Options], Record]:
    """Return the function that measures what is asked for."""
    module = {"augment": "train", "concurrent": "train", "breakdown": "scaling", "hours": "images"}.get(name, name)
    function = "run" if module == name else name
    found: Callable[[Options], Record] = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    return found


def fill_document(*, check: bool) -> int:
    """Fill the tables of docs/performance.md and of `PAGES`; with `check`, only say whether they are up to date."""
    records = record.read(RECORDS)
    tables = {name: record.table(found) for name, found in records.items()}
    if SCALE in records:
        from benchmarks import scale_page  # here because it imports PyTorch

        tables |= scale_page.tables(records[SCALE])
    for name in PAGES:
        stored = RECORDS.parent / f"{name}.json"
        if stored.is_file():
            module = importlib.import_module(f"benchmarks.{name}{'.summary' if name == VERDICTS else ''}")
            tables[name] = module.table(json.loads(stored.read_text(encoding="utf-8")))
    old = 0
    for page in (DOCUMENT, *(DOCUMENT.with_name(name) for name in {*ASKED_FOR.values(), *PAGES.values()})):
        text = page.read_text(encoding="utf-8")
        filled = record.render(text, tables)
        old += text != filled
        if check:
            print(f"docs/{page.name} is " + ("up to date" if text == filled else "out of date"))
        else:
            page.write_text(filled, encoding="utf-8")
    return int(check and old > 0)


def find_images(data_root: Path | None) -> str | None:
    """Return the path of cifar10.npz, or None: then the images are random."""
    root = data_root or Path(os.environ.get("TAILSCOPE_DATA") or user_cache() / "data")
    path = root / "cifar10.npz"
    if data_root and not path.is_file():
        raise SystemExit(f"error: --data-root {data_root}: holds no cifar10.npz")
    return str(path) if path.is_file() else None


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("action", nargs="?", choices=("run", "table"), default="run", help="table: fill the document")
    parser.add_argument("--quick", action="store_true", help="minutes instead of the better part of an hour")
    parser.add_argument(
        "--only",
        default=(),
        type=lambda text: text.split(","),
        help=f"some of {','.join((*NAMES, *ASKED_FOR))}; or {' or '.join(PAGES)}",
    )
    parser.add_argument("--data-root", type=Path, help="folder with cifar10.npz [default: $TAILSCOPE_DATA]")
    parser.add_argument("--cache", type=Path, help=f"of {VERDICTS} and rebalance: what is done; of images: the tree")
    parser.add_argument("--store", type=Path, help=f"of {VERDICTS} and rebalance: a store with backbones of CIFAR")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help=f"of {VERDICTS}")
    parser.add_argument("--on", metavar="ray[://HOST:PORT]", help=f"of {VERDICTS}: a Ray cluster instead of processes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="folder of the records")
    parser.add_argument("--check", action="store_true", help="with table: fail where the document is out of date")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
