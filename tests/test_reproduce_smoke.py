"""The first look at a GPU, as far as a CPU can tell: what it chooses after what it measured."""

import json

import pytest

from gpu import smoke


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
