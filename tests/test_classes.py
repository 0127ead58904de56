"""Diagnoses of very many classes: what is approximated agrees with the exact methods, and the page stays usable."""

import json
import shutil

import numpy as np
import pytest
import torch

import tailscope
from benchmarks import classes as bench
from diagnosis_cases import table
from tailscope.classifiers import CRT, SoftmaxRegression
from tailscope.classifiers.batches import fit_by_batches
from tailscope.diagnosis import curve_rows, learning_curve, remedies, soundness
from tailscope.measures import chance, collapse
from tailscope.report import page
from tailscope.tables.table import LinearLayer

SMALL = bench.World(40, 6, most=30, least=4, held_out=20, weak=0.3, bad=0.0, apart=2.2)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def force(monkeypatch):
    """Approximate everything, whatever its size."""
    monkeypatch.setattr(curve_rows, "is_long_curve", lambda *shape: True)
    monkeypatch.setattr(remedies, "is_long_search", lambda *shape: True)
    monkeypatch.setattr(remedies, "is_large", lambda *shape: True)
    monkeypatch.setattr(remedies, "MOST_CHOSEN_ON", 600)
    monkeypatch.setattr(collapse, "nearest_step", lambda *shape: 3)
    for module in (soundness, collapse):
        monkeypatch.setattr(module, "are_many_pairs", lambda number: True)


def drawn(world, seed=0):
    """Tables of a world, its classifier in use, and its truth."""
    stream = np.random.default_rng(seed)
    truth = bench.Truth.of(world, stream)
    parts = [truth.draw(counts, stream) for counts in (world.counts, np.full(world.classes, world.held_out))]
    layer = LinearLayer.from_arrays(truth.weight, truth.bias)
    return [table(*part) for part in parts], layer, truth


@pytest.mark.parametrize(("weak", "bad"), [(0.1, 0.6), (0.7, 0.1)])
def test_the_approximate_verdict_is_the_exact_one(monkeypatch, weak, bad):
    world = bench.World(40, 6, most=30, least=4, held_out=20, weak=weak, bad=bad, apart=2.2)
    (train, unseen), layer, _ = drawn(world)
    given = {"classifier": layer, "permutations": 99}
    exact = tailscope.diagnose(train, unseen, **given)
    force(monkeypatch)
    found = tailscope.diagnose(train, unseen, **given)
    said = {learning_curve.SHORT, remedies.BATCHES}
    assert said <= set(found["warnings"])
    assert not said & set(exact["warnings"])
    assert (
        found["verdict"]["bottleneck"]
        == exact["verdict"]["bottleneck"]
        == ("classifier" if bad > weak else "representation")
    )
    for gap in ("classifier_gap", "representation_gap"):
        assert found["verdict"][gap]["points"] == pytest.approx(exact["verdict"][gap]["points"], abs=0.04)
    assert found["accuracy"]["rebalanced"]["mean"] == pytest.approx(exact["accuracy"]["rebalanced"]["mean"], abs=0.04)
    assert found["accuracy"]["current"] == exact["accuracy"]["current"]
    bottlenecks = [[part["bottleneck"] for part in one["verdict"]["classes"]] for one in (exact, found)]
    against = {("classifier", "representation"), ("representation", "classifier")}
    assert not against & set(zip(*bottlenecks, strict=True))
    for name in ("nc2_angles", "cdnv"):
        assert found["collapse"]["unseen"][name] == pytest.approx(exact["collapse"]["unseen"][name], rel=1e-9)
    assert found["collapse"]["unseen"]["nc4"] == pytest.approx(exact["collapse"]["unseen"]["nc4"], abs=0.05)


def test_without_a_classifier_and_with_a_test_file(monkeypatch):
    (train, unseen), _, truth = drawn(SMALL)
    test = table(*truth.draw(np.full(SMALL.classes, 10), np.random.default_rng(9)))
    exact = tailscope.diagnose(train, unseen, test=test, permutations=0)["verdict"]
    force(monkeypatch)
    found = tailscope.diagnose(train, unseen, test=test, permutations=0)
    assert "classifier" not in (found["verdict"]["bottleneck"], exact["bottleneck"])  # they may be undecided
    gaps = [one["representation_gap"]["points"] for one in (found["verdict"], exact)]
    assert gaps[0] == pytest.approx(gaps[1], abs=0.04)
    best = (
        (test.features.numpy() @ truth.means.T - 0.5 * (truth.means**2).sum(1)).argmax(1) == test.labels.numpy()
    ).mean()
    assert found["accuracy"]["current"]["classifier"] == "softmax regression on the training features"
    for name in ("current", "rebalanced", "classifier_bound"):
        assert 0.6 * best < found["accuracy"][name]["mean"] < best + 0.03
    assert found["accuracy"]["classifier_bound"]["classifier"].startswith("linear discriminants")


