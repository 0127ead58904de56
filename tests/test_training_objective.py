"""What a stage minimises: losses that ask for more, last layers, class weights, and mixings beyond MixUp."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from tailscope.data.sources import load
from tailscope.device import Solo
from tailscope.errors import UserError
from tailscope.experiments.stages import Stages
from tailscope.methods import LOSSES, MIXINGS
from tailscope.methods.mixing import Mix
from tailscope.networks import LAST_LAYERS, MODELS
from tailscope.networks.last_layers import as_linear
from tailscope.seeds import derive, keyed, torch_stream
from tailscope.spec import RunSpec
from tailscope.store import Store
from tailscope.training import loop
from tailscope.training.extract import fit_classifier
from tailscope.training.loop import Batch, Training, new_model
from tailscope.training.objective import Objective
from tailscope.training.recipes import RECIPES
from tailscope.training.step import Normalizer, Stepper, loss_function
from test_training_resume import Interrupting, Stopped, stop
from test_training_step_graph import Again
from training_setups import CPU, assert_same_state, digits, stage1_spec, train_stage1


class Centers(nn.Module):
    """Cross-entropy and, more and more, the distance to a trained centre of the class."""

    def __init__(self, counts, width):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(len(counts), width))

    def forward(self, logits, labels, *, features, progress):
        distance = (features - self.centers[labels]).square().mean(1)
        return cross_entropy(logits, labels, reduction="none") + (0.1 + progress) * distance


@pytest.fixture
def centers(monkeypatch):
    monkeypatch.setattr(LOSSES, "_registered", dict(LOSSES._registered))

    @LOSSES.register("centers", needs=("features", "progress"))
    def made(counts, width, /):
        """Test losses with parameters."""
        return Centers(counts, width)

    @LOSSES.register("alone", needs=("unmixed",))
    def alone(counts, /):
        """Cross-entropy that takes no mixed images."""
        return LOSSES.make("cross_entropy", counts)


# -- parameters of a loss --------------------------------------------------------------------------------------------


def test_a_loss_with_parameters_costs_no_bit_where_it_is_interrupted(tmp_path, centers):
    images = digits()
    spec = stage1_spec(images, loss="centers", mix="mixup")
    whole, meta = train_stage1(spec, images, tmp_path / "whole")
    for steps in (7, 6):
        with pytest.raises(Stopped):
            train_stage1(spec, images, tmp_path / "cut", runtime=replace(CPU, progress=Interrupting(steps, stop)))
    kept = load_file(tmp_path / "cut" / "checkpoint.safetensors")
    assert {name for name in kept if name.startswith("loss")} == {"loss.centers", "loss_momentum.centers"}
    resumed, again = train_stage1(spec, images, tmp_path / "cut")
    assert_same_state(whole, resumed)
    assert again["losses"] == meta["losses"]
    assert whole.keys() == new_model("resnet8", 1, 10, 0).state_dict().keys()  # the loss is no part of the result


def test_it_trains_as_a_textbook_does_without_weight_decay_on_the_loss(tmp_path, centers):
    images, steps = digits(128), 6
    train = {"nesterov": False, "schedule": "cosine", "learning_rate": 0.02, "weight_decay": 0.1}
    spec = stage1_spec(images, steps=steps, loss="centers", augment=(), train=train)
    state, meta = train_stage1(spec, images, tmp_path)
    model = new_model("resnet8", 1, 10, 0).train()
    with keyed(derive(0, "loss")):
        loss = Centers(images.counts(), 32)
    groups = [{"params": model.parameters(), "weight_decay": 0.1}, {"params": loss.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    losses = []
    for step in range(steps):
        if step % 2 == 0:
            order = torch.randperm(128, generator=torch_stream(0, "order", step // 2)).split(64)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = order[step % 2]
        x = (images.images[rows].float() - images.images.float().mean()) / images.images.double().std(correction=0)
        features = model.features(x.float().permute(0, 3, 1, 2))
        progress = torch.tensor(step / steps)
        value = loss(model.classifier(features), images.labels[rows], features=features, progress=progress).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert meta["losses"] == pytest.approx(np.reshape(losses, (-1, 2)).mean(1).tolist(), rel=2e-4)
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(state[name], expected, rtol=2e-3, atol=2e-3)


def test_micro_batches_add_up_the_gradients_of_the_loss(centers):
    images = digits(60)
    training = Training(
        stage1_spec(images, batch=60, loss="centers"), images, Normalizer.of(images.images), 0, CPU, None, ""
    )
    stepper = training.stepper()
    twin, before = copy.deepcopy(stepper.model), stepper.objective.own.centers.detach().clone()
    parts = [Batch(images.images[:40], images.labels[:40]), Batch(images.images[40:], images.labels[40:])]
    stepper.objective.at(0.25)
    loop._take_step(stepper, iter(parts), [40, 20], 1.0, Solo())
    expected = torch.zeros_like(before)
    for part in parts:
        features = twin.features(training.normalize(part.images))
        for feature, label in zip(features.detach(), part.labels.tolist(), strict=True):
            expected[label] += 0.35 * 2 / 32 * (before[label] - feature) / 60
    moved = stepper.objective.own.centers.detach() - before
    torch.testing.assert_close(moved, -0.1 * 1.9 * expected, rtol=1e-3, atol=1e-6)  # the first step with Nesterov


def trained(capture, steps=9, **changes):
    """Return the losses of some steps, and the state after them."""
    images = digits(64)
    spec = stage1_spec(images, batch=16, **changes)
    model = new_model("resnet8(width=4)", 1, 10, 0, spec.last_layer, spec.branches).train()
    objective = Objective(spec, images.counts(), model.feature_dim, 0, CPU.device)
    compute = loss_function(model, objective, Normalizer.of(images.images), torch.float32)
    stepper, losses = Stepper(model, objective, compute, spec.train, capture=capture), []
    mixing = loop.mixing_of(spec, images.counts(), model)
    weights = torch.linspace(0.5, 2, 16 * spec.branches) if spec.unlabelled else None
    for step in range(steps):
        rows = (torch.arange(16 * spec.branches) + 16 * step) % 64
        mix = mixing.draw(images.labels[rows][None], (8, 8), torch_stream(step)).of(0, CPU.device) if mixing else Mix()
        objective.at(step / steps)
        losses.append(stepper(images.images[rows], images.labels[rows], 0.1 + 0.1 * step, mix, weights))
    return torch.stack(losses), stepper.state()


PARTS = {
    "a loss that asks for all": {"loss": "centers"},
    "deferred weights": {"weights": "drw(start=0.5)"},
    "cosines": {"loss": "ldam", "last_layer": "cosine"},
    "distances": {"loss": "convolutional_prototypes", "last_layer": "prototypes"},
    "weights by the batch": {"weights": "batch_mean(of='inverse')"},
    "a running mean": {"loss": "uncertainty_margin", "last_layer": "cosine"},
    "CutMix": {"mix": "cutmix(probability=1)"},
    "Manifold MixUp": {"mix": "manifold_mixup", "loss": "centers"},
    "Remix": {"mix": "remix", "weights": "inverse"},
    "two branches": {"second_sampler": "reverse", "weights": "drw(start=0.5)"},
    "weights of images": {"unlabelled": 0.5, "mix": "mixup"},
}


@pytest.mark.parametrize("how", ["captured", "compiled"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_captured_and_compiled_steps_compute_the_same(parts, how, monkeypatch, centers):
    expected_losses, expected = trained(None, **parts)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="eager", fullgraph=True, **options))
    torch.compiler.reset()
    capture = Again() if how == "captured" else None
    if how == "compiled":
        monkeypatch.setattr(Stepper, "use", lambda self, _, use=Stepper.use: use(self, "compiled"))
    losses, state = trained(capture, **parts)
    assert capture is None or capture.replayed == 9 - 3
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_the_choice_of_an_engine_times_steps_with_all_that_they_need(parts, centers):
    images = digits(64)
    spec = stage1_spec(images, batch=16, **parts)
    training = Training(spec, images, Normalizer.of(images.images), 0, CPU, None, "")
    assert math.isfinite(training._trial(None, "eager")())


# -- class weights and samplers that change with time ----------------------------------------------------------------


def test_deferred_weights_leave_everything_before_them_as_it_is(tmp_path):
    """300 images are five steps an epoch; the last of 20 steps begins at 0.95."""
    images = digits()
    plain, deferred = (
        train_stage1(stage1_spec(images, steps=20, weights=weights), images, tmp_path / str(weights))[1]["losses"]
        for weights in (None, "drw(start=0.5, beta=0.999)")
    )
    assert deferred[:2] == plain[:2]
    assert deferred[2] != plain[2]


def test_deferred_sampling_changes_at_its_epoch():
    images = load("digits").train.take([*range(0, 300), *range(300, 340)])
    spec = stage1_spec(images, sampler="drs(start=0.5)", steps=24)
    for progress, name in ((0.0, "instance"), (0.5, "class_balanced")):
        labels = []
        for sampler, share in ((spec.sampler, progress), (name, 0.0)):
            same = spec.model_copy(update={"sampler": sampler})
            drawing = loop._Batches(same, images, None, 0, CPU.device, Solo(), None).epoch(3, 6, share)
            labels.append(torch.cat([next(parts).labels for _, parts in drawing]))
        assert torch.equal(*labels)


# -- last layers -----------------------------------------------------------------------------------------------------


def cosine_layer(scale=16.0, width=6, classes=4):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LAST_LAYERS.make(f"cosine(scale={scale})", nn.Linear(width, classes))


def test_cosine_logits_are_their_formula_whatever_the_lengths():
    layer, features = cosine_layer(scale=7.0), torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    weight, x = layer.weight.detach().double().numpy(), features.double().numpy()
    expected = [[7 * w @ f / (np.linalg.norm(w) * np.linalg.norm(f)) for w in weight] for f in x]
    np.testing.assert_allclose(layer(features).detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(1000 * features), layer(features))
    assert torch.equal(layer(torch.zeros(1, 6)), torch.zeros(1, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(features), layer.scale * layer.cosines(features))
        assert layer(features).dtype == torch.float32


def test_gradients_through_cosines_and_features_are_finite_differences(centers):
    features = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer, labels = cosine_layer().double(), torch.tensor([0, 1, 2, 3, 0])
    with torch.random.fork_rng():
        loss = Centers([1] * 4, 6).double()

    def value(x, weight, centers):
        logits = 16 * normalize(x) @ normalize(weight).T
        return torch.func.functional_call(
            loss, {"centers": centers}, (logits, labels), {"features": x, "progress": torch.tensor(0.5)}
        )

    inputs = (features, layer.weight.detach(), loss.centers.detach())
    assert torch.autograd.gradcheck(value, [t.clone().requires_grad_() for t in inputs])


def test_a_linear_last_layer_is_the_networks_own():
    model = MODELS.make("resnet8", 1, 10)
    assert LAST_LAYERS.make("linear", model.classifier) is model.classifier
    first = new_model("resnet8", 1, 10, 3).state_dict()
    cosine = new_model("resnet8", 1, 10, 3, "cosine").state_dict()
    assert first.keys() - cosine.keys() == {"classifier.bias"}
    assert_same_state({name: first[name] for name in cosine}, cosine)


LDAM = RECIPES["demo"].with_methods(loss="ldam", last_layer="cosine")


def test_ldam_learns_with_cosines_and_its_backbone_serves_stage_2(tmp_path):
    lab = Stages(load("digits"), Store(tmp_path), CPU)
    lt = lab.long_tailed("exp:20", "nested", 0)
    stage1 = LDAM.backbone(lt.spec)
    backbone = lab.backbone(stage1, lt.rows, 0, "ldam")
    features = lab.clean_features(backbone, "test")
    own = backbone.model.classifier(features).argmax(1) == lab.data.test.labels
    assert np.array_equal(lab.correct(backbone, backbone.weight, backbone.bias), own.numpy())
    assert own.float().mean() > 0.7  # a tenth is chance, which is what it falls to without cosines
    short = {"train": LDAM.stage2.model_copy(update={"steps": 20, "learning_rate": 1e-12}), "start": "stage1"}
    stage2 = LDAM.classifier(lt.spec).model_copy(update=short)
    fitted = lab.classifier(RunSpec(stage1=stage1, stage2=stage2, seed=0), backbone, lt.rows, "start").tensors
    assert np.array_equal(lab.correct(backbone, fitted["weight"], fitted["bias"]), own.numpy())


# -- stage 2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last_layer", ["linear", "cosine"])
def test_stage_2_gives_a_loss_what_it_needs(last_layer, centers):
    images = digits()
    spec = stage1_spec(images, model=None, loss="centers", last_layer=last_layer, steps=60, weights="drw(start=0.9)")
    spread = 3 * torch.eye(10)[images.labels] + torch.randn(300, 10, generator=torch.Generator().manual_seed(0))
    fitted, meta = fit_classifier(spec, [(spread, images.labels)], images.counts(), 0)
    right = (spread @ fitted["weight"].T + fitted["bias"]).argmax(1) == images.labels
    assert right.float().mean() > 0.8
    assert meta["losses"][-1] < meta["losses"][0]
    assert last_layer == "linear" or torch.allclose(fitted["weight"].norm(dim=1), torch.ones(10))


# -- what is mixed ---------------------------------------------------------------------------------------------------


def test_manifold_mixup_mixes_activations_between_the_stages():
    images = digits(20)
    model = new_model("resnet8", 1, 10, 0).eval()
    objective = Objective(stage1_spec(images), images.counts(), 32, 0, CPU.device)
    normalizer = Normalizer.of(images.images)
    compute = loss_function(model, objective, normalizer, torch.float32)
    partner, y = torch.randperm(20, generator=torch.Generator().manual_seed(0)), images.labels
    for place in range(3):
        weights = torch.ones(3)
        weights[place] = 0.3
        loss = compute(images.images, y, None, weights[0].view(1, 1, 1, 1), torch.tensor([0.3]), partner, weights[1:])
        x = normalizer(images.images)
        for number, stage in enumerate([lambda x: x, lambda x: model.layer1(model.bn1(model.conv1(x))), model.layer2]):
            x = stage(x)
            if number == place:
                x = 0.3 * x + 0.7 * x[partner]
        logits = model.classifier(model.layer3(x).mean((2, 3)))
        torch.testing.assert_close(loss, 0.3 * cross_entropy(logits, y) + 0.7 * cross_entropy(logits, y[partner]))


def test_cutmix_and_remix_reach_pixels_and_labels_separately():
    images, y = digits(20), digits(20).labels
    model = new_model("resnet8", 1, 10, 0).eval()
    objective = Objective(stage1_spec(images, weights="inverse"), images.counts(), 32, 0, CPU.device)
    normalizer = Normalizer.of(images.images)
    compute = loss_function(model, objective, normalizer, torch.float32)
    stream = torch.Generator().manual_seed(0)
    mask, own, partner = torch.ones(1, 1, 8, 8), torch.rand(20, generator=stream), torch.randperm(20, generator=stream)
    mask[:, :, 2:5, 1:4] = 0
    loss = compute(images.images, y, None, mask, own, partner, None)
    pasted = images.images.clone()
    pasted[:, 2:5, 1:4] = images.images[partner][:, 2:5, 1:4]
    logits = model(normalizer(pasted)).double()
    inverse = 1 / torch.tensor(images.counts(), dtype=torch.float64)
    inverse /= inverse.mean()
    expected = sum(
        float(own[i]) * inverse[y[i]] * cross_entropy(logits[i], y[i])
        + (1 - float(own[i])) * inverse[y[partner[i]]] * cross_entropy(logits[i], y[partner[i]])
        for i in range(20)
    )
    torch.testing.assert_close(loss.double(), expected / 20, rtol=1e-5, atol=1e-6)


def test_mixup_leaves_the_layout_that_convolutions_are_fast_on():
    x = torch.rand(4, 3, 8, 8).to(memory_format=torch.channels_last)
    labels = torch.zeros(1, 4, dtype=torch.int64)
    for call in ("mixup", "cutmix"):
        own = MIXINGS.make(call).draw(labels, (8, 8), torch.Generator().manual_seed(0)).of(0, CPU.device).images
        assert (own * x + (1 - own) * x[labels[0]]).is_contiguous(memory_format=torch.channels_last)


# -- what does not fit -----------------------------------------------------------------------------------------------


def test_parts_that_do_not_fit_are_refused_in_one_line_before_any_training(tmp_path, centers):
    images, demo = digits(), RECIPES["demo"]
    subset = stage1_spec(images).data
    view = torch.zeros(300, 8), images.labels
    linear = (
        r"^loss ldam.*: needs a network that ends in cosines, and the last layer linear computes none; take the last"
    )
    stage2 = stage1_spec(images, model=None)
    for refused, says in {
        lambda: demo.with_methods(loss="ldam"): linear,
        lambda: train_stage1(stage1_spec(images, loss="ldam"), images, tmp_path): linear,
        lambda: fit_classifier(stage2.model_copy(update={"loss": "ldam"}), [view], images.counts(), 0): linear,
        lambda: demo.with_methods(loss="alone").backbone(subset, mix=True): "^loss alone: means nothing for mixed",
        lambda: train_stage1(stage1_spec(images, loss="alone", mix="cutmix"), images, tmp_path): "^loss alone: means",
        lambda: demo.classifier(subset, sampler="drs"): "^sampler drs: changes while a stage is trained",
        lambda: loop.mixing_of(stage1_spec(images, mix="manifold_mixup"), images.counts(), nn.Linear(1, 1)): (
            "^mixing manifold_mixup: mixes activations between stages, for which resnet8 has no place"
        ),
    }.items():
        with pytest.raises(UserError, match=says) as raised:
            refused()
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="needs a network that ends in cosines"):
        type(demo)(**{**demo.model_dump(), "loss": "ldam"})
    assert demo.with_methods(loss="alone").backbone(subset).loss == "alone"


def test_the_command_refuses_ldam_without_cosines(tailscope_, tmp_path):
    ended = tailscope_(
        "swap", "--data", "digits", "--recipe", "demo", "--loss", "ldam", "--seeds", "1", "--out", tmp_path
    )
    assert (ended.code, ended.out) == (2, "")
    assert "needs a network that ends in cosines" in ended.err


def test_a_need_that_nothing_meets_is_a_mistake_of_its_author():
    with pytest.raises(ValueError, match="loss 'x': unknown need 'featurs'; did you mean 'features'"):
        LOSSES.register("x", needs=("featurs",))


def test_the_weights_of_a_cosine_backbone_are_its_decisions():
    layer = cosine_layer()
    weight, bias = as_linear(layer)
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    logits = features @ weight.T + bias
    torch.testing.assert_close(layer(features), 16 * logits / features.norm(dim=1, keepdim=True))
