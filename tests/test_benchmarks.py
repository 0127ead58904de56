"""The benchmarks run from end to end at tiny sizes, their statistics are right, and the document is up to date."""

import doctest
import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from benchmarks import __main__ as command
from benchmarks import rebalance, record, sweep
from benchmarks.arms.common import load_images
from benchmarks.arms.geometry_sklearn import centers_of, measure_class
from benchmarks.arms.ours import make_features
from benchmarks.arms.rivals import batches, convolutions_of
from benchmarks.geometry import Shape, flops, train_counts
from benchmarks.measure import Arm, Measured, Pace, Slice, Spread, Worker, interleave, paired
from benchmarks.record import Options, Record, Row
from benchmarks.swap import images_trained
from conftest import REPOSITORY
from tailscope.data import sources
from tailscope.measures import describe
from tailscope.networks import MODELS
from tailscope.store import Store
from tailscope.training.step import Normalizer

TINY = Options(size="tiny")
MACHINE = {"cpu": "c", "threads": 1, "gpu": None}
TURNS: list[str] = []


def counting(pace: Pace, *, name: str, seconds: float = 0.0) -> None:
    """An arm that notes whose turn it is."""
    pace.ready(name=name)
    while True:
        TURNS.append(name)
        pace.step(10)


def ending(pace: Pace, *, steps: int) -> dict[str, int]:
    """An arm that ends by itself."""
    pace.ready()
    for _ in range(steps):
        pace.step()
    return {"steps": steps}


def failing(pace: Pace) -> None:
    """An arm that fails in a slice."""
    pace.ready()
    raise ValueError("the reason")


def here(function: str) -> str:
    return f"{__name__}:{function}"


def test_arms_take_turns_and_slices_have_whole_multiples() -> None:
    TURNS.clear()
    arms = {
        "a": Arm(here("counting"), {"name": "a"}, multiple=3, warm_up=0),
        "b": Arm(here("counting"), {"name": "b"}, settle=2, warm_up=0),
    }
    measured = interleave(arms, rounds=2, seconds=0.0, inline=True)
    # An arm's next turn may begin with the step after the one that ended its slice.
    order = [name for i, name in enumerate(TURNS) if i == 0 or TURNS[i - 1] != name]
    assert order[:4] == ["a", "b", "a", "b"]
    assert [s.steps for s in measured["a"].slices] == [3, 3]
    assert [s.items for s in measured["a"].slices] == [30, 30]
    assert [s.steps for s in measured["b"].slices] == [1, 1]  # the two that settle are not counted
    assert measured["a"].info == {"name": "a"}


def test_an_arm_in_a_process_of_its_own_ends_with_its_result() -> None:
    with Worker(Arm("benchmarks.arms.rivals:matrix_product", {"size": 8, "device": "cpu"})) as worker:
        worker.wait_until_ready()
        done = worker.run(0.0)
    assert done.items == 2 * 8**3
    assert done.peak_bytes > 50e6  # PyTorch alone: it was counted in the process that ran
    assert done.result is None


def test_an_arm_that_ends_reports_its_last_steps() -> None:
    with Worker(Arm(here("ending"), {"steps": 5}, multiple=3), inline=True) as worker:
        worker.wait_until_ready()
        assert worker.run(0.0).steps == 3
        last = worker.run(0.0)
    assert (last.steps, last.result) == (2, {"steps": 5})


def test_a_failure_in_an_arm_reaches_the_parent() -> None:
    with Worker(Arm(here("failing")), inline=True) as worker:
        worker.wait_until_ready()
        with pytest.raises(RuntimeError, match="the reason"):
            worker.run(0.0)


def test_ratios_are_paired_by_rounds() -> None:
    slow = Measured([Slice(1, 1, s, 0) for s in (2.0, 30.0, 4.0)], Slice(0, 0, 0, 0), {})
    fast = Measured([Slice(1, 1, s, 0) for s in (1.0, 10.0, 1.0)], Slice(0, 0, 0, 0), {})
    assert paired(slow.per_item, fast.per_item) == Spread(3.0, 2.0, 4.0)


@pytest.mark.parametrize("name", [*command.NAMES, command.SCALE])
def test_every_benchmark_runs(name: str) -> None:
    # Lightning warns about its environment; with one seed and few images our own result warns too. Neither is tested.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = command.benchmark(name)(TINY)
    content = json.loads(json.dumps(found.to_json(MACHINE, 0.0, 1.0)))
    assert content["benchmark"] == name
    assert content["rows"]
    for row in content["rows"]:
        assert row["value"]["low"] <= row["value"]["median"] <= row["value"]["high"]
        assert row["value"]["median"] > 0 or "memory" in row["what"]
    assert len(record.table(content).splitlines()) == len(content["rows"]) + 4


@pytest.mark.slow
@pytest.mark.parametrize("name", command.ASKED_FOR)
def test_what_runs_where_it_is_asked_for_runs(name: str) -> None:
    test_every_benchmark_runs(name)


