"""A training that is interrupted and started again ends with the same bits as one that is not."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tailscope.progress import Quiet
from training_setups import CPU, assert_same_state, digits, stage1_spec, train_stage1


class Interrupting(Quiet):
    """Progress that calls `interrupt` after a number of steps."""

    def __init__(self, after_steps: int, interrupt: Callable[[], None]) -> None:
        self.left = after_steps
        self.interrupt = interrupt

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        def advance(items: int) -> None:
            self.left -= 1
            if self.left == 0:
                self.interrupt()

        yield advance


class Stopped(Exception):
    pass


def stop() -> None:
    raise Stopped


VARIANTS = {
    "plain": {},
    "mixup": {"mix": "mixup"},
    "autoaugment": {"augment": ("crop(padding=1)", "autoaugment")},
    "no momentum": {"train": {"momentum": 0.0, "nesterov": False}},
    "class-balanced": {"sampler": "class_balanced"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_an_exception_in_the_middle_costs_no_bit(changes: dict, tmp_path: Path) -> None:
    images = digits()
    spec = stage1_spec(images, **changes)
    whole, meta = train_stage1(spec, images, tmp_path / "whole")
    # Steps 1-5 are epoch 0, 6-10 epoch 1: stop in epoch 1, and once more in epoch 2.
    for steps in (7, 6):
        with pytest.raises(Stopped):
            train_stage1(spec, images, tmp_path / "cut", runtime=replace(CPU, progress=Interrupting(steps, stop)))
    resumed, resumed_meta = train_stage1(spec, images, tmp_path / "cut")
    assert_same_state(whole, resumed)
    assert resumed_meta["losses"] == meta["losses"]
    assert len(meta["losses"]) == meta["epochs"] == 3
    assert meta["steps"] == 12


KILLED_IN_EPOCH_2 = """
import os, signal, sys
from tailscope.training import epochs
epochs.SPACING = 0  # these epochs take milliseconds, less than twenty times what writing takes
from dataclasses import replace
from pathlib import Path
from test_training_resume import Interrupting
from training_setups import CPU, digits, stage1_spec, train_stage1

images = digits()
runtime = replace(CPU, progress=Interrupting(12, lambda: os.kill(os.getpid(), signal.SIGKILL)))
train_stage1(stage1_spec(images, steps=15), images, Path(sys.argv[1]), runtime=runtime)
"""


def test_a_kill_in_the_middle_costs_no_bit(tmp_path: Path) -> None:
    images = digits()
    spec = stage1_spec(images, steps=15)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_EPOCH_2, str(tmp_path / "cut")], env=environment)
    assert killed.returncode == -signal.SIGKILL
    checkpoint = load_file(tmp_path / "cut" / "checkpoint.safetensors")
    assert int(checkpoint["model.bn1.num_batches_tracked"]) == 10  # two epochs of five steps are kept
    whole, meta = train_stage1(spec, images, tmp_path / "whole")
    resumed, resumed_meta = train_stage1(spec, images, tmp_path / "cut")
    assert_same_state(whole, resumed)
    assert resumed_meta["losses"] == meta["losses"]


def test_a_training_killed_after_its_last_checkpoint_only_returns(tmp_path: Path) -> None:
    images = digits()
    spec = stage1_spec(images)
    whole, meta = train_stage1(spec, images, tmp_path)
    again, again_meta = train_stage1(spec, images, tmp_path)
    assert_same_state(whole, again)
    assert (again_meta["losses"], again_meta["seconds"]) == (meta["losses"], meta["seconds"])


def test_progress_counts_what_was_done_before(tmp_path: Path) -> None:
    opened = []

    class Recording(Interrupting):
        def task(self, description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
            opened.append((total, done))
            return super().task(description, total, done)

    images = digits()
    spec = stage1_spec(images)
    with pytest.raises(Stopped):
        train_stage1(spec, images, tmp_path, runtime=replace(CPU, progress=Recording(7, stop)))
    train_stage1(spec, images, tmp_path, runtime=replace(CPU, progress=Recording(99, stop)))
    assert opened == [(12 * 64, 0), (12 * 64, 5 * 64)]
