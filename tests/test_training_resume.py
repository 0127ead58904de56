"""A training that is interrupted and started again ends with the same bits as one that is not."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

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
from tailscope.training import loop
loop.SPACING = 0  # these epochs take milliseconds, less than twenty times what writing takes
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


def without(name: str) -> Callable[[dict, dict], None]:
    return lambda tensors, meta: tensors.pop(name)


BROKEN = {
    "a weight is missing": without("model.conv1.weight"),
    "a statistic is missing": without("model.bn1.running_mean"),
    "a momentum is missing": without("momentum.conv1.weight"),
    "a tensor too many": lambda tensors, meta: tensors.update({"model.x": tensors["model.conv1.weight"].clone()}),
    "a shape": lambda tensors, meta: tensors.update({"model.conv1.weight": tensors["model.bn1.weight"].clone()}),
    "a field too many": lambda tensors, meta: meta.update(more=1),
    "no epochs": lambda tensors, meta: meta.pop("epochs"),
    "infinitely many epochs": lambda tensors, meta: meta.update(epochs=float("inf")),
    "losses that are no numbers": lambda tensors, meta: meta.update(losses=["1.0"]),
    "seconds that are no number": lambda tensors, meta: meta.update(seconds=None),
}


@pytest.mark.parametrize("before", [True, False], ids=["one before", "none before"])
@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_checkpoint_that_is_none_of_this_training_costs_no_bit(tmp_path: Path, caplog, change, before: bool) -> None:
    images = digits()
    spec = stage1_spec(images)
    whole, meta = train_stage1(spec, images, tmp_path / "whole")
    with pytest.raises(Stopped):
        train_stage1(spec, images, tmp_path / "cut", runtime=replace(CPU, progress=Interrupting(7, stop)))
    newest = tmp_path / "cut" / "checkpoint.safetensors"
    if before:
        newest.with_name(f"{newest.name}.previous").write_bytes(newest.read_bytes())
    tensors, description = load_file(newest), {"epochs": 1, "losses": [1.0], "seconds": 0.5}
    change(tensors, description)
    save_file(tensors, newest, metadata={"meta": json.dumps(description)})  # as before there were digests
    opened = []

    class Recording(Quiet):
        def task(self, description: str, total: int, done: int = 0):
            opened.append(done)
            return super().task(description, total, done)

    again, again_meta = train_stage1(spec, images, tmp_path / "cut", runtime=replace(CPU, progress=Recording()))
    assert_same_state(whole, again)
    assert again_meta["losses"] == meta["losses"]
    assert opened == [5 * 64 if before else 0]
    assert f"{newest}: damaged (" in caplog.text
    assert ("the one before it is taken" if before else "training starts again") in caplog.text