def test_the_goals_of_the_rows_are_judged_by_the_median() -> None:
    value = Spread.of([1.0])
    assert Row("", value, "s", Spread(3.1, 2.0, 4.0), goal=3.0).reached is True
    assert Row("", value, "s", Spread(2.9, 2.0, 4.0), goal=3.0).reached is False
    assert Row("", value, "s", Spread(0.9, 0.1, 2.0), goal=1.0, at_most=True).reached is True
    assert Row("", value, "s").reached is None


def test_the_document_is_filled_from_the_records_and_keeps_its_prose(tmp_path: Path) -> None:
    made = Record("train", TINY, [Row("a|b", Spread(2.0, 1.0, 3.0), "s", Spread.of([5.0]), "ours / this", 4.0)])
    content = made.to_json(MACHINE, 0.5, 60.0)
    record.write(tmp_path, content)
    text = "Prose.\n<!-- bench:train -->\nold\n<!-- /bench -->\nMore.\n<!-- bench:swap -->\n<!-- /bench -->\n"
    tables = {name: record.table(found) for name, found in record.read(tmp_path).items()}
    filled = record.render(text, tables)
    assert "| a\\|b | 2.00 (1.00–3.00) s | 5.00× ours / this | ≥ 4×: reached |  |" in filled
    assert record.MISSING in filled
    assert "old" not in filled
    assert filled.startswith("Prose.\n<!-- bench:train -->\n")
    assert record.render(filled, tables) == filled


def test_the_document_is_up_to_date_and_shows_every_benchmark() -> None:
    text = command.DOCUMENT.read_text()
    shown = {match[2] for match in record.BLOCK.finditer(text)}
    assert {name for name in shown if not name.endswith("-zen4")} == set(command.NAMES)  # others are kept from before
    assert command.fill_document(check=True) == 0


@pytest.fixture
def of_digits(tmp_path: Path) -> Path:
    """A folder with digits.npz, and a store of two backbones: one of a long tail of the digits, one of as many of all.

    Their bodies are random, their last layers fitted to the training images.
    """
    digits, store = sources.load("digits"), Store(tmp_path / "store")
    splits = {"train": digits.train, "test": digits.test}
    parts = {f"{name}_{what}": getattr(s, what).numpy() for name, s in splits.items() for what in ("images", "labels")}
    np.savez(tmp_path / "digits.npz", **parts)
    by_class = digits.train.labels.argsort(stable=True).split(digits.train.counts())
    for key, counts in (("aa11", [round(100 * 20 ** (-k / 9)) for k in range(10)]), ("bb22", [20] * 10)):
        rows = torch.cat([members[:n] for members, n in zip(by_class, counts, strict=True)])
        torch.manual_seed(0)
        network, images = MODELS.make("resnet8", 1, 10).eval(), digits.train.take(rows)
        with torch.inference_mode():
            features = network.features(Normalizer.of(digits.train.images)(images.images))
            fitted = LogisticRegression(C=100.0, max_iter=2000).fit(features.numpy(), images.labels.numpy())
            network.classifier.weight.copy_(torch.from_numpy(fitted.coef_))
            network.classifier.bias.copy_(torch.from_numpy(fitted.intercept_))
        spec = {"data": {"name": "digits", "profile": "x", "counts": counts}, "model": "resnet8"}
        meta = {"spec": {**spec, "augment": ["shift"], "mix": None}, "seed": 0}
        tensors = {**network.state_dict(), "rows": rows}
        store.get_or_make("stage1", key, lambda _, t=tensors, m=meta: (t, m))
    return tmp_path


def test_what_re_balancing_gains_is_measured_and_kept(of_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--only", "rebalance", "--store", "store", "--data-root", ".", "--cache", "cache", "--out", "out"]
    monkeypatch.chdir(of_digits)
    assert command.main(given) == 0
    found = json.loads((of_digits / "out" / "rebalance.json").read_text())
    cases = found["cases"]
    assert [case["case"] for case in cases] == ["aa11 0.5", "aa11 0.5 rest"]  # with 5 held out a class none gains
    for case, images in zip(cases, (250, 250), strict=True):
        low, high = case["promised"]["ci95"]
        assert low <= case["promised"]["points"] <= high
        gain = case["gain"]
        assert gain["images"] == images
        assert gain["points"] == pytest.approx(gain["after"] - gain["before"])
        assert gain["within"] == (low <= gain["points"] <= high)
    assert len(rebalance.table(found).splitlines()) == len(cases) + 4
    monkeypatch.setattr(rebalance, "examine", None)  # what is done is not done again
    assert command.main(given) == 0
    assert json.loads((of_digits / "out" / "rebalance.json").read_text())["cases"] == cases


def test_unknown_benchmarks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "trian"]) == 2
    assert "known are train" in capsys.readouterr().err


