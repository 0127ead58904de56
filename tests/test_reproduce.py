"""`reproduce` on scikit-learn's digits with recipes of a few steps: plan, resume, claims, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import tailscope.cli
from tailscope import device as training_runtime
from tailscope import paper
from tailscope.data.sources import load
from tailscope.device import Runtime
from tailscope.errors import UserError
from tailscope.experiments import runs as results
from tailscope.experiments.stages import Stages
from tailscope.intervals import paired
from tailscope.report import page
from tailscope.reproduce import reproduce as planning
from tailscope.reproduce.reproduce import (
    EXPERIMENTS,
    Rates,
    Reproduction,
    make_plan,
    measure,
    other_work,
    outcomes,
    remembered,
    run_reproduce,
)
from tailscope.store import Store
from tailscope.store.files import CHECKPOINT, save_tensors
from tailscope.training.recipes import RECIPES, Recipe
from test_training_step_graph import Again

BENCHMARK = paper.Benchmark("digits", "exp:20", "nested", tuple(paper.EXPERIMENT))
TINY = Recipe.model_validate(
    RECIPES["demo"].model_dump()
    | {
        "name": "tiny",
        "stage1": {"epochs": 2, "batch": 64, "learning_rate": 0.1, "precision": "fp32"},
        "stage2": {"steps": 20, "batch": 64, "learning_rate": 0.1, "precision": "fp32"},
        "views": 1,
    }
)
# What a process of its own needs to know this file's recipe and data set.
CHILD = f"""
from pathlib import Path
from tailscope import paper
from tailscope.reproduce.reproduce import Reproduction, run_reproduce
from tailscope.training.recipes import RECIPES, Recipe
RECIPES["tiny"] = Recipe.model_validate_json({TINY.model_dump_json()!r})
paper.BENCHMARKS["digits-lt"] = paper.Benchmark("digits", "exp:20", "nested", tuple(paper.EXPERIMENT))
"""
SLEEP_AFTER_A_CHECKPOINT = """
import time
from tailscope.training import loop
save = loop.save_tensors
loop.save_tensors = lambda *checkpoint: (save(*checkpoint), time.sleep(600))
"""


@pytest.fixture(autouse=True, scope="module")
def _known():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "tiny", TINY)
        patch.setitem(paper.BENCHMARKS, "digits-lt", BENCHMARK)
        patch.setattr("tailscope.reproduce.reproduce.SECONDS", 0.05)
        yield


def reproduction_of(out, what="table1", **options):
    return Reproduction(what, "digits-lt", out, **{"seeds": "1", "recipe": "tiny", **options})


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished Table 1: its folder, what was told, what was returned."""
    out, told = tmp_path_factory.mktemp("finished"), []
    return out, told, run_reproduce(reproduction_of(out), tell=told.append)


def test_the_plan_is_told_before_the_work_and_results_are_written(finished):
    out, told, done = finished
    text = "\n".join(told)
    assert "seeds 0, subset seed 0; recipe tiny: shortened, NOT a reproduction" in text
    assert "backbone lt: to train" in text
    assert "classifiers: 4 to fit, 0 stored" in text
    assert "estimated time here" in text
    assert set(done["results"]) == {"swap"}
    assert {path.suffix for path in (out / "tables").glob("paper-table1.*")} == {".csv", ".md", ".tex"}
    stored = json.loads((out / "claims.json").read_text())
    assert stored["claims"] == done["claims"]
    assert {claim["ci95_kind"] for claim in stored["claims"]} == {"item"}
    for claim in stored["claims"]:
        low, high = claim["ci95"]
        assert claim["verdict"] == ("holds" if low > 0 else "fails" if high < 0 else "undecided")


def test_a_second_run_trains_nothing(finished):
    out, _, done = finished
    told = []
    again = run_reproduce(reproduction_of(out, "fig2"), tell=told.append)
    assert "  nothing to train: every stage is stored" in told
    assert "estimated time" not in "\n".join(told)
    assert again["results"]["swap"]["cells"] == done["results"]["swap"]["cells"]


