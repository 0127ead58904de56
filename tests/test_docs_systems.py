"""The section of methods and published figures: complete, of known sources, and of what the results say."""

import json
import tomllib

import pytest

from scripts import docs_systems
from tailscope.classifiers import CLASSIFIERS
from tailscope.methods import SYSTEMS
from tailscope.methods.systems import parse

PUBLISHED = tomllib.loads(docs_systems.PUBLISHED.read_text(encoding="utf-8"))


def test_every_registered_method_has_its_formula():
    assert [entry.name for entry in SYSTEMS if entry.name not in PUBLISHED["methods"]] == []
    assert all(entry["formula"] for entry in PUBLISHED["methods"].values())


@pytest.mark.parametrize("call", PUBLISHED["methods"])
def test_every_published_method_can_be_compared_and_names_its_sources(call):
    parse(f"loss:label_smoothing; {call}", CLASSIFIERS)
    for source, *accuracies in PUBLISHED["methods"][call].get("figures", ()):
        assert PUBLISHED["sources"][source]["conditions"]
        assert len(accuracies) == len(docs_systems.DATA)
        assert all(accuracy == 0 or 1 < accuracy < 100 for accuracy in accuracies)


def method(name, mean, *, change=None, p=None):
    gaps = {"representation": {"points": 0.1}, "classifier": {"points": 0.2}, "change": change}
    difference = None if change is None else {"points": mean - 0.7, "ci95": [0.01, 0.09], "p_holm": p}
    seconds = {"backbone": 2.0, "classifier": 0.5}
    return {
        "name": name, "mean": mean, "groups": {"tail": 0.5}, "difference": difference, "gaps": gaps, "seconds": seconds,
    }  # fmt: skip


def test_ours_are_those_of_the_result_files(tmp_path):
    change = {"representation": {"points": -0.02}, "classifier": {"points": -0.03}}
    result = {
        "dataset": {"name": "tiny"},
        "recipe": {"name": "demo"},
        "spec": {"profile": "exp:7"},
        "seeds": [0, 3],
        "tune": "none",
        "baseline": "ce",
        "reference": {"mean": 0.99},
        "methods": [method("ce", 0.7), method("a_b", 0.75, change=change, p=0.04), method("c", 0.71, change=change)],
    }
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "compare.json").write_text(json.dumps(result))
    text = docs_systems.section(tmp_path)
    assert "**tiny, recipe demo, exp:7: 3 methods, seeds 0 3**" in text
    assert "`ce` loses 10.0 points to its representation and 20.0 to its classifier, against the 99.0 %" in text
    assert "| ce | 70.0 % | 50.0 % | – | – | – | – | 2.5 |" in text
    assert "| a\\_b | 75.0 % | 50.0 % | +5.0 \\[1.0, 9.0\\] | yes | −2.0 | −3.0 | 2.5 |" in text
    assert "| c | 71.0 % | 50.0 % | +1.0 \\[1.0, 9.0\\] | – | −2.0 | −3.0 | 2.5 |" in text


def test_gains_are_over_the_cross_entropy_of_the_same_source():
    row = docs_systems._published("ldam_drw", PUBLISHED)
    assert row["CIFAR-10-LT"] == f"77.73 (+{77.73 - 71.95:.2f}), BoT; 77.75 (+{77.75 - 71.23:.2f}), iDL"
    assert docs_systems._published("mislas", PUBLISHED)["CIFAR-100-LT"] == "47.00, MiSLAS"