def test_tuned_batches_are_crops_and_flips_of_their_images() -> None:
    """Each image of a batch equals one of the 81 x 2 crops of its original, compared pixel by pixel."""
    images = load_images(None, 6)
    x, y = next(batches(images.images, images.labels, 6, [0.0] * 3, [1.0] * 3))
    pixels = (x * 255).round().byte().permute(0, 2, 3, 1)
    padded = torch.nn.functional.pad(images.images, (0, 0, 4, 4, 4, 4))
    for got, label in zip(pixels, y.tolist(), strict=True):
        crops = [padded[label, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        assert any(torch.equal(got, c) or torch.equal(got, c.flip(1)) for c in crops)


def test_the_limit_has_every_convolution_of_the_network() -> None:
    network = MODELS.make("resnet32", 3, 10)
    layers = convolutions_of(network, 2, torch.float32, torch.device("cpu"))
    assert len(layers) == 31
    macs = sum(layer.weight.numel() * layer.forward().shape[2:].numel() for layer in layers)
    assert macs == pytest.approx(68.86e6, rel=1e-3)
    assert all(layer.forward().shape == layer.gradient.shape for layer in layers)
    assert [layer.needs_input_gradient for layer in layers] == [False] + [True] * 30
    for layer in layers:
        layer.backward()


def test_the_rival_measures_the_same_geometry() -> None:
    """A rival that computed something else would be no rival."""
    features = make_features(600, 6, 5)
    arrays = features.arrays()
    ours = describe(*vars(features).values(), [str(k) for k in range(5)], permutations=0).classes
    centers = centers_of(**arrays, classes=5)
    names = (
        "variance", "covariance_norm", "covariance_norm_unbiased", "effective_rank", "first_pc_share",
        "spread_train_deg", "angular_width_deg", "escape_rate", "spread_true_deg", "center_shift_deg", "norm_ratio",
        "spread_gap_deg", "escape_conformal", "escape_rank", "displacement", "variance_ratio",
        "nearest_center_sample_train_deg", "nearest_center_sample_true_deg",
    )  # fmt: skip
    for k, entry in enumerate(ours):
        rival = measure_class(arrays, k, centers, 0, np.random.default_rng(0))
        for name in names:
            assert rival[name] == pytest.approx(entry[name], rel=1e-3, abs=1e-6), name
        assert centers.nearest_true[k] == pytest.approx(entry["nearest_center_true_deg"], rel=1e-4)
        assert centers.nearest_train[k] == pytest.approx(entry["nearest_center_train_deg"], rel=1e-4)


@pytest.mark.parametrize("name", ["measure", "geometry", "swap", "record", "verdicts.sources", "verdicts.summary"])
def test_the_examples_in_docstrings_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"benchmarks.{name}")).failed == 0


def test_images_trained_counts_short_batches() -> None:
    def slow(images: int, steps: int, batch: int) -> int:
        sizes = [min(batch, images - start) for start in range(0, images, batch)]
        return sum(sizes[i % len(sizes)] for i in range(steps))

    for images, steps, batch in ((100, 4, 64), (1_236, 600, 128), (128, 3, 128), (50, 7, 16)):
        assert images_trained(images, steps, batch) == slow(images, steps, batch)


def test_flops_count_the_products_of_a_small_shape() -> None:
    shape = Shape(rows=60, dimension=4, classes=3, measured=1)
    n = train_counts(60, 3)
    assert n == [10, 2, 2]
    gram = 3 * 2 * 20 * 4 * 4
    pairs = sum(2 * a * (20 - a) * 4 for a in n)
    angles = 2 * 4 * 3 * (sum(n) + 60)
    assert flops(shape) == gram + pairs + angles


def test_the_process_that_measures_stays_free_of_pytorch():
    code = "import sys, benchmarks.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.slow
def test_a_sweep_gives_the_same_numbers_by_two_processes(tmp_path: Path) -> None:
    ways = dict(list(sweep.WAYS.items())[:2])
    found = sweep.run(Options("tiny"), ways)
    assert found["same_numbers"]
    assert [(way["backbones"], way["trained_twice"], way["lost"]) for way in found["ways"]] == [(1, 0, [])] * 2
    assert all(0 < way["training"] < way["seconds"] for way in found["ways"])


def test_what_ray_costs_is_told_beside_two_processes() -> None:
    names = ("way", "seconds", "training", "beyond", "backbones", "trained_twice", "lost")
    ways = [
        ("one", 110.0, 100.0, 10.0, 2, 0, []),
        ("two", 57.0, 50.0, 7.0, 2, 0, []),
        ("Ray, lost", 60.0, 50.0, 10.0, 2, 0, ["x: lost"]),
    ]
    document = {
        "ways": [dict(zip(names, way, strict=True)) for way in ways], "same_numbers": True, "seeds": 2, "model": "m",
        "size": "full", "created": "2026-01-01T00:00:00", "load_before": 0.1, "seconds": 9,
        "environment": {"versions": {"python": "3"}, "hardware": {"cpu": "c", "threads": 1, "gpu": None}},
    }  # fmt: skip
    shown = sweep.table(document)
    assert "| one | 110 | 100 | 10.0 |  |  |" in shown
    assert "| two | 57.0 | 50.0 | 7.00 |  |  |" in shown
    assert "| Ray, lost | 60.0 | 50.0 | 10.0 | +5.3 % | **missed** |" in shown
    assert "the same to the bit each way; backbones that were trained twice: 0" in shown
    assert "Told: `x: lost`" in shown