def test_the_plan_counts_exactly_what_the_experiments_train(tmp_path, digits):
    settings = reproduction_of(tmp_path).settings().model_copy(update={"permutations": 0})
    lab = Stages(digits, Store(tmp_path), Runtime.choose("cpu"))
    everything = list(EXPERIMENTS)
    before = make_plan(lab, settings, everything)
    assert [b.encoder for b in before.backbones] == ["lt", "true", "lt+mixup", "lt+autoaugment", "lt+autoaugment+mixup"]
    assert (before.classifiers, before.classifiers_stored) == (4 + 12 - 1, 0)  # the bound of `none` is lt->true
    assert before.backbones[0].images == 2 * sum(lab.long_tailed("exp:20", "nested", 0).spec.counts)
    results = {name: experiment(lab, settings) for name, experiment in EXPERIMENTS.items()}
    assert lab.trained == 5 + 15
    after = make_plan(lab, settings, everything)
    assert after.complete
    assert (after.views, after.to_train) == (0, [])
    recalled = outcomes(lab, settings, "ladder")
    for name, rungs in results["ladder"]["augmentations"].items():
        for rung, cell in rungs.items():
            assert recalled[f"{name}: {rung}"].mean(1).tolist() == cell["accuracy"]
    right = outcomes(lab, settings, "swap")
    difference = paired(right["true->lt"].astype(float) - right["lt->true"])
    parts = results["swap"]["attribution"]
    expected = parts["representation"]["points"] - parts["classifier"]["points"]
    assert difference.estimate == pytest.approx(expected)


def test_the_plan_counts_the_short_batch_at_the_end_of_an_epoch(tmp_path, digits):
    settings = reproduction_of(tmp_path).settings()
    stage1 = settings.recipe.stage1.model_copy(update={"epochs": None, "steps": 50})
    settings = settings.model_copy(update={"recipe": settings.recipe.model_copy(update={"stage1": stage1})})
    lab = Stages(digits, Store(tmp_path), Runtime.choose("cpu"))
    for backbone in make_plan(lab, settings, ["swap"]).backbones:
        rows = lab.long_tailed("exp:20", "nested", 0).rows if backbone.encoder == "lt" else lab.true().rows
        batches = [min(64, len(rows) - start) for start in range(0, len(rows), 64)]
        assert batches[-1] < 64
        assert len(batches) < 50
        assert backbone.images == sum((batches * 50)[:50])


def test_time_is_what_the_rates_say(tmp_path, digits):
    settings = reproduction_of(tmp_path).settings()
    lab = Stages(digits, Store(tmp_path), Runtime.choose("cpu"))
    plan = make_plan(lab, settings, ["swap"])
    augment = plan.backbones[0].augment
    rates = Rates(training={augment: 3.0}, view=10.0, clean=100.0)
    images = sum(b.images for b in plan.backbones)
    assert plan.views == 2 * len(digits.train)  # one view of D* a backbone, shared by its classifiers
    assert plan.clean == 2 * len(digits.test)
    assert rates.estimate(plan) == 3 * images + 10 * plan.views + 100 * plan.clean
    measured = measure(lab, settings.recipe, plan, seconds=0.1)
    assert min(measured.view, measured.clean, *measured.training.values()) > 0
    assert not measured.remembered


