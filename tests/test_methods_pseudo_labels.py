"""Pseudo-labelling: which labels images without labels get, what is never read, and what is stored under what."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import experiment_setups
from tailscope.data.sources import ImageData
from tailscope.device import Solo
from tailscope.errors import UserError
from tailscope.experiments import compare
from tailscope.experiments.compare import CompareSettings
from tailscope.experiments.runs import training_sets
from tailscope.experiments.stages import Stages, labeller
from tailscope.methods import SYSTEMS
from tailscope.methods.mixing import Mix
from tailscope.spec import backbone_key
from tailscope.training import loop
from tailscope.training.loop import Training
from tailscope.training.objective import Objective
from training_setups import CPU, assert_same_state, digits, stage1_spec


def settings(methods, **changes):
    values = dict(experiment_setups.settings(seeds=(0,)))
    return CompareSettings.model_validate({**values, "methods": methods, **changes})


def stage_of(lab, omega=1.0, **changes):
    """Return a stage on D_LT that sees all other images too, and D_LT."""
    lt = training_sets(lab, settings("ce; pseudo_labels"), 0)["lt"]
    return experiment_setups.TINY.backbone(lt.spec).model_copy(update={"unlabelled": omega, **changes}), lt


def test_the_labels_of_unlabelled_images_are_never_read(tmp_path):
    """Permuted, whatever they are, the second network is the same to the bit."""
    data = experiment_setups.small_digits()
    lab = experiment_setups.lab(tmp_path / "true")
    stage, lt = stage_of(lab)
    others = torch.from_numpy(np.setdiff1d(np.arange(500), lt.rows))
    labels = data.train.labels.clone()
    labels[others] = labels[others][torch.randperm(len(others), generator=torch.Generator().manual_seed(0))]
    assert (labels != data.train.labels).sum() > 200
    permuted = ImageData(data.name, replace(data.train, labels=labels), data.test)
    found = [one.backbone(stage, lt.rows, 0, "") for one in (lab, experiment_setups.lab(tmp_path / "other", permuted))]
    assert_same_state(*(backbone.model.state_dict() for backbone in found))


def test_an_image_gets_the_class_that_the_first_network_predicts_and_keeps_its_own_label_if_it_has_one(
    tmp_path, monkeypatch
):
    lab, trained, run = experiment_setups.lab(tmp_path), [], Training.run
    monkeypatch.setattr(Training, "run", lambda self: (trained.append(self), run(self))[1])
    stage, lt = stage_of(lab)
    backbone = lab.backbone(stage, lt.rows, 0, "")
    first, second = trained
    assert (first.spec, second.spec) == (labeller(stage), stage)
    assert first.spec == settings("ce; crt").recipe.backbone(lt.spec), "the backbone that `ce` has too"
    stored = lab.store.read("stage1", backbone_key(first.spec, 0)).tensors
    others = np.setdiff1d(np.arange(500), lt.rows)
    features = lab.clean_features(lab.backbone(first.spec, lt.rows, 0, ""), "train", others).double().numpy()
    logits = features @ stored["classifier.weight"].double().numpy().T + stored["classifier.bias"].double().numpy()
    n = len(lt.rows)
    assert torch.equal(second.data.labels[:n], lab.data.train.labels[lt.rows])
    assert second.data.labels[n:].tolist() == logits.argmax(1).tolist()
    assert torch.equal(second.data.images, lab.data.train.images[np.concatenate([lt.rows, others])])
    assert backbone.meta["labeller"] == backbone_key(first.spec, 0)
    assert backbone.meta["unlabelled_images"] == 500 - n
    assert backbone.meta["labeller_seconds"] > 0


def test_the_key_depends_on_all_that_the_labeller_depends_on_and_others_stay_as_they_are(tmp_path):
    stage, _ = stage_of(experiment_setups.lab(tmp_path))
    other = stage.model_copy(update={"loss": "focal(gamma=2.0)"})
    keys = {backbone_key(one, 0) for one in (stage, other, stage.model_copy(update={"unlabelled": 0.5}))}
    assert len({*keys, backbone_key(labeller(stage), 0), backbone_key(labeller(other), 0)}) == 5
    assert "unlabelled" not in labeller(stage).content()


def batches_of(spec, images, steps, epoch=0):
    mixing = loop.mixing_of(spec, images.counts(), None)
    drawing = loop._Batches(spec, images, mixing, 0, CPU.device, Solo(), None).epoch(epoch, steps, 0.0)
    return [next(parts) for _, parts in drawing]


def test_all_images_are_drawn_equally_often_in_epochs_as_long_as_without_them():
    images = digits(300)
    own = images.take(range(100))
    spec = stage1_spec(own, batch=50, unlabelled=1.0, augment=())
    seen = [batch for epoch in range(90) for batch in batches_of(spec, images, 2, epoch)]
    assert {len(batch.labels) for batch in seen} == {50}
    assert all(batch.weights is None for batch in seen)
    pixels = torch.cat([batch.images for batch in seen]).flatten(1)
    drawn = (pixels[:, None] == images.images.flatten(1)).all(2).sum(0)
    assert drawn.sum() == 9000
    distinct = images.images.flatten(1).unique(dim=0)
    assert len(distinct) == 300
    share = float(drawn[:100].sum() / drawn.sum())
    assert share == pytest.approx(1 / 3, abs=0.02)
    assert ((drawn - 30.0) ** 2 / 30 * 1.5).sum() < 380, "chi-squared of 299 degrees: without replacement less"


def test_the_loss_of_an_image_without_a_label_weighs_omega():
    images = digits(120)
    spec = stage1_spec(images.take(range(40)), batch=20, unlabelled=0.25, augment=())
    for batch in batches_of(spec, images, 2):
        where = (batch.images[:, None] == images.images).flatten(2).all(2).float().argmax(1)
        assert batch.weights.tolist() == [1.0 if row < 40 else 0.25 for row in where.tolist()]


def test_weighted_losses_are_a_loop_mixed_and_unmixed():
    images, stream = digits(16), torch.Generator().manual_seed(0)
    objective = Objective(stage1_spec(images, unlabelled=0.5), images.counts(), 4, 0, CPU.device)
    logits, y = torch.randn(16, 10, generator=stream), images.labels
    weights, partner = torch.rand(16, generator=stream), torch.randperm(16, generator=stream)
    each = [float(cross_entropy(z, label)) for z, label in zip(logits, y, strict=True)]
    found = objective(logits, torch.zeros(16, 4), y, weights=weights)
    assert float(found) == pytest.approx(np.mean([float(w) * loss for w, loss in zip(weights, each, strict=True)]))
    found = objective(logits, torch.zeros(16, 4), y, Mix(labels=torch.tensor([0.3]), partner=partner), weights)
    expected = [
        0.3 * float(weights[i]) * each[i] + 0.7 * float(weights[j]) * float(cross_entropy(logits[i], y[j]))
        for i, j in enumerate(partner.tolist())
    ]
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-5)


def test_logits_are_adjusted_by_the_prior_that_the_second_network_was_trained_on(tmp_path):
    lab = experiment_setups.lab(tmp_path)
    result = compare.compare(lab, settings("ce; pseudo_labels + la; pseudo_labels + crt", gaps="none"))
    stage, lt = stage_of(lab)
    backbone = lab.backbone(stage, lt.rows, 0, "")
    stored = lab.store.read("stage1", backbone_key(stage, 0)).tensors
    seen = np.concatenate([lab.data.train.labels[lt.rows].numpy(), stored["predicted"].numpy()])
    assert len(seen) == 500
    features = lab.clean_features(backbone, "test").double().numpy()
    logits = features @ stored["classifier.weight"].double().numpy().T + stored["classifier.bias"].double().numpy()
    right = (logits - np.log(np.bincount(seen) / 500)).argmax(1) == lab.data.test.labels.numpy()
    assert result["methods"][1]["mean"] == pytest.approx(right.mean())
    assert result["provenance"][2]["stage2_counts"] == list(lt.spec.counts)


def test_the_second_network_takes_as_many_steps_as_any_other(tmp_path):
    stage, lt = stage_of(experiment_setups.lab(tmp_path))
    for train in ({"steps": 7}, {"epochs": 2, "steps": None}):
        changed = stage.model_copy(update={"train": stage.train.model_copy(update=train)})
        images = experiment_setups.small_digits().train
        normalize = Stages(experiment_setups.small_digits(), experiment_setups.lab(tmp_path).store, CPU).normalize
        meta = Training(changed, images, normalize, 0, CPU, None, "").run()[1]
        assert meta["steps"] == changed.train.lengths(len(lt.rows))[1]


def test_an_interrupted_comparison_goes_on_and_shares_the_first_network(tmp_path):
    methods = "ce; pseudo_labels; pseudo_labels(omega=0.5); pseudo_labels + la"
    whole = experiment_setups.lab(tmp_path / "whole")
    expected = compare.compare(whole, settings(methods, gaps="none"))
    assert experiment_setups.entries(whole.store, "stage1") == 3
    assert {card["steps"] for card in expected["provenance"]} == {12}
    chosen = settings(methods, gaps="none")
    again, found = experiment_setups.gone_on(
        tmp_path / "broken", lambda lab: compare.compare(lab, chosen), lambda spec: spec.unlabelled
    )
    assert again.trained == 2
    plainly = experiment_setups.compared_plainly
    assert plainly(found) == plainly(expected)


def test_a_stored_second_network_needs_no_first_one(tmp_path):
    lab = experiment_setups.lab(tmp_path)
    stage, lt = stage_of(lab)
    made = lab.backbone(stage, lt.rows, 0, "")
    shutil.rmtree(lab.store.entry("stage1", made.meta["labeller"]))
    again = experiment_setups.lab(tmp_path)
    assert again.beneath(stage, 0) == []
    found = again.backbone(stage, lt.rows, 0, "")
    assert again.trained == 0
    assert torch.equal(found.predicted, made.predicted)


def test_the_result_says_which_methods_saw_more_images_and_the_plan_has_the_first_network(tmp_path):
    lab = experiment_setups.lab(tmp_path)
    methods = "loss:label_smoothing; pseudo_labels; bbn"
    plan = compare.plan(lab, settings(methods, gaps="none"))
    assert plan["to_train"] == {"backbone": 4, "classifier": 0}
    result = compare.compare(lab, settings(methods, gaps="none"))
    others = 500 - sum(result["counts"])
    told = [warning for warning in result["warnings"] if "without their labels" in warning]
    assert len(told) == 1
    assert told[0].startswith(f"pseudo_labels sees {others} training images without their labels")
    assert [one["stage1"].get("unlabelled") for one in result["methods"]] == [None, 1.0, None]
    assert compare.plan(lab, settings(methods, gaps="none"))["to_train"] == {"backbone": 0, "classifier": 0}


def test_what_cannot_be_labelled_or_chosen_fairly_is_refused_before_any_training(tmp_path):
    lab = experiment_setups.lab(tmp_path)
    with pytest.raises(UserError, match="--profile full leaves no training images"):
        compare.compare(lab, settings("ce; pseudo_labels", profile="full"))
    with pytest.raises(UserError, match=r"--tune cut: pseudo_labels \+ la trains on held-out images"):
        compare.compare(lab, settings("ce; pseudo_labels + la", tune="cut"))
    with pytest.raises(UserError, match="omega must be positive"):
        SYSTEMS.make("pseudo_labels(omega=0)")
    assert lab.trained == 0
