"""A stranger's three ways from `pip install` to a result: the lines that the pages show, in a fresh environment."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from benchmarks import strangers
from benchmarks.strangers import PAGES, Way

MOST_LINES = 6


@pytest.mark.parametrize("name", PAGES)
def test_a_way_is_short_and_begins_with_an_installation(name):
    way = Way.of(name)
    assert len(way) <= MOST_LINES
    assert any(line.startswith("pip install -c constraints.txt -e ") for line in way.terminal)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A copy of the repository in which all ways were gone; prints what each took."""
    folder = tmp_path_factory.mktemp("stranger")
    strangers.walk_all(folder)
    shutil.rmtree(folder / ".venv")  # gigabytes, which pytest would keep
    return folder


@pytest.mark.slow
def test_the_demo_tells_its_story(home):
    assert "<html" in (home / "demo" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_folder_and_a_checkpoint_become_a_verdict_and_a_patched_checkpoint(home):
    timm = pytest.importorskip("timm")
    said = json.loads((home / "out" / "diagnosis.json").read_text(encoding="utf-8"))
    assert said["verdict"]["bottleneck"] in ("classifier", "representation", "undecided")
    assert said["counts"] == list(strangers.COUNTS.values())
    assert (home / "out" / "report.html").is_file()
    old, new = (torch.load(home / name, weights_only=True) for name in ("weights.pth", "out/weights-rebalanced.pth"))
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["fc.weight", "fc.bias"]
    with np.load(home / "out" / "rebalanced.npz") as advised:
        assert np.array_equal(new["fc.weight"], advised["weight"])
        assert np.array_equal(new["fc.bias"], advised["bias"])
    timm.create_model("resnet50", num_classes=len(strangers.COUNTS)).load_state_dict(new)


@pytest.mark.slow
def test_a_notebook_shows_the_verdict_and_a_chart(home):
    *_, last = json.loads((home / strangers.NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    shown = [output["data"] for output in last["outputs"] if output["output_type"] == "execute_result"]
    page = "".join(shown[0]["text/html"])
    assert re.search("<b>[^<]*(bottleneck|not decided)", page, re.IGNORECASE)
    assert "<svg" in page
    assert "<table" in page