def test_an_estimate_prefers_the_rate_of_a_stored_training_like_the_plans(finished, digits):
    """lt of seed 0 was trained a moment ago: seed 1's takes as long, whatever a measurement beside other work says."""
    settings = reproduction_of(finished[0], seeds="0,1").settings()
    lab = Stages(digits, Store(finished[0] / "store"), Runtime.choose("cpu"))
    plan = make_plan(lab, settings, ["swap", "ladder"])
    augment = plan.backbones[0].augment
    metas = [lab.store.meta("stage1", b.key) for b in make_plan(lab, settings, ["swap"]).backbones if b.stored]
    rates = measure(lab, settings.recipe, plan, seconds=0.1)
    assert len(metas) == 2
    expected = sum(1 / meta["images_per_second"] for meta in metas) / 2  # the median of two
    assert rates.remembered == {augment}
    assert rates.training[augment] == pytest.approx(expected)
    known = sum(b.images for b in plan.to_train if b.augment == augment)
    unknown = {b.augment for b in plan.to_train} - {augment}
    assert rates.training.keys() == unknown | {augment}
    assert unknown
    alone = Rates(rates.training | dict.fromkeys(unknown, 0.0), 0.0, 0.0)
    assert alone.estimate(plan) == pytest.approx(known * expected)
    assert "remembers" in rates.sources(plan)
    assert "else measured on single steps" in rates.sources(plan)
    # Nothing is remembered of another network, batch, precision, device, thread or engine.
    other = settings.recipe.model_copy(update={"model": "resnet8(width=4)"})
    assert remembered(lab, other, plan) == {}
    compiled = Stages(digits, lab.store, replace(lab.runtime, engine="compiled"))
    assert remembered(compiled, settings.recipe, plan) == {}


def test_where_steps_are_captured_a_rate_is_that_of_replays(tmp_path, monkeypatch, digits):
    """As in the trainings that are planned."""
    settings, captures, timed = reproduction_of(tmp_path).settings(), [], []
    lab = Stages(digits, Store(tmp_path), Runtime.choose("cpu"))

    @contextmanager
    def standing_in(device):
        captures.append(Again())
        yield captures[-1]
        captures.append("ended")

    def seconds_each(work, images, seconds):
        before = captures[0].recorded, captures[0].replayed
        work()
        timed.append((before, captures[0].replayed))
        return 1.0

    monkeypatch.setattr(planning, "capturing", standing_in)
    monkeypatch.setattr(planning, "_seconds_each", seconds_each)
    assert planning._step(lab, settings.recipe, lab.runtime, 0.1) == 1.0
    assert timed == [((1, 2), 3)]
    assert captures[1:] == ["ended"]


def test_a_single_slow_step_is_no_rate(monkeypatch):
    """The first of all may build kernels, and any may wait for another process: neither decides."""
    now, took = [0.0], iter([900.0, 0.1, 0.1, 60.0, 0.1, 0.1])
    monkeypatch.setattr(planning.time, "monotonic", lambda: now[0])
    rate = planning._seconds_each(lambda: now.__setitem__(0, now[0] + next(took)), 10, 0.05)
    assert rate == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("load", "cores", "told"), [(0.3, 2, False), (7.4, 2, True), (2.0, 64, False), (30.0, 64, True)]
)
def test_an_estimate_says_that_others_work_here(monkeypatch, tmp_path, load, cores, told):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert (f"load {load:.1f} on {cores} cores" in other_work()) == told
    said = []
    run_reproduce(reproduction_of(tmp_path, plan=True), tell=said.append)
    line = next(line for line in said if "estimated time here" in line)
    assert ("other work is running here" in line) == told
    assert "measured on single steps" in line


