"""What a comparison's page says, where the most accurate method is not the one that is clearly better."""

import copy
import json

import pytest

from conftest import REPOSITORY
from tailscope.report import comparison
from tailscope.report.text import to_csv

CLEAR, UNCLEAR = 0.01, 0.8


@pytest.fixture(scope="module")
def stored():
    return json.loads((REPOSITORY / "results" / "digits-compare" / "compare.json").read_text(encoding="utf-8"))


def cut(stored, *names, **p_holm):
    """Return the comparison of some of the methods, with other p-values."""
    result = copy.deepcopy(stored)
    result["methods"] = [one for one in result["methods"] if one["name"] in names]
    for one in result["methods"]:
        if one["difference"] is not None:
            one["difference"]["p_holm"] = p_holm.get(one["name"], UNCLEAR)
    return result


def said(result):
    return [comparison.headline(result), *comparison.findings(result), *comparison.advice(result)]


def test_a_method_that_is_clearly_better_is_advised_though_another_is_more_accurate(stored):
    result = cut(stored, "ce", "balanced_softmax", "mislas", "mixup", mislas=CLEAR)
    best = max(result["methods"], key=lambda one: one["mean"])["name"]
    assert best == "balanced_softmax"
    text = said(result)
    assert text[0].startswith("mislas is clearly better than ce: +")
    assert text[1].startswith("balanced_softmax reaches ")
    assert text[2].startswith("Clearly better than ce: mislas (+")
    assert text[-1].startswith("Use mislas.")
    assert not [line for line in text if "No method clearly beats" in line or "Keep" in line]


def test_where_none_is_clearly_better_the_most_accurate_is_named_as_that(stored):
    text = said(cut(stored, "ce", "balanced_softmax", "mislas", mislas=0.3))
    assert text[0].startswith("No method clearly beats ce; balanced_softmax is the most accurate, +")
    assert text[-1].startswith("Keep ce, or train more seeds")


def test_a_clearly_better_best_does_best(stored):
    assert said(cut(stored, "ce", "la", la=CLEAR))[0].startswith("la does best: +")


def test_the_baseline_is_named_once_where_it_is_the_best(stored):
    text = said(cut(stored, "ce", "mixup"))
    assert text[0] == "Nothing does better than ce"
    assert text[1].count("ce reaches") == text[1].count("%") == 1
    assert any(line.startswith("No method recognises more of the tail classes' images than ce, ") for line in text)


def test_nothing_is_said_of_better_features_where_all_are_the_baselines(stored):
    text = " ".join(said(cut(stored, "ce", "la", "tau")))
    assert "any of the representation gap" not in text
    assert "lowers the representation gap" not in text
    assert "lowers the classifier gap the most: −" in text


def test_recalls_of_a_class_carry_the_methods_names(stored):
    result = cut(stored, "ce", "la")
    table = next(table for table in comparison.tables(result) if table.name == "compare-classes")
    assert to_csv(table).splitlines()[0] == "name,rank,group,count,recall of ce,recall of la"
