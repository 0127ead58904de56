"""A run that is killed at any moment and started again ends as one that is not, and at most one epoch is trained twice.

SIGKILL leaves a process no last word; SIGTERM and SIGHUP must leave what Ctrl-C leaves, in one line.
"""

import itertools
import math
import random
import shutil
import signal
from pathlib import Path

import pytest

from faults.forks import Ended
from faults.results import contents

SEQUENCES = {"swap": 24, "ladder": 16, "geometry": 16, "reproduce": 20, "features": 12, "diagnose": 6}
"""Interrupted runs of each verb in a full round; every one is killed once to three times."""
SIGNALS = [signal.SIGKILL] * 7 + [signal.SIGTERM] * 2 + [signal.SIGHUP]


def epochs(whole: Ended) -> dict[str, int]:
    """Return how many images an epoch of each training of a whole run shows."""
    return {
        task.description: task.starts[1] - task.starts[0] if len(task.starts) > 1 else task.total
        for task in whole.tasks
        if "backbone" in task.description
    }


def redone(ended: list[Ended], images: dict[str, int]) -> float:
    """Return how many epochs the kills cost, at most by one kill."""
    worst = 0.0
    for before, after in itertools.pairwise(ended):
        kept = {task.description: task.before for task in after.tasks}
        for task in before.tasks:
            if task.description in images and task.description in kept:
                worst = max(worst, (task.before + task.done - kept[task.description]) / images[task.description])
    return worst


def every_epoch() -> None:
    """Keep every epoch. Where epochs are shorter than 20 checkpoints take to write, the product keeps only some."""
    from tailscope.training import loop

    loop.SPACING = 0


def kill_until_done(forks, command, dice: random.Random, seconds: float, ledger, prepare) -> list[Ended]:
    """Kill a command one to three times, whenever it comes, then let it end; return how each attempt ended."""
    ended = []
    for _ in range(dice.choice((1, 1, 2, 3))):
        number = dice.choice(SIGNALS)
        ended.append(forks.start(*command, prepare=prepare).end(dice.uniform(0, seconds), number))
        if ended[-1].code in (0, 2):  # the signal came too late, this time or, where all is there already, before
            return ended
        ledger.add(f"kills by {number.name}")
        ledger.add("kills")
        if ended[-1].code != -number:  # before the command line has taken the signals over, the process just ends
            assert number != signal.SIGKILL
            said = ended[-1].err.strip().splitlines()[-1:]  # `reproduce` tells its plan before
            assert (ended[-1].code, [line.partition(";")[0] for line in said]) == (128 + number, ["interrupted"])
    return [*ended, forks.run(*command, prepare=prepare)]


@pytest.mark.parametrize("verb", SEQUENCES)
def test_killed_runs_end_as_whole_ones(verb, forks, commands, amount, dice, ledger, tmp_path: Path):
    command = commands[verb]
    whole = forks.run(*command.command(tmp_path / "whole", tmp_path / "whole-store"))
    assert whole.code == 0, whole.err
    expected = contents(tmp_path / "whole", command.files)
    assert all(value is not None for value in expected.values())
    images = epochs(whole)
    for sequence in range(math.ceil(amount * SEQUENCES[verb])):
        out, store = tmp_path / f"out-{sequence}", tmp_path / f"store-{sequence}"
        prepare = dice.choice((every_epoch, every_epoch, lambda: None))
        ended = kill_until_done(forks, command.command(out, store), dice, whole.seconds, ledger, prepare)
        ledger.add("killed runs")
        assert ended[-1].code in (0, 2), ended[-1].err
        if ended[-1].code == 2:  # killed between its last file and its end
            assert "is there already" in ended[-1].err
        assert contents(out, command.files) == expected
        ledger.add("killed runs with identical results")
        if prepare is every_epoch:
            ledger.most("epochs redone after a kill, at most", math.ceil(redone(ended, images) - 1e-9))
            assert redone(ended, images) <= 1, [task for attempt in ended for task in attempt.tasks]
        else:
            ledger.most("epochs of milliseconds redone after a kill, at most", math.ceil(redone(ended, images) - 1e-9))
        for folder in (out, store):
            shutil.rmtree(folder, ignore_errors=True)