def test_the_plan_knows_what_a_killed_run_has_saved(tmp_path, digits, caplog):
    settings = reproduction_of(tmp_path).settings()
    lab = Stages(digits, Store(tmp_path), Runtime.choose("cpu"))
    fresh = make_plan(lab, settings, ["swap"]).backbones[0]
    scratch = tmp_path / "scratch" / f"stage1-{fresh.key}"
    scratch.mkdir(parents=True)
    save_tensors(scratch / CHECKPOINT, {}, {"epochs": 1, "losses": [1.0], "seconds": 1.0})
    plan = make_plan(lab, settings, ["swap"])
    goes_on, other = plan.backbones
    assert goes_on.describe() == f"{fresh.describe()}; goes on after epoch 1"
    assert "goes on" not in other.describe()
    assert (goes_on.images_left, other.images_left) == (fresh.images // 2, other.images)  # one of two epochs
    rates = Rates(training={fresh.augment: 1.0}, view=0.0, clean=0.0)
    assert rates.estimate(plan) == fresh.images // 2 + other.images
    (scratch / CHECKPOINT).write_bytes(b"torn")
    assert make_plan(lab, settings, ["swap"]).backbones == (fresh, other)
    assert "damaged" in caplog.text
    assert "training starts again" in caplog.text


def test_only_the_plan_trains_nothing(tmp_path):
    done = run_reproduce(reproduction_of(tmp_path, "all", plan=True), tell=lambda text: None)
    assert len(done["plan"]["backbones"]) == 5
    assert done["estimated_seconds"] > 0
    assert not (tmp_path / "store" / "stage1").exists()
    assert not (tmp_path / "claims.json").exists()


def test_a_killed_run_started_again_gives_the_same_numbers(finished, tmp_path):
    killed, (_, _, uninterrupted) = tmp_path / "killed", finished
    call = f"run_reproduce(Reproduction('table1', 'digits-lt', Path({str(killed)!r}), seeds='1', recipe='tiny'))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD + SLEEP_AFTER_A_CHECKPOINT + call], env=environment, stdout=subprocess.DEVNULL
    )
    checkpoints = "store/scratch/stage1-*/checkpoint.safetensors"
    try:
        while not list(killed.glob(checkpoints)):
            assert process.poll() is None, "ended before its first checkpoint"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "swap.json").exists()
    resumed = run_reproduce(reproduction_of(killed), tell=lambda text: None)
    assert resumed["results"]["swap"]["cells"] == uninterrupted["results"]["swap"]["cells"]
    assert resumed["claims"] == uninterrupted["claims"]
    assert not list(killed.glob(checkpoints))  # it was this backbone that went on


def test_stages_of_two_processors_are_not_pooled_without_a_word(tmp_path, digits, monkeypatch):
    settings = reproduction_of(tmp_path).settings()
    store = Store(tmp_path / "store")

    def run(seeds, processor, **changes):
        monkeypatch.setattr(training_runtime, "cpu_name", lambda: processor)
        lab = Stages(digits, store, Runtime.choose("cpu", **changes))
        result = EXPERIMENTS["swap"](lab, settings.model_copy(update={"seeds": seeds}))
        cards = page._provenance("swap", result)
        return [w for w in result["warnings"] if "arithmetic" in w], result["provenance"], cards

    alone, rows, cards = run((0,), "processor A")
    assert alone == []
    assert rows[0]["arithmetic"] | {"engine": ""} == {
        "processor": "processor A", "engine": "", "precision": "float32", "torch": torch.__version__,
    }  # fmt: skip
    assert {row["row"] for row in rows if row["stage2_arithmetic"] is None} == {"lt stage1", "true stage1"}
    assert "arithmetic differs" not in cards["cards"][0]["summary"]
    again, recalled, _ = run((0,), "processor B")
    assert (again, recalled) == ([], rows)  # what counts is what trained, not what recalls
    pooled, _, cards = run((0, 1), "processor B")
    assert [w.split(" ")[0] for w in pooled] == ["backbones", "classifiers"]
    assert all("(processor: 'processor A' of seed 0, 'processor B' of seed 1)" in w for w in pooled)
    assert all(card["summary"].endswith("arithmetic differs between seeds") for card in cards["cards"])
    told = dict(cards["facts"])["arithmetic of backbones"]
    assert told.startswith("differs between rows or seeds: processor A, ")


def test_what_a_stage_from_before_does_not_say_differs_from_nothing():
    device = {"cpu": "A", "cores": 2, "threads": 2, "gpu": None}
    old = {"device": device, "compiled": True, "precision": "bfloat16"}
    known = {"processor": "A", "engine": "compiled", "precision": "bfloat16", "torch": None}
    assert training_runtime.arithmetic_of(old) == known
    assert training_runtime.arithmetic_of(old | {"compiled": False, "fused": True})["engine"] == "fused"
    assert training_runtime.arithmetic_of(old | {"device": device | {"gpu": "G"}})["processor"] == "G"
    assert set(training_runtime.arithmetic_of({"spec": {}}).values()) == {None}  # a classifier
    cards = [{"seed": 0, "arithmetic": known}, {"seed": 1, "arithmetic": known | {"torch": "2.11.0"}}]
    assert results.differing_arithmetic(cards) == []
    cards.append({"seed": 2, "arithmetic": known | {"torch": "2.14.1"}})
    assert "torch: '2.11.0' of seed 1, '2.14.1' of seed 2" in results.differing_arithmetic(cards)[0]


