"""A rehearsal of `reproduce everything` on a machine that is lent for minutes: data that come one after the other, a
stop in the middle, a second run that goes on, the bundle, and completion at home with geometry and figures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import tomllib
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import REPOSITORY
from tailscope.store import Store, add

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")
SECONDS = 300  # a busy machine is no failure
WAITING = """import time
from tailscope.reproduce import queue
queue.EXPERIMENTS = {**queue.EXPERIMENTS, "geometry": lambda *_: time.sleep(600)}
"""  # lest geometry is done before the signal has come


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
    (folder / "bare" / "sitecustomize.py").write_text(WAITING)
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


# -- the scripts around it -----------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A repository with the scripts alone, and packed data whose unpack.py puts arrays together."""
    repository, data = tmp_path / "repository", tmp_path / "data"
    repository.mkdir()
    (tmp_path / "wheels").mkdir()
    subprocess.run(["git", "init", "-q", repository], check=True)
    shutil.copytree(REPOSITORY / "scripts" / "gpu", repository / "scripts" / "gpu")
    for name in ("constraints.txt", ".gitignore"):
        shutil.copy(REPOSITORY / name, repository)
    (repository / "src").symlink_to(REPOSITORY / "src")
    for name, sizes in (("cifar10", (3, 2, 2)), ("cifar100", (4, 1))):
        (data / name).mkdir(parents=True)
        for k, size in enumerate(sizes):
            (data / name / f"{k}.webp").write_bytes(bytes(size * 100_000))
    (data / "unpack.py").write_text(
        "import sys, numpy as np\nfrom pathlib import Path\nto, name = Path(sys.argv[1]), sys.argv[2]\n"
        "files = sorted((Path(__file__).parent / name).iterdir())\nto.mkdir(exist_ok=True)\n"
        "np.savez(to / f'{name}.npz', **{f.stem: np.load(f) for f in files})\n"
    )
    return repository, data


PACKED = ("cifar10", "cifar100")


def script(repository, name, *arguments, **environment):
    return subprocess.run(
        ["bash", name, *map(str, arguments)], cwd=repository, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip


def parts(repository):
    """Return the files of each part, and its bytes with everything that travels beside it."""
    folder = repository / ".gpu"
    files = {part.name: sorted(f for f in part.rglob("*") if f.is_file()) for part in sorted(folder.glob("part-*"))}
    beside = [f for f in folder.rglob("*") if f.is_file() and not f.relative_to(folder).parts[0].startswith("part-")]
    fixed = sum(f.stat().st_size for f in beside)
    names = {part: [f.relative_to(folder / part).as_posix() for f in found] for part, found in files.items()}
    return names, [fixed + sum(f.stat().st_size for f in found) for found in files.values()]


def test_data_are_cut_into_parts_that_can_be_carried(checkout, tmp_path):
    repository, data = checkout
    wheels = {"WHEELS": str(tmp_path / "wheels"), "LIMIT": "1"}
    ran = script(repository, "scripts/gpu/prepare.sh", data, **wheels)
    assert ran.returncode == 0, ran.stderr
    names, sizes = parts(repository)
    everything = [f"packed/cifar10/{k}.webp" for k in range(3)] + [f"packed/cifar100/{k}.webp" for k in range(2)]
    assert [name for found in names.values() for name in found] == everything
    assert len(names) > 1
    last = {name: max(p for p, f in names.items() if any(f"/{name}/" in file for file in f)) for name in PACKED}
    assert ran.stdout.splitlines()[:2] == [f"{n} is whole with {part.replace('-', ' ')}" for n, part in last.items()]
    assert all(size <= 1 << 20 for size in sizes)
    assert (repository / ".gpu" / "bin" / "cifar10.list").read_text().split() == ["0.webp", "1.webp", "2.webp"]
    assert (
        subprocess.run(["git", "-C", repository, "status", "--short"], capture_output=True, text=True).stdout.count(
            "gpu"
        )
        <= 1
    )
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "stages.tar").write_bytes(bytes(100_000))
    assert script(repository, "scripts/gpu/prepare.sh", data, earlier, **wheels).returncode == 0
    names, _ = parts(repository)
    assert names["part-1"] == ["stages/stages.tar"]
    assert [name for found in list(names.values())[1:] for name in found] == everything
    (data / "cifar10" / "0.webp").write_bytes(bytes(2_000_000))
    ran = script(repository, "scripts/gpu/prepare.sh", data, **wheels)
    assert (ran.returncode, "0.webp is too large: 2004 kB" in ran.stderr) == (1, True)