@pytest.mark.parametrize("kind", [SoftmaxRegression, CRT])
def test_mini_batches_come_near_the_optimum(kind):
    (train, unseen), _, _ = drawn(bench.World(30, 8, most=100, least=20, apart=2.2))
    features, labels = train.features.numpy(), train.labels.numpy()
    exact, found = kind().fit(features, labels), fit_by_batches(kind(), features, labels)
    again = fit_by_batches(kind(), features, labels, device=torch.device("cpu"))
    assert np.array_equal(found.coef_, again.coef_)
    double = fit_by_batches(kind(), features.astype(np.float64), labels)
    np.testing.assert_allclose(double.coef_, found.coef_, rtol=1e-2, atol=1e-3)
    rows, true = unseen.features.numpy(), unseen.labels.numpy()
    accuracies = [(model.predict(rows) == true).mean() for model in (exact, found)]
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.02)


def test_the_most_extreme_classes_are_drawn_on_while_there_is_time(monkeypatch):
    monkeypatch.setattr(chance, "MOST_DRAWN", 100)
    tests = object.__new__(chance.ClassTests)
    rows = type("Side", (), {"count": lambda self, k: 1})()
    tests._sides, tests.undrawn = (rows, rows), 0
    counts = [(k, chance.Count(1.0, high, 999, 999, False, 0.0)) for k, high in enumerate([5, 0, 3, 1])]
    assert [k for k, _ in tests._affordable(counts, 1019)] == [1, 3]  # each costs (1019 - 999) * 2
    assert tests.undrawn == 2


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The result of 10 classes, each 1,000 times, as if there were 10,000; the page of it."""
    (train, unseen), layer, _ = drawn(bench.World(10, 4, most=10, least=4, held_out=10, apart=2.2))
    found = tailscope.diagnose(train, unseen, classifier=layer, permutations=0)
    stored = repeated(json.loads(json.dumps(dict(found))), 1_000)
    return page.write_alone(tmp_path_factory.mktemp("many") / "report.html", page.of_diagnosis(stored))


def repeated(found, times):
    """Return a diagnosis whose classes are there so many times."""
    number = len(found["counts"]) * times
    found["dataset"]["class_names"] = [f"class {k:05d}" for k in range(number)]
    found["counts"] = found["counts"] * times
    found["classes"] = [
        {**entry, "index": k, "name": f"class {k:05d}"} for k, entry in enumerate(found["classes"] * times)
    ]
    found["verdict"]["classes"] = found["verdict"]["classes"] * times
    for name in ("current", "rebalanced", "classifier_bound"):
        found["accuracy"][name]["per_class"] = found["accuracy"][name]["per_class"] * times
    found["drilldown"]["classes"] = found["drilldown"]["classes"] * times
    found["drilldown"]["confusions"]["matrix"] = None
    return found


def test_the_page_of_ten_thousand_classes_is_small(many):
    assert many.stat().st_size <= 5_000_000


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: install the package chromium")
def test_the_page_of_ten_thousand_classes_is_read_and_searched(many):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    said = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page()
        tab.set_default_timeout(120_000)  # a busy machine takes long to lay out so many rows
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(many.as_uri())
        assert tab.inner_text("h1")
        assert "10,000 classes" in tab.inner_text(".about")
        tab.wait_for_selector("body[data-ready=yes]", timeout=60_000)
        assert tab.evaluate("document.querySelectorAll('#class-scroll tbody tr').length") == 500
        tab.click("#classes-table summary")
        tab.wait_for_function("document.querySelectorAll('#class-scroll tbody tr').length === 10000")
        assert tab.inner_text("#shown") == "10000 classes, the first 500 shown"
        tab.fill("#find", "class 09876")
        assert tab.inner_text("#shown") == "1 of 10000 classes"
        row = tab.locator("#class-scroll tbody tr:not([hidden])")
        assert row.count() == 1
        assert row.locator("td").first.inner_text() == "class 09876"
        tab.fill("#find", "")
        tab.click("#class-scroll th:nth-child(1) button")
        tab.click("#class-scroll th:nth-child(1) button")
        assert (
            tab.locator("#class-scroll tbody tr:not([hidden])").first.locator("td").first.inner_text() == "class 09999"
        )
        browser.close()
    assert said == []


@pytest.mark.slow
def test_three_thousand_classes_for_real(tmp_path):
    world = bench.World(3_000)
    truth, accuracies = bench.furnish(world, tmp_path)
    found = bench.diagnose(tmp_path, 1)
    told = bench.compared(found["result"], truth, accuracies)
    assert told["bottleneck"]["said"] == told["bottleneck"]["true"]
    wrong = told["classes"][bench.WEAK][bench.BAD] + told["classes"][bench.BAD][bench.WEAK]
    decided = sum(told["classes"][kind][say] for kind in (bench.WEAK, bench.BAD) for say in (bench.WEAK, bench.BAD))
    assert wrong <= 0.05 * decided
    assert decided > 0.3 * (truth.kinds != bench.SOUND).sum()
    assert found["page_bytes"] <= bench.MOST_PAGE
    assert found["peak_bytes"]["both"] <= 2 * 2**30
