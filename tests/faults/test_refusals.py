"""A disk that refuses: every call that changes it may fail once, or from then on. One line, and nothing is lost."""

import errno
import fcntl
import math
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.results import contents

TRIALS = 8
"""Of every call and verb, in a full round."""
CALLS = {
    "write": (os, "fsync", (errno.ENOSPC, errno.EIO, errno.EDQUOT)),
    "rename": (os, "rename", (errno.EACCES, errno.EIO, errno.EROFS)),
    "replace": (os, "replace", (errno.EACCES, errno.ENOSPC, errno.EXDEV)),
    "mkdir": (os, "mkdir", (errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EMLINK)),
    "lock": (fcntl, "flock", (errno.ENOLCK, errno.EIO, errno.ENOSYS)),
    "open": (os, "open", (errno.EACCES, errno.EMFILE, errno.EROFS)),
}


def refusing(call: str, at: int, number: int, *, ever_after: bool) -> Callable[[], None]:
    """Return what makes a call fail from within the product, at its `at`-th time."""
    module, name, _ = CALLS[call]
    working, left = getattr(module, name), [at]

    def refuse(*arguments, **options):
        left[0] -= 1
        if left[0] == 0 or (ever_after and left[0] < 0):
            raise OSError(number, os.strerror(number), *[a for a in arguments[:1] if isinstance(a, str | Path)])
        return working(*arguments, **options)

    return lambda: setattr(module, name, refuse)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("verb", ["swap", "features"])
def test_a_refusing_disk_is_one_line_and_costs_no_result(
    verb, call, forks, commands, amount, dice: random.Random, ledger, tmp_path: Path
):
    command = commands[verb]
    assert forks.run(*command.command(tmp_path / "whole", tmp_path / "whole-store")).code == 0
    expected = contents(tmp_path / "whole", command.files)
    for trial in range(math.ceil(amount * TRIALS)):
        places = tmp_path / f"out-{trial}", tmp_path / f"store-{trial}"
        number = dice.choice(CALLS[call][2])
        prepare = refusing(call, dice.randint(1, 40), number, ever_after=dice.random() < 0.3)
        ended = forks.run(*command.command(*places), prepare=prepare)
        ledger.add(f"refused calls of {call}")
        assert ended.code in (0, 2), ended.err
        if ended.code == 2:
            assert re.search(r"(^|\n)error: [^\n]+\n$", ended.err), ended.err
            assert "Traceback" not in ended.err
            assert forks.run(*command.command(*places)).code == 0
        assert contents(places[0], command.files) == expected