THERE = {
    "annotated-doc", "filelock", "jinja2", "numpy", "rich", "safetensors", "scikit-learn", "scipy", "shellingham",
    "torch", "torchvision",
}  # fmt: skip
"""Packages of a machine for PyTorch that are new enough for us, whatever it is."""
DRAWS = {"altair", "vl-convert-python"}


def test_what_the_machine_lacks_is_brought_with_what_that_needs(checkout):
    """Wheels are brought without what they depend on: each of that is brought too, or is there."""
    repository, data = checkout
    script(repository, "scripts/gpu/prepare.sh", data, WHEELS=str(data))
    lines = (repository / ".gpu" / "wheels" / "needed.txt").read_text().split()
    brought = {canonicalize_name(line.split("==")[0]) for line in lines}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = [Requirement(line) for line in [*project, *(need for name in brought for need in requires(name) or ())]]
    here = {canonicalize_name(one.name) for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})}
    assert here - THERE - DRAWS == brought


@pytest.mark.parametrize(
    ("codes", "tried", "looked"), [("0", 1, "1"), ("1 0", 2, None), ("137 1 139 1", 4, "1"), ("1 0", 2, "0")]
)
def test_what_dies_is_started_again_more_carefully(checkout, monkeypatch, codes, tried, looked):
    monkeypatch.delenv("TAILSCOPE_GRAPHS", raising=False)
    repository, data = checkout
    script(repository, "scripts/gpu/prepare.sh", data, WHEELS=str(data))
    python = repository / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" >> called; echo "${TAILSCOPE_GRAPHS:-1}" >> graphs\n'
        "echo '1 min: 0 of 2 backbones trained, 5 images/s; a 3%'\n"
        f"set -- {codes}; shift $(($(wc -l < called) - 1)); exit $1\n"
    )
    python.chmod(0o755)
    (repository / "out" / "gpu").mkdir(parents=True)
    (repository / "out" / "gpu" / "options").write_text("--jobs 8 --engine compiled\n")
    if looked:
        (repository / "out" / "gpu" / "graphs").write_text(f"{looked}\n")
    ran = script(repository, ".gpu/bin/run.sh", "attempts", PYTHON=str(python), OPTIONS="--seeds 1", DEVICE="cpu")
    called = (repository / "called").read_text().splitlines()
    assert len(called) == tried, ran.stderr
    assert all(
        line.startswith("-m tailscope reproduce everything --data-root out/gpu/npz --wait-for-data") for line in called
    )
    careful = ["", " --engine eager", " --engine eager --jobs 2", " --engine eager --jobs 2"]
    ends = [f"--bundle out/gpu/bundle --jobs 8 --engine compiled --seeds 1{options}" for options in careful[:tried]]
    assert all(line.endswith(end) for line, end in zip(called, ends, strict=True))
    captures = ["0"] * 4 if looked == "0" else ["1", "1", "0", "0"]  # an eager step is captured, too
    assert (repository / "graphs").read_text().split() == captures[:tried]


