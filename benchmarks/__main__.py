"""Command line: `python -m benchmarks [--quick] [--only train,swap]`, or `python -m benchmarks table` for the document.

Full records go to results/bench and from there into docs/performance.md; quick ones to out/bench-quick.
"""

import argparse
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.record import Options, Record

REPOSITORY = Path(__file__).resolve().parents[1]
RECORDS = REPOSITORY / "results" / "bench"
DOCUMENT = REPOSITORY / "docs" / "performance.md"
NAMES = ("train", "augment", "concurrent", "swap", "stage2", "geometry", "scaling", "breakdown")


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen benchmarks, or fill the document's tables."""
    asked = _parse(arguments)
    if asked.action == "table":
        return fill_document(check=asked.check)
    unknown = [name for name in asked.only if name not in NAMES]
    if unknown:
        print(f"error: --only {unknown[0]}: known are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    options = Options("quick" if asked.quick else "full", find_images(asked.data_root), asked.device)
    folder = asked.out or (REPOSITORY / "out" / "bench-quick" if asked.quick else RECORDS)
    with tempfile.TemporaryDirectory() as cache:
        # Every run compiles and chooses engines anew, so that warm-ups are comparable.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["XDG_CACHE_HOME"] = cache
        hardware = record.hardware(options)
        for name in asked.only or NAMES:
            run(name, options, folder, hardware)
    if folder == RECORDS:
        fill_document(check=False)
    return 0


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
    module = {"augment": "train", "concurrent": "train", "breakdown": "scaling"}.get(name, name)
    function = "run" if module == name else name
    found: Callable[[Options], Record] = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    return found


def fill_document(*, check: bool) -> int:
    """Fill the tables of docs/performance.md; with `check`, only say whether they are up to date."""
    text = DOCUMENT.read_text()
    filled = record.render(text, record.read(RECORDS))
    if check:
        print("docs/performance.md is " + ("up to date" if text == filled else "out of date"))
        return int(text != filled)
    DOCUMENT.write_text(filled)
    return 0


def find_images(data_root: Path | None) -> str | None:
    """Return the path of cifar10.npz, or None: then the images are random."""
    root = data_root or Path(os.environ.get("TAILSCOPE_DATA") or Path.home() / ".cache" / "tailscope" / "data")
    path = root / "cifar10.npz"
    if data_root and not path.is_file():
        raise SystemExit(f"error: --data-root {data_root}: holds no cifar10.npz")
    return str(path) if path.is_file() else None


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("action", nargs="?", choices=("run", "table"), default="run", help="table: fill the document")
    parser.add_argument("--quick", action="store_true", help="minutes instead of the better part of an hour")
    parser.add_argument("--only", default=(), type=lambda text: text.split(","), help=f"some of {','.join(NAMES)}")
    parser.add_argument("--data-root", type=Path, help="folder with cifar10.npz [default: $TAILSCOPE_DATA]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="folder of the records")
    parser.add_argument("--check", action="store_true", help="with table: fail where the document is out of date")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
