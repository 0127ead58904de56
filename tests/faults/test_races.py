"""Several processes on one store train every stage once, and all get the same results."""

import math
import random
import signal
from pathlib import Path

from faults.results import contents

RACERS = 8


def test_eight_processes_train_each_stage_once(forks, commands, amount, ledger, tmp_path: Path):
    whole = forks.run(*commands["swap"].command(tmp_path / "whole", tmp_path / "whole-store"))
    expected = contents(tmp_path / "whole", commands["swap"].files)
    for race in range(math.ceil(3 * amount)):
        store = tmp_path / f"store-{race}"
        outs = [tmp_path / f"out-{race}-{racer}" for racer in range(RACERS)]
        racers = [forks.start(*commands["swap"].command(out, store)) for out in outs]
        ended = [racer.end() for racer in racers]
        assert [one.code for one in ended] == [0] * RACERS, [one.err for one in ended]
        assert sum(one.trained for one in ended) == whole.trained
        assert all(contents(out, commands["swap"].files) == expected for out in outs)
        ledger.add("races")
        ledger.most("racers", RACERS)
        ledger.most("trainings of a stage in a race, at most", sum(one.trained for one in ended) / whole.trained)


def test_the_others_go_on_where_some_are_killed(forks, commands, amount, dice: random.Random, ledger, tmp_path: Path):
    whole = forks.run(*commands["swap"].command(tmp_path / "whole", tmp_path / "whole-store"))
    expected = contents(tmp_path / "whole", commands["swap"].files)
    for race in range(math.ceil(3 * amount)):
        outs = [tmp_path / f"out-{race}-{racer}" for racer in range(4)]
        racers = [forks.start(*commands["swap"].command(out, tmp_path / f"store-{race}")) for out in outs]
        for racer in racers[:2]:
            ended = racer.end(dice.uniform(0, whole.seconds))
            ledger.add("kills", ended.code == -signal.SIGKILL)
        assert [racer.end().code for racer in racers[2:]] == [0, 0]
        assert all(contents(out, commands["swap"].files) == expected for out in outs[2:])
