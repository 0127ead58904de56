"""The most that a diagnosis may hold: what is refused, and that it is kept."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scale
from diagnosis_cases import separable
from tailscope import diagnose
from tailscope.diagnosis import memory
from tailscope.effort import parse_size
from tailscope.errors import UserError
from tailscope.tables import mapped


def test_too_little_memory_is_said_before_the_work_and_with_what_is_needed():
    train, unseen = separable()
    with pytest.raises(
        UserError, match=r"--memory 20 MiB: a diagnosis of these features needs about .* for .*give"
    ) as no:
        diagnose(train, unseen, memory="20MiB")
    needed = re.search(r"needs about ([\d.]+ [GM]iB)", str(no.value))
    assert parse_size(needed[1], "--memory") > 100 * 2**20


def test_rows_that_are_held_are_a_small_share_of_the_limit(monkeypatch):
    seen = []
    monkeypatch.setattr("tailscope.diagnosis.diagnose.without_far_rows", lambda _: seen.append(mapped.HELD) or 1 / 0)
    before = mapped.HELD
    with pytest.raises(ZeroDivisionError):
        diagnose(*separable(), memory="3GiB")
    assert seen == [3 * 2**30 // memory.SHARE]
    assert before == mapped.HELD


@pytest.mark.parametrize(
    "more",
    [{"rows": 10**6}, {"width": 256}, {"classes": 1000}, {"largest": 50_000}, {"item": 8}],
)
def test_more_classes_samples_and_features_need_more(more):
    shape = memory.Shape(10**5, 64, 100, 500)
    first, second = (sum(memory.needed(one, True, 999, 2**27).values()) for one in (shape, replace(shape, **more)))
    assert first < second


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to tell memory")
@pytest.mark.parametrize(("rows", "width", "classes"), [(150_000, 256, 20), (6_000, 64, 400), (40_000, 512, 5)])
def test_a_diagnosis_keeps_to_the_memory_that_it_says_it_needs(tmp_path, rows, width, classes):
    size = scale.Size(rows, 50 * classes, width, classes, "")
    scale.generate(tmp_path / "train", scale.counts(rows, classes), size, 1)
    scale.generate(tmp_path / "unseen", np.full(classes, 50), size, 2)
    command = [
        sys.executable,
        "-m",
        "tailscope",
        "diagnose",
        "--train",
        tmp_path / "train",
        "--unseen",
        tmp_path / "unseen",
    ]
    command = [*map(str, command), "--permutations", "99", "--memory"]
    environment = {**os.environ, "TAILSCOPE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    refused = subprocess.run([*command, "100MiB"], env=environment, capture_output=True, text=True)
    needed = re.search(r"needs about ([\d.]+ [GM]iB)", refused.stderr)[1]
    limit = memory.to_bytes(needed) + 2**27  # it is rounded
    held = scale.watch([*command, f"{limit}", "--no-report", "--out", str(tmp_path / "out")], environment)["peak_bytes"]
    assert 0.4 * limit < held < limit
