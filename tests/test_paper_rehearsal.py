"""A rehearsal of `reproduce everything` on a machine that is lent for minutes: data that come one after the other, a
stop in the middle, a second run that goes on, the bundle, and completion at home with geometry and figures."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from conftest import REPOSITORY
from tailscope.store import Store, add

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")
SECONDS = 300  # a busy machine is no failure


def random_images(folder: Path, name: str, classes: int) -> None:
    """Write NAME.npz with 100 random training images a class; it appears whole."""
    rng = np.random.default_rng(classes)
    fields = {"class_names": np.array([f"class {k}" for k in range(classes)])}
    for split, each in (("train", 100), ("test", 3)):
        fields[f"{split}_images"] = rng.integers(0, 256, (classes * each, 32, 32, 3), dtype=np.uint8)
        fields[f"{split}_labels"] = np.repeat(np.arange(classes), each)
    np.savez(folder / "partial.npz", **fields)
    (folder / "partial.npz").replace(folder / f"{name}.npz")


class Run:
    """A process of the command line, whose lines a test may wait for."""

    def __init__(self, folder: Path, *options: str, modules: Path | None = None) -> None:
        paths = [*([str(modules)] if modules else []), str(REPOSITORY / "src")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [
            sys.executable,
            "-m",
            "tailscope",
            "reproduce",
            "everything",
            "--recipe",
            "miniature",
            "--seeds",
            "1",
        ]
        self.process = subprocess.Popen(
            [*command, *options],
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.lines: list[str] = []
        self._watch = threading.Timer(SECONDS, self.process.kill)
        self._watch.start()

    def until(self, *texts: str) -> None:
        """Read until each of these was in a line."""
        left = set(texts)
        while left:
            line = self.process.stdout.readline()
            assert line, f"ended before {left}:\n" + "".join(self.lines)
            self.lines.append(line)
            left = {text for text in left if text not in line}

    def end(self, *, stop: bool = False) -> int:
        """Wait for the end, after SIGTERM if it is to stop, and return the exit code."""
        if stop:
            self.process.send_signal(signal.SIGTERM)
        self.lines += self.process.stdout.readlines()
        self.process.stdout.close()
        self._watch.cancel()
        return self.process.wait()


def stored(folder: Path) -> dict[str, float]:
    return {key: Store(folder).tensors_file("stage1", key).stat().st_mtime for key in Store(folder).keys("stage1")}


@pytest.fixture(scope="module")
def away(tmp_path_factory):
    """Two runs on the lent machine, both stopped: the first in the middle, the second before geometry."""
    folder = tmp_path_factory.mktemp("away")
    (folder / "data").mkdir()
    (folder / "bare").mkdir()
    for library in ("altair", "vl_convert"):  # which such a machine lacks
        text = f"raise ModuleNotFoundError('No module named {library}', name={library!r})\n"
        (folder / "bare" / f"{library}.py").write_text(text)
    options = ("--data-root", "data", "--wait-for-data", "--jobs", "2", "--out", "out", "--bundle", "bundle")
    random_images(folder / "data", "cifar10", 10)
    first = Run(folder, *options, modules=folder / "bare")
    first.until("waiting for the data of cifar100-lt", "written: piece 1 of 5")
    random_images(folder / "data", "cifar100", 100)
    first.until("the data of cifar100-lt have come")
    codes = [first.end(stop=True)]
    kept = stored(folder / "out-store")
    document = json.loads((folder / "out" / "reproduce.json").read_text())
    second = Run(folder, *options, modules=folder / "bare")
    second.until("ladder of cifar10-lt, seed 0", "swap of cifar100-lt, seed 0")
    codes.append(second.end(stop=True))
    return folder, codes, kept, document, second


def test_what_was_stopped_goes_on_and_comes_home_in_a_bundle(away):
    folder, codes, kept, document, second = away
    assert codes == [128 + signal.SIGTERM] * 2
    assert document["finished"] is False
    assert document["failed"] == []
    assert document["pieces"][0] == {
        "dataset": "cifar10-lt", "experiment": "swap", "seeds": [0], "folder": "cifar10-miniature", "done": True,
    }  # fmt: skip
    assert len(kept) >= 2  # the two of the piece that was written
    assert "5 pieces, 1 done before" in second.lines[0]
    now = stored(folder / "out-store")
    assert {key: now[key] for key in kept} == kept  # not trained again
    files = sorted((folder / "bundle").iterdir())
    assert [file.name for file in files] == ["results.tar.gz", "stages.tar"]
    assert sum(file.stat().st_size for file in files) < 62 << 20
    with tarfile.open(files[0]) as results:
        names = results.getnames()
    wanted = ["reproduce.json", *(f"{name}-miniature/swap.json" for name in ("cifar10", "cifar100"))]
    assert {*wanted, "cifar10-miniature/ladder.json", "cifar10-miniature/tables/paper-table1.md"} <= set(names)
    assert not [name for name in names if name.endswith((".html", ".svg", ".safetensors"))]
    home = Store(folder / "home-store")
    add(home, files[1])
    assert set(home.keys("stage1")) == set(now)
    assert len(now) == 5 + 3
    assert home.keys("stage2") == Store(folder / "out-store").keys("stage2")


@pytest.mark.slow
def test_it_is_completed_at_home_with_geometry_and_figures(away, tmp_path):
    folder = away[0]
    with tarfile.open(folder / "bundle" / "results.tar.gz") as results:
        results.extractall(tmp_path / "out", filter="data")
    add(Store(tmp_path / "store"), folder / "bundle" / "stages.tar")
    before = stored(tmp_path / "store")
    run = Run(tmp_path, "--data-root", str(folder / "data"), "--out", "out", "--store", "store")
    assert run.end() == 0, "".join(run.lines)
    assert stored(tmp_path / "store") == before  # nothing was trained
    document = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    assert document["finished"]
    for name, wanted in (("cifar10", {"swap", "ladder", "geometry"}), ("cifar100", {"swap", "geometry"})):
        results = tmp_path / "out" / f"{name}-miniature"
        assert (results / "report.html").is_file()
        assert list((results / "figures").glob("*.svg"))
        assert {verb for verb in ("swap", "ladder", "geometry") if (results / f"{verb}.json").is_file()} == wanted
    away_cells = json.loads((folder / "out" / "cifar10-miniature" / "swap.json").read_text())["cells"]
    assert json.loads((tmp_path / "out" / "cifar10-miniature" / "swap.json").read_text())["cells"] == away_cells