@pytest.mark.parametrize(
    ("reproduction", "message"),
    [
        (
            Reproduction("table2", "cifar10-lt", None),
            "unknown table or figure 'table2'; did you mean 'table1'? known: table1, fig2",
        ),
        (Reproduction("table1", "places-lt", None), "unknown --dataset 'places-lt'"),
        (Reproduction("table1", "imagenet-lt", None), "--dataset imagenet-lt: give all of ImageNet with --data list:"),
        (Reproduction("table1", "imagenet-lt", None, data="digits"), "imagenet-lt is read from image files"),
        (Reproduction("fig3", "imagenet-lt", None, data="list:a,b"), "the paper has no such figure for it"),
        (Reproduction("table1", "cifar10-lt", None, data="list:a,b"), "--data list:a,b: only imagenet-lt takes it"),
        (Reproduction("fig3", "cifar100-lt", None), "`tailscope ladder --data cifar100` runs the experiment"),
        (Reproduction("table1", "cifar10-lt", None, quick=True, recipe="paper"), "--quick means --recipe fast"),
        (Reproduction("table1", "cifar10-lt", None, recipe="papper"), "unknown --recipe 'papper'"),
        (Reproduction("table1", "cifar10-lt", None, seeds="0"), "--seeds 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(reproduction, message):
    with pytest.raises(UserError) as error:
        run_reproduce(reproduction)
    assert message in str(error.value)


def test_claims_that_cannot_be_read_are_replaced(finished):
    path = finished[0] / "claims.json"
    whole = json.loads(path.read_text())
    path.write_text('{"schema": "tailscope.claims/0"}')
    run_reproduce(reproduction_of(finished[0]), tell=lambda text: None)
    assert json.loads(path.read_text())["claims"] == whole["claims"]


def test_results_of_another_spec_are_kept_and_left_out(finished):
    out = finished[0]
    with pytest.raises(UserError, match="another spec"):
        run_reproduce(reproduction_of(out, seeds="2"), tell=lambda text: None)
    other = json.loads((out / "swap.json").read_text())
    rungs = dict.fromkeys(("stage1", "stage2", "stage2_aa", "bound"), other["cells"]["lt->lt"])
    other |= {"schema": "tailscope.ladder/1", "augmentations": {"none": rungs}, "spec": {"recipe": "other"}}
    (out / "ladder.json").write_text(json.dumps(other))
    done = run_reproduce(reproduction_of(out), tell=lambda text: None)
    assert set(done["results"]) == {"swap"}
    assert json.loads((out / "ladder.json").read_text()) == other
    (out / "ladder.json").unlink()


def test_quick_is_the_recipe_fast_and_the_default_the_papers():
    assert Reproduction("table1", "cifar10-lt", None, quick=True).settings().recipe.name == "fast"
    settings = Reproduction("table1", "cifar10-lt", None).settings()
    assert (settings.recipe.name, settings.subset_seed, settings.protocol) == ("paper", 0, "ldam")
    assert settings.seeds == (0, 1, 2)


def test_the_verb_prints_json_and_help_loads_no_torch(finished, monkeypatch):
    monkeypatch.setattr("tailscope.report.build", lambda out: out / "report.html")
    options = [
        "reproduce",
        "table1",
        "--dataset",
        "digits-lt",
        "--recipe",
        "tiny",
        "--seeds",
        "1",
        "--out",
        str(finished[0]),
    ]
    result = CliRunner().invoke(tailscope.cli.app, [*options, "--json"], catch_exceptions=False)
    done = json.loads(result.stdout)
    assert done["label"].endswith("NOT a reproduction")
    assert len(done["claims"]) == 3
    shown = CliRunner().invoke(tailscope.cli.app, options, catch_exceptions=False).stdout
    assert "true→lt" in shown
    assert "undecided; recipe tiny" in shown
    quick = "import sys, tailscope.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", quick], check=True)
