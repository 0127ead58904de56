"""One flipped bit, or a file that is cut short: never another result without a word."""

import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from faults.conftest import EXPERIMENT, extraction
from faults.results import contents

FLIPS, CUTS = 120, 20
"""Of every stored kind, in a full round."""


def damage(path: Path, dice: random.Random, cut: bool) -> None:
    """Flip one bit of a file, or cut it somewhere."""
    data = bytearray(path.read_bytes())
    if cut:
        data = data[: dice.randrange(len(data))]
    else:
        place = dice.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
    path.unlink()  # a copy of its own, where files are linked
    path.write_bytes(data)


def same(first, second) -> bool:
    """Whether two artifacts are the same, bit by bit."""
    return (
        first.meta == second.meta
        and first.tensors.keys() == second.tensors.keys()
        and all(torch.equal(t, second.tensors[name]) for name, t in first.tensors.items())
    )


def flip_entries(store: Path, kind: str, trials: int, cuts: int, seed: int) -> dict[str, int]:
    """Damage a file of an entry, read the entry, and mend it; count what happened."""
    from tailscope.errors import UserError
    from tailscope.store import Store

    dice, opened, found = random.Random(seed), Store(store), {"named": 0, "made again": 0, "harmless": 0, "silent": 0}
    for trial in range(trials + cuts):
        key = dice.choice(opened.keys(kind))
        entry = store / kind / key
        whole = opened.read(kind, key)
        kept = store.parent / "kept"
        shutil.copytree(entry, kept)
        path = dice.choice(sorted(p for p in entry.iterdir() if p.stat().st_size))
        damage(path, dice, trial >= trials)
        try:
            read, there = opened.get_or_make(kind, key, lambda _, whole=whole: (whole.tensors, whole.meta))
            outcome = "silent" if not same(read, whole) else "harmless" if there else "made again"
        except UserError as error:
            outcome = "named" if str(path.parent) in str(error) else "silent"
        found[outcome] += 1
        shutil.rmtree(entry)
        kept.rename(entry)
    return found


def flip_files(path: Path, load: Callable[[Path], object], trials: int, cuts: int, seed: int) -> dict[str, int]:
    """Damage a file and load it; count whether it is named, or read as it was."""
    from tailscope.errors import UserError

    dice, found = random.Random(seed), {"named": 0, "harmless": 0, "silent": 0}
    whole, expected = path.read_bytes(), load(path)
    for trial in range(trials + cuts):
        damage(path, dice, trial >= trials)
        try:
            outcome = "harmless" if load(path) == expected else "silent"
        except UserError as error:
            outcome = "named" if str(path) in str(error) else "silent"
        found[outcome] += 1
        path.write_bytes(whole)
    return found


def count(ledger, found: dict[str, int], flips: int, cuts: int) -> None:
    ledger.add("flipped bits", flips)
    ledger.add("truncations", cuts)
    ledger.add("silent damages", found["silent"])
    assert found["silent"] == 0, found


@pytest.fixture(scope="session")
def store(trained: Path, forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with entries of every kind that images in memory need."""
    folder = tmp_path_factory.mktemp("flipped")
    shutil.copytree(trained / "store", folder / "store")
    shifted = forks.run("swap", *EXPERIMENT, "--bn-mode", "shifted", "--out", folder, "--store", folder / "store")
    assert shifted.code == 0, shifted.err
    return folder / "store"


@pytest.mark.parametrize("kind", ["stage1", "stage2", "views", "features", "shifted"])
def test_damaged_entries_are_noticed(kind, store, forks, amount, dice, ledger):
    flips, cuts = math.ceil(amount * FLIPS), math.ceil(amount * CUTS)
    count(ledger, forks.call(flip_entries, store, kind, flips, cuts, dice.randrange(10**6)), flips, cuts)


def checkpoint_content(path: Path) -> object:
    from tailscope.store.files import load_checkpoint

    read = load_checkpoint(path)
    return read.meta, {name: t.numpy().tobytes() for name, t in read.tensors.items()}


def table_content(path: Path) -> object:
    from tailscope.tables.table import FeatureTable

    table = FeatureTable.load(path)
    return (
        table.features.numpy().tobytes(),
        table.labels.numpy().tobytes(),
        table.class_names,
        None if table.ids is None else table.ids.tobytes(),
        table.provenance,
    )


def write_checkpoint(path: Path) -> bool:
    from tailscope.store.files import save_tensors

    tensors = {"model.weight": torch.randn(30, 20), "momentum.weight": torch.randn(30, 20)}
    save_tensors(path, tensors, {"epochs": 2, "losses": [2.5, 1.25], "seconds": 3.0})
    return True


def test_damaged_checkpoints_are_noticed(forks, amount, dice, ledger, tmp_path: Path):
    flips, cuts = math.ceil(amount * FLIPS), math.ceil(amount * CUTS)
    path = tmp_path / "checkpoint.safetensors"
    forks.call(write_checkpoint, path)
    found = forks.call(flip_files, path, checkpoint_content, flips, cuts, dice.randrange(10**6))
    count(ledger, found, flips, cuts)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "parquet"])
def test_damaged_feature_files_are_noticed(suffix, trained, forks, amount, dice, ledger, tmp_path: Path):
    path = tmp_path / f"features.{suffix}"
    ended = forks.run(*extraction(trained), "--split", "test", "--out", path)
    assert ended.code == 0, ended.err
    flips, cuts = math.ceil(amount * FLIPS), math.ceil(amount * CUTS)
    found = forks.call(flip_files, path, table_content, flips, cuts, dice.randrange(10**6))
    count(ledger, found, flips, cuts)


def test_a_damaged_store_changes_no_result(trained, forks, commands, amount, dice, ledger, tmp_path: Path):
    expected = contents(trained, ("swap.json",))
    for trial in range(math.ceil(amount * 24)):
        folder = tmp_path / str(trial)
        shutil.copytree(trained / "store", folder / "store")
        files = sorted(p for p in (folder / "store").glob("*/*/*") if p.parent.parent.name not in ("scratch", "locks"))
        path = dice.choice([p for p in files if p.stat().st_size])
        damage(path, dice, cut=dice.random() < 0.2)
        ledger.add("runs on a damaged store")
        ended = forks.run(*commands["swap"].command(folder / "out", folder / "store"))
        if ended.code == 0:
            assert contents(folder / "out", ("swap.json",)) == expected, f"silent: {path}"
        else:
            assert (ended.code, str(path.parent) in ended.err) == (2, True), ended.err
        shutil.rmtree(folder)
