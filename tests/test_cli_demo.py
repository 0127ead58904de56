"""`tailscope demo` from an empty folder, as a newcomer runs it; every test reads the same run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiment_setups import timeless
from tailscope import api
from tailscope.data.subsets import resolve
from tailscope.training.recipes import RECIPES

DEMO = [sys.executable, "-c", "from tailscope.cli import main; main()", "demo"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("demo") / "out"
    environment = {name: value for name, value in os.environ.items() if name != "TAILSCOPE_STORE"}
    ended = subprocess.run([*DEMO, "--seeds", "3", "--out", str(out)], env=environment, capture_output=True, text=True)
    told = [line for line in ended.stderr.splitlines() if not line.startswith("[")]  # a line of progress a minute
    assert (ended.returncode, told) == (0, [])
    results = {verb: json.loads((out / f"{verb}.json").read_text()) for verb in ("swap", "ladder", "geometry")}
    return SimpleNamespace(out=out, stdout=ended.stdout, **results)


def test_the_representation_costs_accuracy_and_so_does_the_classifier(demo):
    mean = {name: cell["mean"] for name, cell in demo.swap["cells"].items()}
    assert len(demo.swap["seeds"]) >= 3
    assert demo.swap["counts"] == resolve("exp:100", api.load("digits").train.counts())
    assert mean["lt->lt"] < mean["lt->true"]
    assert mean["true->lt"] < mean["true->true"]
    assert mean["lt->lt"] < mean["true->lt"]
    assert mean["true->true"] > 0.95
    low, high = demo.swap["attribution"]["gap_ci95"]
    assert 0 < low < demo.swap["attribution"]["gap"] < high


def test_the_tail_suffers_most(demo):
    for cell in ("lt->lt", "lt->true"):
        groups = demo.swap["cells"][cell]["groups"]
        assert groups["tail"] < groups["head"]


def test_retraining_and_augmentation_climb(demo):
    rungs = demo.ladder["augmentations"]["none"]
    assert rungs["stage1"]["mean"] < rungs["bound"]["mean"]
    assert rungs["stage2"]["mean"] < rungs["bound"]["mean"]
    assert all(len(cell["accuracy"]) == 3 for rungs in demo.ladder["augmentations"].values() for cell in rungs.values())


def test_the_tail_memorises_under_the_lt_encoder(demo):
    """Seen samples of the tail lie nearer to their centre than test samples do, and more so than in the head."""
    groups = demo.geometry["encoders"]["lt"]["mean"]["calibrated"]["groups"]
    assert groups["tail"]["spread_gap_deg"] > max(0, groups["head"]["spread_gap_deg"])


def test_every_promised_file_is_there(demo):
    names = {path.name for path in demo.out.iterdir()}
    assert {"subset.json", "swap.json", "ladder.json", "geometry.json", "report.html", "store"} <= names
    suffixes = {path.suffix for path in demo.out.rglob("*")}
    assert {".svg", ".png", ".pdf", ".csv", ".md", ".tex"} <= suffixes
    assert (demo.out / "report.html").stat().st_size < 3_000_000
    assert len(list(demo.out.glob("store/stage1/*/DONE"))) == 5 * 3
    assert list(demo.out.glob("store/scratch/*")) == []
    assert list(demo.out.rglob("*.partial")) == []
    assert all(path.suffix in ("", ".safetensors", ".json", ".lock") for path in (demo.out / "store").rglob("*"))


def test_the_story_fits_a_screen_and_names_the_report(demo):
    lines = demo.stdout.splitlines()
    assert lines[-1] == f"report: {demo.out / 'report.html'}"
    assert 5 <= len(lines) <= 24
    assert "digits" in demo.stdout


def test_the_subset_is_the_first_seeds(demo):
    subset = json.loads((demo.out / "subset.json").read_text())
    assert subset["sha256"] == demo.swap["subset_sha256"][0]
    assert subset["counts"] == demo.swap["counts"]


def test_the_api_finds_the_same_in_the_store_without_training(demo):
    swap = api.swap(api.load("digits"), recipe="demo", seeds=3, store=demo.out / "store")
    assert timeless(swap) == timeless(demo.swap)
    assert swap["provenance"] == demo.swap["provenance"]
    assert swap["recipe"]["card"] == RECIPES["demo"].card


def test_no_machine_path_is_in_a_result(demo):
    for verb in ("subset", "swap", "ladder", "geometry"):
        result = json.loads((demo.out / f"{verb}.json").read_text())
        result.pop("command", None)  # as typed
        assert str(Path.home()) not in json.dumps(result)
        assert str(demo.out) not in json.dumps(result)
