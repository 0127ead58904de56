"""The first look at a GPU, as far as a CPU can tell: what it chooses after what it measured."""

import json
from contextlib import contextmanager

import pytest

from gpu import smoke
from tailscope.training import loop
from tailscope.training.step import WARM_UP
from test_training_step_graph import Again, Refuses


def equality(alone=0.001, together=0.002, **more):
    return {"part": "plain", "what": "equality", "noise": 0.0005, "alone": alone, "together": together, **more}


def rate(jobs, images):
    return {"part": "plain", "what": "rate", "jobs": jobs, "images_per_second": images}


RATES = [rate(1, 90_000), rate(4, 200_000), rate(8, 180_000)]
CAREFUL = "--jobs 2 --engine eager"


@pytest.mark.parametrize(
    ("rows", "options", "graphs"),
    [
        ([equality(), *RATES], "--jobs 4 --engine eager", "1"),
        ([equality(alone=0.5, together=0.5), *RATES], CAREFUL, "0"),  # captures are wrong
        ([equality(alone=None, together=None), *RATES], CAREFUL, "0"),
        ([equality(together=0.5), *RATES], "--jobs 1 --engine eager", "1"),  # only side by side
        ([equality(together=None), *RATES], "--jobs 1 --engine eager", "1"),
        ([{"part": "plain", "what": "equality", "error": "RuntimeError: no"}, *RATES], CAREFUL, "0"),
        ([{"part": "plain", "what": "versions"}], CAREFUL, "0"),  # it died or hung in the middle
        ([equality(), rate(1, 0)], CAREFUL, "1"),
        ([], CAREFUL, "1"),  # nobody looked
    ],
)
def test_where_captures_are_wrong_nothing_is_captured(tmp_path, capsys, rows, options, graphs):
    (tmp_path / "smoke.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    smoke.choose(tmp_path)
    assert (tmp_path / "options").read_text().strip() == options
    assert (tmp_path / "graphs").read_text().strip() == graphs
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"chosen: {options}")
    assert ("without CUDA graphs" in last) is (graphs == "0")


def test_compiled_steps_that_are_sound_are_taken_with_their_graphs(tmp_path):
    rows = [equality(alone=0.5), *RATES, equality(part="compiled"), {**rate(2, 100_000), "part": "compiled"}]
    (tmp_path / "smoke.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    smoke.choose(tmp_path)
    assert (tmp_path / "options").read_text() == "--jobs 2 --engine compiled\n"
    assert (tmp_path / "graphs").read_text() == "1\n"


@pytest.fixture
def bench(monkeypatch):
    """Trainings that capture with a stand-in, of the class that a test gives; those that did are in `captures`."""

    @contextmanager
    def standing_in(device):
        found.captures.append(found.capture())
        yield found.captures[-1]

    found = smoke.Bench("cpu", engine="eager", miniature=True)
    found.captures, found.capture = [], Again
    monkeypatch.setattr(smoke, "SEEDS", 2)
    monkeypatch.setattr(loop, "capturing", standing_in)
    return found


class Breaks(Again):
    """Its second graph, that of short batches, takes each step many times."""

    def record(self, work):
        replay, times = super().record(work), 50 if self.recorded == 2 else 1
        return lambda: [replay() for _ in range(times)]


def test_both_graphs_are_replayed_before_the_losses_that_are_compared(bench):
    found = smoke.equality(bench, 2)  # captures nothing where it is compared with
    assert found["noise"] == 0
    assert max(found["alone"], found["together"]) < 1e-3
    assert smoke.sound([{"what": "equality", **found}])
    full, short = 10, 1
    expected = smoke.EPOCHS * (full + short) - 2 * WARM_UP
    assert [(one.recorded, one.replayed) for one in bench.captures] == [(2, expected)] * 2 * 2
    assert full == smoke.FEW // 128
    assert smoke.FEW % 128


def test_a_second_graph_that_is_wrong_is_seen(bench):
    reference = bench.losses(1)
    bench.capture = Breaks
    found = smoke.difference(bench.losses(1), reference)
    assert found > smoke.CLOSE


def test_where_a_capture_fails_losses_that_are_right_do_not_pass(bench, monkeypatch, capsys):
    monkeypatch.setattr(smoke, "EPOCHS", 1)
    bench.capture = Refuses
    found = smoke.equality(bench, 2)
    assert (found["noise"], found["alone"], found["together"]) == (0, None, None)
    assert "is not captured as a CUDA graph" in capsys.readouterr().err
