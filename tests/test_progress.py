"""A deadline: stops at safe points only, in time, and never before something was done."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailscope.progress import Deadline, Quiet, TimeIsUp


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def train(deadline, clock, seconds, finished):
    """Work through epochs of the given lengths as training does; list those that were finished."""
    with deadline.task("training", len(seconds)) as advance:
        for length in seconds:
            deadline.safe_point()
            clock.now += length
            advance(1)
            finished.append(length)


@given(st.integers(1, 50), st.integers(1, 100))
def test_equal_epochs_end_before_the_limit_but_the_first_is_always_done(length, limit):
    clock, finished = Clock(), []
    deadline = Deadline(Quiet(), limit, clock)
    with pytest.raises(TimeIsUp):
        train(deadline, clock, [length] * 1000, finished)
    assert finished
    assert len(finished) == 1 or clock.now < 100 + limit
    assert clock.now + length >= 100 + limit  # and no time was given away


def test_work_that_fits_is_not_stopped():
    clock, finished = Clock(), []
    deadline = Deadline(Quiet(), 10, clock)
    train(deadline, clock, [3, 3, 3], finished)
    assert (finished, deadline.passed) == ([3, 3, 3], False)
    with pytest.raises(TimeIsUp):
        train(deadline, clock, [1, 1], finished)  # 9 seconds are over: the first fits, the second no longer
    assert (finished, deadline.passed) == ([3, 3, 3, 1], True)


def test_nothing_begins_after_the_limit():
    clock = Clock()
    deadline = Deadline(Quiet(), 10, clock)
    clock.now += 10
    with pytest.raises(TimeIsUp):
        train(deadline, clock, [1], [])
    assert clock.now == 110


def test_everything_else_is_passed_on():
    told = []

    class Listener(Quiet):
        def note(self, text):
            told.append(text)

        def safe_point(self):
            told.append("safe")

    deadline = Deadline(Listener(), 10, Clock())
    deadline.note("stored already")
    deadline.safe_point()
    assert told == ["stored already", "safe"]
