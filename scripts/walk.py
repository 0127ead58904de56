"""Count the files that `swap` and `diagnose` on digits pass through: `python scripts/walk.py`.

A file is passed when one of its functions is called, not when it is imported. A change of file is a call from one file
to another.
"""

import pkgutil
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import FrameType

import numpy as np

import tailscope

PACKAGE = Path(tailscope.__file__).parent
COUNTS = {"train": [60, 20, 8], "unseen": [30, 30, 30]}


@dataclass
class Walk:
    """What was passed: files relative to the package, and how often a call went from one to another."""

    files: set[str] = field(default_factory=set)
    changes: int = 0

    def see(self, frame: FrameType, event: str, _: object) -> None:
        """Take note of a call, as `sys.setprofile` wants it."""
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(PACKAGE)):
            self.files.add(Path(file).relative_to(PACKAGE).as_posix())
            self.changes += frame.f_back is not None and frame.f_back.f_code.co_filename != file


def walk(*arguments: object) -> Walk:
    """Run the command line, and return what it passed.

    Raises:
        RuntimeError: it did not end well.
    """
    for module in pkgutil.walk_packages([str(PACKAGE)], "tailscope."):
        if not module.name.endswith("__main__"):
            import_module(module.name)  # what modules do when they are imported is no part of the walk
    from tailscope import cli

    passed, before = Walk(), sys.argv
    sys.argv = ["tailscope", *map(str, arguments)]
    threading.setprofile(passed.see)
    sys.setprofile(passed.see)
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"tailscope {' '.join(map(str, arguments))} ended with {end.code}") from None
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.argv = before
    return passed


def walks(folder: Path) -> dict[str, Walk]:
    """Return the walk of `swap` and of `diagnose`, both to their report."""
    swap = ("swap", "--data", "digits", "--recipe", "miniature", "--seeds", 1, "--out", folder / "swap")
    sides = []
    for seed, (name, counts) in enumerate(COUNTS.items()):
        labels = np.repeat(np.arange(len(counts)), counts)
        noise = np.random.default_rng(seed).normal(size=(len(labels), 8))
        features = (3 * np.eye(len(counts), 8)[labels] + noise).astype(np.float32)
        np.savez(folder / f"{name}.npz", features=features, labels=labels)
        sides += [f"--{name}", folder / f"{name}.npz"]
    return {
        "swap": walk(*swap),
        "diagnose": walk("diagnose", *sides, "--permutations", 19, "--out", folder / "diagnosed"),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        for verb, passed in walks(Path(made)).items():
            print(f"{verb}: {len(passed.files)} files, {passed.changes:,} changes of file", file=sys.stderr)
            print("\n".join(f"  {file}" for file in sorted(passed.files)), file=sys.stderr)
