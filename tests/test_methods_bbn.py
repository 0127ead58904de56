"""BBN: what its two branches see, what they compute, and what they do not go with (Zhou et al. 2020)."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax

import experiment_setups
from image_trees import photos
from tailscope.classifiers import CLASSIFIERS
from tailscope.data.images import ImageSet
from tailscope.data.sources import load
from tailscope.device import Runtime, Solo
from tailscope.errors import UserError
from tailscope.experiments import compare
from tailscope.experiments.compare import CompareSettings
from tailscope.experiments.runs import training_sets
from tailscope.methods.systems import parse
from tailscope.networks import MODELS
from tailscope.seeds import torch_stream
from tailscope.spec import backbone_key
from tailscope.training import loop
from tailscope.training.loop import Training, new_model
from tailscope.training.objective import Objective
from tailscope.training.recipes import require_fitting
from tailscope.training.step import Normalizer, loss_function
from training_setups import CPU, digits, stage1_spec


def bilateral(images, **changes):
    return stage1_spec(images, second_sampler="reverse", **changes)


def settings(methods, **changes):
    values = dict(experiment_setups.settings(seeds=(0,)))
    return CompareSettings.model_validate({**values, "methods": methods, **changes})


def before_the_branches(model, x):
    out = model.layer2(model.layer1(model.bn1(model.conv1(x))))
    for block in list(model.layer3)[:-1]:
        out = block(out)
    return out


@pytest.mark.parametrize(("progress", "alpha"), [(0.0, 1.0), (0.6, 0.64), (0.9, 0.19)])
def test_logits_and_loss_are_equations_1_3_and_5(progress, alpha):
    images, model = digits(40), new_model("resnet20(width=4)", 1, 10, 0, branches=2).train()
    objective = Objective(bilateral(images, model="resnet20(width=4)"), images.counts(), 32, 0, CPU.device)
    normalize = Normalizer.of(images.images)
    objective.at(progress)
    loss = loss_function(model, objective, normalize, torch.float32)(images.images, images.labels)
    shared, branches = before_the_branches(model, normalize(images.images)), model.layer3[-1]
    first = branches.first(shared[:20]).mean((2, 3)).double()
    second = branches.second(shared[20:]).mean((2, 3)).double()
    weight, bias = model.classifier.weight.double(), model.classifier.bias.double()
    expected = 0.0
    for i in range(20):
        z = 2 * (alpha * weight[:, :16] @ first[i] + (1 - alpha) * weight[:, 16:] @ second[i]) + bias
        log_p = log_softmax(z, 0)
        expected -= (alpha * log_p[images.labels[i]] + (1 - alpha) * log_p[images.labels[20 + i]]) / 20
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_in_evaluation_the_features_of_both_branches_stand_side_by_side():
    model = new_model("resnet20(width=4)", 1, 10, 0, branches=2).eval()
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, shared, branches = model.features(x), before_the_branches(model, x), model.layer3[-1]
        both = [branch(shared).mean((2, 3)) for branch in (branches.first, branches.second)]
        torch.testing.assert_close(features, torch.cat(both, 1))
        torch.testing.assert_close(model(x), model.classifier(features))
    assert features.shape[1] == model.feature_dim == 32
    assert not torch.equal(branches.first.conv1.weight, branches.second.conv1.weight)


def test_the_first_branch_and_all_before_it_start_as_a_network_of_one_branch_does():
    one, two = (new_model("resnet8", 1, 10, 3, branches=branches).state_dict() for branches in (1, 2))
    assert torch.equal(two["classifier.weight"][:, :32], one["classifier.weight"])
    for name, tensor in one.items():
        if not name.startswith("classifier."):
            assert torch.equal(two[name.replace("layer3.0.", "layer3.0.first.")], tensor), name


def drawn(spec, images, steps, epoch=2):
    batches = loop._Batches(spec, images, None, 0, CPU.device, Solo(), 0)
    return [list(parts) for _, parts in batches.epoch(epoch, steps, 0.0)]


def test_each_step_has_a_batch_as_ever_and_one_of_the_second_sampler():
    images = digits()
    plain, both = (drawn(one, images, 5) for one in (stage1_spec(images), bilateral(images)))
    assert [len(batch.labels) for (batch,) in both] == [128, 128, 128, 128, 88], "300 images: 4 batches of 64, and 44"
    for (one,), (two,) in zip(plain, both, strict=True):
        assert torch.equal(two.labels.chunk(2)[0], one.labels)


def test_the_second_batch_has_classes_in_inverse_proportion_to_their_counts():
    labels = torch.arange(4).repeat_interleave(torch.tensor([400, 100, 20, 5]))
    images = ImageSet(torch.zeros(525, 8, 8, 1, dtype=torch.uint8), labels, ("a", "b", "c", "d"))
    seen = torch.cat([b.labels.chunk(2)[1] for e in range(8) for (b,) in drawn(bilateral(images), images, 9, e)])
    shares = 1 / np.array([400, 100, 20, 5])
    expected = len(seen) * shares / shares.sum()
    observed = np.bincount(seen, minlength=4)
    assert ((observed - expected) ** 2 / expected).sum() < 16.3, "chi-squared of 3 degrees, p = 0.001"


def test_images_are_those_of_their_labels_in_both_halves():
    images = digits()
    flat = bilateral(images, augment=())
    for (batch,) in drawn(flat, images, 5):
        for image, label in zip(batch.images, batch.labels, strict=True):
            same = (images.images == image).flatten(1).all(1)
            assert label in images.labels[same]


def test_a_micro_batch_of_files_is_half_of_the_one_and_half_of_the_other(tmp_path):
    photos(tmp_path, [20, 6, 4], split="train", side=20)
    data = load(f"list:{tmp_path / 'train.txt'},{tmp_path / 'train.txt'}").train
    changes = {"augment": ("resized_crop(size=16)",), "train": {"micro_batches": 2}, "batch": 16}
    spec = stage1_spec(data, second_sampler="reverse", **changes)
    first = torch.randperm(30, generator=torch_stream(0, "order", 2)).split(16)
    steps = drawn(spec, data, 2)
    assert [[len(part.labels) for part in parts] for parts in steps] == [[16, 16], [14, 14]]
    for parts, order in zip(steps, first, strict=True):
        assert torch.equal(torch.cat([part.labels.chunk(2)[0] for part in parts]), data.labels[order])


def test_engines_train_the_same_and_both_branches_and_their_shares_of_the_classifier_move():
    images = digits()
    spec, runs = bilateral(images, steps=10, train={"learning_rate": 0.01}), {}
    for engine in ("eager", "fused"):
        runtime = Runtime(torch.device("cpu"), torch.float32, engine)
        runs[engine] = Training(spec, images, Normalizer.of(images.images), 0, runtime, None, "").run()
    state, begun = runs["eager"][0], new_model("resnet8", 1, 10, 0, branches=2).state_dict()
    for name, tensor in runs["fused"][0].items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-2, atol=1e-3)
    for name in ("layer3.0.first.conv2.weight", "layer3.0.second.conv2.weight", "classifier.weight"):
        assert not torch.equal(state[name], begun[name])
    assert runs["eager"][1]["steps"] == 10


def test_it_is_compared_stored_and_rebalanced_like_others_and_their_keys_stay(tmp_path):
    lab = experiment_setups.lab(tmp_path)
    methods = "ce; bbn; bbn + la; bbn + crt"
    result = compare.compare(lab, settings(methods))
    assert [one["name"] for one in result["methods"]] == methods.split("; ")
    assert experiment_setups.entries(lab.store, "stage1") == 3, "of D* too"
    lt = training_sets(lab, settings(methods), 0)["lt"]
    stage = settings(methods).recipe.backbone(lt.spec)
    both = stage.model_copy(update={"second_sampler": "reverse"})
    assert backbone_key(stage, 0) != backbone_key(both, 0)
    assert "second_sampler" not in stage.content()
    backbone = lab.backbone(both, lt.rows, 0, "")
    stored = lab.store.read("stage1", backbone_key(both, 0)).tensors
    features = lab.clean_features(backbone, "test").double()
    logits = features @ stored["classifier.weight"].double().T + stored["classifier.bias"].double()
    right = float((logits.argmax(1) == lab.data.test.labels).double().mean())
    assert result["methods"][1]["mean"] == pytest.approx(right)
    statistics = lab.for_stage2(backbone, both.model_copy(update={"bn_mode": "shifted", "views": 1}), lt.rows, 0)
    assert lab.clean_features(statistics, "test").shape == features.shape


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mix": "mixup(alpha=1.0)"}, "two branches cannot be trained with mixup"),
        ({"pretrain": "rotation(length=1.0)"}, "two branches cannot be trained with rotation"),
        ({"loss": "uncertainty_margin", "last_layer": "cosine"}, "means nothing for mixed images"),
    ],
)
def test_what_two_branches_do_not_go_with_is_refused(changes, said):
    stage = bilateral(digits(), **changes)
    with pytest.raises(UserError, match=said):
        require_fitting(stage)


def test_a_sum_that_does_not_fit_is_refused_before_any_training(tmp_path):
    lab = experiment_setups.lab(tmp_path)
    with pytest.raises(UserError, match="cannot be trained with mixup"):
        compare.compare(lab, settings("ce; mixup + bbn"))
    assert lab.trained == 0
    assert parse("ce; bbn", CLASSIFIERS)[1].system().stage1 == {"second_sampler": "reverse"}


def test_a_network_that_names_no_last_stage_is_refused(monkeypatch):
    monkeypatch.setattr(MODELS, "_registered", dict(MODELS._registered))

    @MODELS.register("flat")
    def flat(channels, classes, /):
        """Nothing but a classifier."""
        model = nn.Module()
        model.classifier = nn.Linear(4, classes)
        return model

    with pytest.raises(UserError, match="model flat: cannot end in two branches"):
        new_model("flat", 1, 10, 0, branches=2)