@pytest.mark.parametrize(
    ("lines", "hangs"),
    [
        (["0 images/s; a 3%"], False),  # the first minute compiles
        (["0 images/s; a 3%", "0 images/s; a 3%"], True),
        (["900 images/s; a 3%", "0 images/s; a 3%"], False),
        (["0 images/s; none in training", "0 images/s; none in training"], False),  # classifiers are fitted
        (["10 images/s; a 3%", "1,000 images/s; a 3%"], False),
    ],
)
def test_nothing_moves_where_two_minutes_brought_no_image(checkout, lines, hangs):
    log = checkout[0] / "log"
    log.write_text("".join(f"2 min: 0 of 2 backbones trained, {line}\n[2 min] views\n" for line in lines))
    text = (REPOSITORY / "scripts" / "gpu" / "run.sh").read_text()
    function = text[text.index("stuck() {") :].split("\n}\n")[0] + "\n}\n"
    assert subprocess.run(["bash", "-c", f'{function}stuck "$1"', "-", log]).returncode == (0 if hangs else 1)


@pytest.mark.parametrize("ends", [True, False])
def test_where_a_capture_fails_the_process_ends_by_itself_and_a_more_careful_one_goes_on(checkout, ends):
    """In PyTorch 2.11 those after it may fail, too; the words are those that a training warns with."""
    repository, data = checkout
    script(repository, "scripts/gpu/prepare.sh", data, WHEELS=str(data))
    (repository / "warn.py").write_text(
        "import torch\nfrom tailscope.training.step import GraphedStep\nclass Refuses:\n"
        "    def warm_up(self, step, *given): return step(*given)\n"
        "    def record(self, work): raise RuntimeError('captures_underway.empty() INTERNAL ASSERT')\n"
        "step = GraphedStep(lambda x: x, Refuses())\nfor _ in range(4): step(torch.ones(1))\n"
    )
    python = repository / "python"
    ending = "echo TERM >> ended; exit 143" if ends else "echo TERM >> ended"
    python.write_text(
        f"#!/bin/bash\ntrap '{ending}' TERM\necho x >> called; [ $(wc -l < called) = 3 ] && exit 0\n"
        f"{sys.executable} warn.py\nwhile :; do sleep 0.1; done\n"
    )
    python.chmod(0o755)
    ran = script(repository, ".gpu/bin/run.sh", "attempts", PYTHON=str(python), DEVICE="cpu", ENDING="2")
    assert (repository / "called").read_text().split() == ["x"] * 3, ran.stderr
    assert (repository / "ended").read_text().split() == ["TERM"] * 2  # one signal each: a second ends at once
    log = (repository / "out" / "gpu" / "reproduce.log").read_text()
    assert log.count("a capture failed") == 2
    assert log.count(f"== ended with {143 if ends else 137}") == 2


@pytest.mark.slow
def test_the_scripts_look_begin_and_finish(checkout, tmp_path):
    repository, data = checkout
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        random_images(tmp_path, name, classes)
        for file in (data / name).iterdir():
            file.unlink()
        with np.load(tmp_path / f"{name}.npz") as arrays:
            for field in arrays.files:
                np.save(data / name / f"{field}.npy", arrays[field])
    given = {
        "DEVICE": "cpu", "PYTHON": sys.executable, "SMOKE_OPTIONS": "--miniature --seconds 0.5", "COMPILED": "no",
        "OPTIONS": "--recipe miniature --seeds 1", "OUT": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    script(repository, "scripts/gpu/prepare.sh", data, WHEELS=str(tmp_path / "wheels"), LIMIT="33")
    second = (repository / ".gpu" / "part-2").rename(tmp_path / "part-2")
    run = ".gpu/bin/run.sh"
    looked = script(repository, run, "look", **given)
    assert "plain: trains as eager steps do: True" in looked.stdout, looked.stderr
    assert "chosen: --jobs" in looked.stdout
    script(repository, run, "begin", **given)
    shutil.rmtree(repository / ".gpu" / "part-1")
    second.rename(repository / ".gpu" / "part-2")
    finished = script(repository, run, "finish", 60, **given)
    brought = {file.name for file in (tmp_path / "home").iterdir()}
    assert {"results.tar.gz", "stages.tar", "logs.tar.gz"} <= brought, finished.stdout + finished.stderr
    assert len(brought) <= 8
    assert "bundle: results, " in finished.stdout
