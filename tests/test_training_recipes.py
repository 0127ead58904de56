"""Schedules against written-out formulas and PyTorch's own schedulers; recipes as the paper has them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailscope.errors import UserError
from tailscope.spec import DataSpec, TrainSpec
from tailscope.training import SCHEDULES
from tailscope.training.recipes import RECIPES, Recipe, recipe_by_name


def test_multistep_is_the_papers_staircase():
    """Five epochs of warm-up, divided by 100 at epochs 160 and 180; 97 steps an epoch as on CIFAR-10-LT."""
    expected = []
    for epoch in range(200):
        rate = 1.0
        if epoch < 5:
            rate = [0.2, 0.4, 0.6, 0.8, 1.0][epoch]
        elif 160 <= epoch < 180:
            rate = 0.01
        elif epoch >= 180:
            rate = 0.0001
        expected += [rate] * 97
    assert SCHEDULES.make("multistep", 200 * 97, 97) == pytest.approx(expected, rel=1e-12)


def test_multistep_drops_as_pytorchs_scheduler_does():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 7], gamma=0.1)
    expected = []
    for _ in range(10):
        expected += [scheduler.get_last_lr()[0]] * 3
        optimizer.step()
        scheduler.step()
    ours = SCHEDULES.make("multistep(warmup=0, drops=(4, 7), factor=0.1)", 30, 3)
    assert ours == pytest.approx(expected, rel=1e-12)


@given(st.integers(1, 300), st.integers(1, 50))
def test_cosine_is_pytorchs_annealing(steps, per_epoch):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    ours = SCHEDULES.make("cosine", steps, per_epoch)
    assert len(ours) == steps
    for step, rate in enumerate(ours):
        assert rate == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        assert rate == pytest.approx((1 + math.cos(math.pi * step / steps)) / 2, abs=1e-12)
        optimizer.step()
        scheduler.step()


@given(st.integers(4, 2_000), st.floats(0.05, 0.95), st.floats(0, 1))
def test_onecycle_is_two_straight_lines(steps, peak, start):
    rates = SCHEDULES.make(f"onecycle(peak={peak!r}, start={start!r})", steps, 7)
    at = [step / steps for step in range(steps)]
    expected = [start + (1 - start) * t / peak if t < peak else 1 - (t - peak) / (1 - peak) for t in at]
    assert rates == pytest.approx(expected, abs=1e-9)
    assert rates[0] == pytest.approx(start)
    assert 0 < rates[-1] <= 1
    assert max(rates) <= 1


def test_onecycle_of_the_recipes_peaks_at_a_quarter():
    rates = SCHEDULES.make("onecycle", 400, 10)
    assert rates.index(max(rates)) == 100
    assert max(rates) == 1.0
    assert rates[50] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(1 / 300)


@pytest.mark.parametrize("name", [entry.name for entry in SCHEDULES])
@given(steps=st.integers(1, 500), per_epoch=st.integers(1, 100))
def test_every_schedule_has_a_sane_rate_for_every_step(name, steps, per_epoch):
    rates = SCHEDULES.make(name, steps, per_epoch)
    assert len(rates) == steps
    assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize("peak", [0.0, 1.0, -0.5, 2.0])
def test_a_peak_outside_the_cycle_is_refused(peak):
    with pytest.raises(UserError, match="peak"):
        SCHEDULES.make(f"onecycle(peak={peak})", 10, 1)


def test_an_unknown_schedule_lists_the_known():
    with pytest.raises(UserError, match="known: cosine, multistep, onecycle"):
        SCHEDULES.make("step", 10, 1)


def test_the_papers_recipes_are_section_3():
    paper, printed = RECIPES["paper"], RECIPES["paper-as-printed"]
    stage1 = {
        "epochs": 200,
        "steps": None,
        "batch": 128,
        "learning_rate": 0.1,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 2e-4,
        "schedule": "multistep(warmup=5, drops=(160, 180), factor=0.01)",
        "precision": "auto",
    }
    stage2 = {**stage1, "epochs": 10, "batch": 512, "learning_rate": 0.05, "schedule": "cosine"}
    assert paper.stage1.model_dump() == stage1
    assert printed.stage1.model_dump() == {**stage1, "learning_rate": 0.01}
    for recipe in (paper, printed):
        assert recipe.stage2.model_dump() == stage2
        assert (recipe.model, recipe.views, recipe.converged) == ("resnet32(width=16)", 10, True)
        assert recipe.augment == ("crop(padding=4)", "flip")
        assert recipe.mix == "mixup(alpha=1.0)"
    assert RECIPES["fast"].stage1.steps is not None  # a budget in steps, whatever the data
    assert not RECIPES["fast"].converged
    assert "flip" not in RECIPES["demo"].augment


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_spell_out_every_call_and_survive_json(recipe):
    read = Recipe.model_validate_json(recipe.model_dump_json())
    assert read == recipe
    assert "(" in recipe.model
    assert recipe_by_name(recipe.name) is recipe


def test_a_recipes_short_spelling_means_the_long_one():
    def recipe(**calls):
        stage = TrainSpec(steps=1, batch=8, learning_rate=1, schedule=calls.pop("schedule"))
        return Recipe(name="r", card="", converged=False, stage1=stage, stage2=stage, views=1, **calls)

    short = recipe(model="resnet8", augment=("crop",), autoaugment="autoaugment", mix="mixup", schedule="multistep")
    long = recipe(
        model="resnet8(width=8)",
        augment=("crop(4)",),
        autoaugment="autoaugment(policy='cifar10', exclude=[])",
        mix="mixup(alpha=1)",
        schedule="multistep(drops=[160, 180], factor=1e-2)",
    )
    assert short == long


def test_the_papers_classifiers_may_be_trained_for_longer():
    longer, known = recipe_by_name("paper(stage2_epochs=100)"), RECIPES["paper"]
    assert longer.stage2 == known.stage2.model_copy(update={"epochs": 100})
    assert longer.stage1 == known.stage1
    assert longer.name == "paper(stage2_epochs=100)"
    assert longer.card == f"{known.card} With stage2_epochs=100."
    assert recipe_by_name("paper(stage2_epochs=10)") is known
    with pytest.raises(UserError, match=r"--recipe paper.*greater than"):
        recipe_by_name("paper(stage2_epochs=0)")


def test_the_papers_classifiers_may_start_from_stage_1():
    warm = recipe_by_name("paper(stage2_start='stage1')")
    assert warm.stage2_start == "stage1"
    assert (
        warm.model_copy(update={"name": "paper", "card": RECIPES["paper"].card, "stage2_start": "new"})
        == RECIPES["paper"]
    )
    with pytest.raises(UserError, match=r"--recipe paper.*'new' or 'stage1'"):
        recipe_by_name("paper(stage2_start='warm')")


def test_an_unknown_recipe_lists_the_known():
    with pytest.raises(UserError, match="unknown --recipe 'quick'; known: demo, fast, paper, paper-as-printed"):
        recipe_by_name("quick")


def test_the_papers_classifiers_may_see_the_images_as_they_are():
    data = DataSpec(
        name="d", fingerprint="f", profile="full", protocol="all", subset_seed=0, indices_sha256="s", counts=(1,)
    )
    plain, known = recipe_by_name("paper(stage2_augment=False)"), RECIPES["paper"]
    assert (plain.classifier(data).augment, plain.classifier(data).views) == ((), 1)
    assert plain.classifier(data, autoaugment=True) == known.classifier(data, autoaugment=True)
    assert plain.backbone(data) == known.backbone(data)
