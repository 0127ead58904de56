"""Pre-training without labels: what it shows, what it does not see, and how stage 1 goes on from it."""

import shutil

import numpy as np
import pytest
import torch

import experiment_setups
from tailscope.data.images import ImageSet
from tailscope.errors import UserError
from tailscope.experiments import compare
from tailscope.experiments.compare import CompareSettings
from tailscope.experiments.runs import training_sets
from tailscope.experiments.stages import pretraining
from tailscope.methods import TASKS
from tailscope.spec import TrainSpec, backbone_key
from tailscope.store import Store
from tailscope.training import SCHEDULES
from tailscope.training.loop import Training, new_model
from tailscope.training.step import Normalizer
from training_setups import CPU, digits


def settings(methods, **changes):
    values = dict(experiment_setups.settings(seeds=(0,)))
    return CompareSettings.model_validate({**values, "methods": methods, **changes})


def pretrained(lab, **changes):
    """Return stage 1 on D_LT with pre-training, and D_LT."""
    lt = training_sets(lab, settings("ce; ssp"), 0)["lt"]
    stage = experiment_setups.TINY.backbone(lt.spec).model_copy(update={"pretrain": "rotation(length=1.0)", **changes})
    return stage, lt


def test_images_are_turned_by_what_is_asked_and_every_turn_comes_equally_often():
    images = torch.randint(256, (4000, 5, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shown, turns = TASKS.make("rotation")(images, torch.Generator().manual_seed(1))
    for image, before, turn in zip(shown[:50].numpy(), images[:50].numpy(), turns[:50].tolist(), strict=True):
        assert np.array_equal(image, np.rot90(before, turn))
    expected = 1000
    assert sum((int(n) - expected) ** 2 / expected for n in torch.bincount(turns)) < 16.3, "chi-squared, p = 0.001"


@pytest.mark.parametrize(
    ("call", "images", "said"), [("rotation(length=0)", None, "length"), ("rotation", (2, 8, 6, 1), "8 x 6 pixels")]
)
def test_what_cannot_be_turned_is_one_true_line(call, images, said):
    with pytest.raises(UserError, match=said):
        TASKS.make(call)(torch.zeros(images, dtype=torch.uint8), torch.Generator())


def test_pre_training_sees_no_labels(tmp_path):
    stage = pretraining(pretrained(experiment_setups.lab(tmp_path))[0])
    images, shuffled = digits(), torch.Generator().manual_seed(0)
    others = ImageSet(images.images, images.labels[torch.randperm(300, generator=shuffled)], images.class_names)
    found = [Training(stage, one, Normalizer.of(images.images), 0, CPU, None, "").run()[0] for one in (images, others)]
    assert found[0]["classifier.weight"].shape[0] == 4
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_rotations_are_learnt(tmp_path):
    """Four answers on digits: the loss falls well below log 4 = 1.386, which is what guessing gives."""
    stage = pretraining(pretrained(experiment_setups.lab(tmp_path))[0])
    stage = stage.model_copy(update={"train": stage.train.model_copy(update={"steps": 100})})
    losses = Training(stage, digits(), Normalizer.of(digits().images), 0, CPU, None, "").run()[1]["losses"]
    assert losses[0] > 1.1
    assert losses[-1] < 0.9


def test_stage_1_starts_from_what_was_pre_trained_with_a_new_classifier(tmp_path, monkeypatch):
    lab = experiment_setups.lab(tmp_path)
    stage, lt = pretrained(lab)
    started = []
    stepper = Training.stepper

    def watched(self, capture=None):
        made = stepper(self, capture)
        started.append((self.spec, {name: t.clone() for name, t in made.model.state_dict().items()}))
        return made

    monkeypatch.setattr(Training, "stepper", watched)
    backbone = lab.backbone(stage, lt.rows, 0, "")
    assert started[0][0] == pretraining(stage)
    stored = lab.store.read("pretrained", backbone_key(pretraining(stage), 0)).tensors
    begun = started[-1][1]
    fresh = new_model(stage.model, 1, 10, 0)
    for name, tensor in begun.items():
        expected = fresh.state_dict()[name] if name.startswith("classifier.") else stored[name]
        assert torch.equal(tensor, expected), name
    assert backbone.meta["pretrained"] == backbone_key(pretraining(stage), 0)
    assert backbone.meta["pretraining_seconds"] > 0


def test_the_key_of_a_backbone_depends_on_its_pre_training_and_others_stay_as_they_are(tmp_path):
    stage = pretrained(experiment_setups.lab(tmp_path))[0]
    plain = stage.model_copy(update={"pretrain": None})
    longer = stage.model_copy(update={"pretrain": "rotation(length=2.0)"})
    assert len({backbone_key(one, 0) for one in (stage, plain, longer)}) == 3
    assert {"pretrain", "task"} & {*plain.content()} == set()
    firsts = [pretraining(one) for one in (stage, stage.model_copy(update={"loss": "focal(gamma=2.0)"}), longer)]
    assert backbone_key(firsts[0], 0) == backbone_key(firsts[1], 0), "what follows does not matter"
    assert backbone_key(firsts[0], 0) != backbone_key(firsts[2], 0)
    assert [one.train.steps for one in firsts] == [12, 12, 24]


def test_an_interrupted_pre_training_goes_on_and_several_methods_share_it(tmp_path):
    methods = "ce; ssp; ssp + balanced_softmax"
    whole = experiment_setups.lab(tmp_path / "whole")
    expected = compare.compare(whole, settings(methods, gaps="none"))
    assert experiment_setups.entries(whole.store, "pretrained") == 1
    assert experiment_setups.entries(whole.store, "stage1") == 3
    assert {card["steps"] for card in expected["provenance"]} == {12}

    chosen = settings(methods, gaps="none")
    again, found = experiment_setups.gone_on(
        tmp_path / "broken", lambda lab: compare.compare(lab, chosen), lambda spec: spec.pretrain
    )
    assert again.trained == 2, "pre-training and the first backbone were stored"
    plainly = experiment_setups.compared_plainly
    assert plainly(found) == plainly(expected)


def test_the_plan_has_the_pre_training(tmp_path):
    lab = experiment_setups.lab(tmp_path)
    plan = compare.plan(lab, settings("ce; ssp; pretrain:rotation(length=0.5) + la", gaps="none"))
    assert plan["to_train"] == {"backbone": 5, "classifier": 0}
    compare.compare(lab, settings("ce; ssp; pretrain:rotation(length=0.5) + la", gaps="none"))
    assert lab.trained == 5


def test_a_stored_backbone_needs_no_pre_training(tmp_path):
    lab, chosen = experiment_setups.lab(tmp_path), settings("ce; ssp + crt", gaps="none")
    expected = compare.compare(lab, chosen)
    shutil.rmtree(tmp_path / "pretrained")
    again = experiment_setups.lab(tmp_path)
    plan = compare.plan(again, chosen)
    assert plan["to_train"] == {"backbone": 0, "classifier": 0}
    assert all(row["stored"] for row in plan["plan"])
    found = compare.compare(again, chosen)
    assert again.trained == 0
    assert experiment_setups.compared_plainly(found) == experiment_setups.compared_plainly(expected)


def test_what_is_carried_home_is_not_trained_again(tailscope_, tmp_path):
    command = ("compare", "--data", "digits", "--methods", "ce; ssp + crt", "--recipe", "miniature", "--seeds", 1)
    assert tailscope_(*command, "--gaps", "none", "--store", tmp_path / "cluster").code == 0
    archive = tmp_path / "stages.tar"
    assert tailscope_("store", "pack", "--store", tmp_path / "cluster", "--out", archive).code == 0
    assert tailscope_("store", "add", archive, "--store", tmp_path / "home").code == 0
    shown = tailscope_(*command, "--gaps", "none", "--store", tmp_path / "home")
    assert shown.code == 0
    assert "Nothing was trained: all" in shown.out
    kinds = ("pretrained", "stage1", "stage2")
    home, cluster = (Store(tmp_path / name) for name in ("home", "cluster"))
    assert [home.keys(kind) for kind in kinds] == [cluster.keys(kind) for kind in kinds]


def test_a_longer_pre_training_stretches_its_schedule(tmp_path):
    stage, _ = pretrained(experiment_setups.lab(tmp_path))
    train = TrainSpec(epochs=200, batch=128, learning_rate=0.1, schedule="multistep(warmup=5, drops=(160, 180))")
    rates = {}
    for length in (0.5, 1.0, 2.0):
        first = pretraining(stage.model_copy(update={"pretrain": f"rotation(length={length})", "train": train}))
        rates[length] = SCHEDULES.make(first.train.schedule, first.train.epochs, 1)
        if length == 1:
            assert first.train == train
    for e in range(20, 200):
        assert rates[2.0][2 * e] == rates[2.0][2 * e + 1] == rates[1.0][e] == rates[0.5][e // 2]
