"""What all tests of faults share: how much of it, the runs to compare with, and the ledger of what was counted."""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

SMALL = 0.05
FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker("faults")


@pytest.fixture(scope="session")
def amount() -> float:
    """The share of all trials that is tried; 1 is the full round."""
    return float(os.environ.get("TAILSCOPE_FAULTS", SMALL))


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    """Chance, the same every time and another for every test."""
    return random.Random(f"{os.environ.get('TAILSCOPE_FAULTS_SEED', '0')} {request.node.name}")


class Ledger:
    """Counts what was tried and what came of it: sums, and maxima where `most` is used."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, name: str, number: int = 1) -> None:
        """Add to a count; a count that is never added to is not written, 0 is."""
        self.counts[name] += number

    def most(self, name: str, value: float) -> None:
        """Keep the largest value."""
        self.counts[name] = max(self.counts[name], value)


@pytest.fixture(scope="session")
def ledger() -> Iterator[Ledger]:
    """The session's counts, written where `TAILSCOPE_FAULTS_COUNTS` says."""
    found, started = Ledger(), time.monotonic()
    yield found
    path = os.environ.get("TAILSCOPE_FAULTS_COUNTS")
    if path:
        counts = {**dict(sorted(found.counts.items())), "seconds": round(time.monotonic() - started)}
        Path(path).write_text(json.dumps(counts, indent=1))


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory):
    """Start runs in forked processes."""
    from faults.forks import Forks  # imports all of tailscope, which a round without these tests need not

    return Forks(tmp_path_factory.mktemp("runs"))


@dataclass
class Verb:
    """A command that is interrupted: its arguments for an OUT and a STORE, and the files that it leaves in OUT."""

    name: str
    arguments: tuple[object, ...]
    files: tuple[str, ...]

    def command(self, out: Path, store: Path) -> list[object]:
        """Return the arguments; OUT is made, for `features` writes into a folder that is there."""
        out.mkdir(exist_ok=True)
        places = {"OUT": out, "STORE": store, "FILE": out / "features.npz"}
        return [places.get(a, a) if isinstance(a, str) else a for a in self.arguments]


EXPERIMENT = ("--data", "digits", "--recipe", "miniature", "--seeds", "1", "--profile", "exp:20", "--json")


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CIFAR-10 of random images."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    fields = {}
    for split, each in (("train", 100), ("test", 10)):
        fields[f"{split}_images"] = rng.integers(0, 256, (10 * each, 32, 32, 3), dtype=np.uint8)
        fields[f"{split}_labels"] = np.repeat(np.arange(10), each)
    np.savez(folder / "cifar10.npz", **fields)
    return folder


@pytest.fixture(scope="session")
def trained(forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with all that the experiments train, and its results beside it."""
    folder = tmp_path_factory.mktemp("trained")
    for verb in ("swap", "geometry"):
        ended = forks.run(verb, *EXPERIMENT, "--out", folder, "--store", folder / "store")
        assert ended.code == 0, ended.err
    return folder


@pytest.fixture(scope="session")
def features(forks, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with feature files of the training and the test images."""
    folder = tmp_path_factory.mktemp("features")
    for split in ("train", "test"):
        ended = forks.run(*extraction(trained), "--split", split, "--out", folder / f"{split}.npz")
        assert ended.code == 0, ended.err
    return folder


def extraction(trained: Path) -> list[object]:
    """Return the arguments that extract features with a backbone that was trained."""
    key = sorted((trained / "store" / "stage1").iterdir())[0].name
    return ["features", "--model", f"store:{key}", "--store", trained / "store", "--data", "digits", "--batch", 32]


@pytest.fixture(scope="session")
def commands(trained: Path, features: Path, cifar: Path) -> dict[str, Verb]:
    """The verbs that are killed."""
    experiments = {
        name: Verb(name, (name, *EXPERIMENT, *more, "--out", "OUT", "--store", "STORE"), (f"{name}.json",))
        for name, more in (("swap", ()), ("ladder", ()), ("geometry", ("--permutations", 99)))
    }
    reproduce = ("reproduce", "table1", "--data-root", cifar, "--recipe", "miniature", "--seeds", "1", "--json")
    files = ("--train", features / "train.npz", "--unseen", features / "test.npz", "--json")
    return {
        **experiments,
        "reproduce": Verb("reproduce", (*reproduce, "--out", "OUT", "--store", "STORE"), ("swap.json", "claims.json")),
        "features": Verb("features", (*extraction(trained), "--split", "train", "--out", "FILE"), ("features.npz",)),
        "diagnose": Verb("diagnose", ("diagnose", *files, "--permutations", 99, "--out", "OUT"), ("diagnosis.json",)),
    }
