"""Stage 2 on cached features against a textbook loop through the frozen network; what it draws and extracts."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from tailscope.data.images import ImageSet
from tailscope.data.sources import ImageData
from tailscope.errors import UserError
from tailscope.experiments.stages import Stages
from tailscope.methods.augmentations import build
from tailscope.seeds import derive, torch_stream
from tailscope.spec import RunSpec, TrainSpec
from tailscope.store import Store
from tailscope.training import extract as extraction
from tailscope.training.extract import extract
from tailscope.training.recipes import Recipe
from training_setups import CPU, assert_same_state, digits

SEED = 4
VIEWS = 3
EPOCHS = 5
RECIPE = Recipe(
    name="tiny",
    card="",
    converged=False,
    model="resnet8",
    stage1=TrainSpec(steps=10, batch=64, learning_rate=0.1, schedule="onecycle"),
    stage2=TrainSpec(epochs=EPOCHS, batch=32, learning_rate=0.05, weight_decay=2e-4),
    views=VIEWS,
    augment=("crop(padding=1)",),
    autoaugment="autoaugment(exclude=('invert',))",
)


@pytest.fixture
def lab(tmp_path):
    images = digits(400)
    return Stages(ImageData("tiny", images.take(range(300)), images.take(range(300, 400))), Store(tmp_path), CPU)


@pytest.fixture
def lt(lab):
    return lab.long_tailed("exp:10", "nested", SEED)


@pytest.fixture
def backbone(lab, lt):
    return lab.backbone(RECIPE.backbone(lt.spec), lt.rows, SEED, "backbone")


def run_on(lt, data, **options):
    return RunSpec(stage1=RECIPE.backbone(lt.spec), stage2=RECIPE.classifier(data.spec, **options), seed=SEED)


def textbook(lab, backbone, rows) -> tuple[nn.Linear, list[float]]:
    """Train a linear layer behind the network in eval mode, image by image of the augmented view of each epoch."""
    network = backbone.model.eval()
    pixels = lab.data.train.images.numpy() / 255
    mean, std = pixels.mean(), pixels.std()
    torch.manual_seed(derive(SEED, "classifier"))
    classifier = nn.Linear(32, 10)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.05, momentum=0.9, weight_decay=2e-4)
    criterion = nn.CrossEntropyLoss()
    per_epoch = -(-len(rows) // 32)
    losses = []
    for epoch in range(EPOCHS):
        stream = torch_stream(SEED, "stage2", "augment", epoch % VIEWS)
        view = build(RECIPE.augment)(lab.data.train.images, stream)[torch.from_numpy(rows)]
        labels = lab.data.train.labels[rows]
        order = torch.randperm(len(rows), generator=torch_stream(SEED, "stage2", "order", epoch))
        seen = []
        for batch in order.split(32):
            step = len(losses) * per_epoch + len(seen)
            optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + np.cos(np.pi * step / (EPOCHS * per_epoch)))
            x = torch.from_numpy((view[batch].numpy() / 255 - mean) / std).float().permute(0, 3, 1, 2)
            with torch.no_grad():
                features = network.features(x)
            optimizer.zero_grad()
            loss = criterion(classifier(features), labels[batch])
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        losses.append(float(np.mean(seen)))
    return classifier, losses


def test_stage_2_equals_a_linear_layer_on_the_frozen_network(lab, lt, backbone):
    for data in (lt, lab.true()):
        fitted = lab.classifier(run_on(lt, data), backbone, data.rows, "classifier")
        classifier, losses = textbook(lab, backbone, data.rows)
        assert fitted.meta["losses"] == pytest.approx(losses, rel=1e-4)
        torch.testing.assert_close(fitted.tensors["weight"], classifier.weight.detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fitted.tensors["bias"], classifier.bias.detach(), rtol=1e-3, atol=1e-4)
        assert losses[-1] < 0.9 * losses[0]


def test_a_classifier_may_start_from_that_of_stage_1(lab, lt, backbone):
    """A step of a vanishing learning rate stays where it started."""
    recipe = RECIPE.model_copy(update={"stage2_start": "stage1"})
    stage2 = recipe.classifier(lt.spec)
    still = stage2.model_copy(update={"train": stage2.train.model_copy(update={"learning_rate": 1e-12})})
    run = RunSpec(stage1=recipe.backbone(lt.spec), stage2=still, seed=SEED)
    fitted = lab.classifier(run, backbone, lt.rows, "classifier")
    torch.testing.assert_close(fitted.tensors["weight"], backbone.weight)
    torch.testing.assert_close(fitted.tensors["bias"], backbone.bias)
    assert run.backbone_key() == backbone.key


def test_the_backbone_does_not_move_in_stage_2(lab, lt, backbone):
    before = {name: t.clone() for name, t in backbone.model.state_dict().items()}
    for options in ({}, {"sampler": "class_balanced"}, {"autoaugment": True}):
        lab.classifier(run_on(lt, lt, **options), backbone, lt.rows, "classifier")
    assert_same_state(before, backbone.model.state_dict())
    assert not backbone.model.training
    stored = lab.store.read("stage1", backbone.key).tensors
    assert_same_state(before, {name: t for name, t in stored.items() if name != "rows"})
    assert stored["rows"].tolist() == lt.rows.tolist()


def test_features_are_those_of_each_image_alone(lab, backbone):
    """In eval mode a batch's other images do not matter, nor does the training mode that the model was left in."""
    images = lab.data.test.images[:20]
    together = extract(backbone.model, images, lab.normalize, torch.float32, CPU, "")
    backbone.model.train()
    alone = torch.cat([extract(backbone.model, one[None], lab.normalize, torch.float32, CPU, "") for one in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    logits = backbone.model(lab.normalize(images))
    torch.testing.assert_close(logits, together @ backbone.weight.T + backbone.bias, rtol=1e-4, atol=1e-4)
    assert together.shape == (20, 32)
    assert not together.is_inference()


@pytest.mark.parametrize("sampler", ["class_balanced", "square_root"])
def test_balanced_views_draw_classes_as_they_should(lab, lt, backbone, sampler):
    stage2 = RECIPE.classifier(lt.spec, sampler=sampler).model_copy(update={"views": 30})
    views = lab.views(backbone, stage2, lt.rows, SEED)
    assert len(views) == 30
    drawn = torch.bincount(torch.cat([labels for _, labels in views]), minlength=10).numpy()
    weights = np.array(lt.spec.counts, dtype=float) ** (0.5 if sampler == "square_root" else 0.0)
    assert drawn.sum() == 30 * len(lt.rows)  # an epoch is as long as the long-tailed set
    assert chisquare(drawn, drawn.sum() * weights / weights.sum()).pvalue > 1e-3
    assert chisquare(drawn, drawn.sum() * np.array(lt.spec.counts) / sum(lt.spec.counts)).pvalue < 1e-6
    assert len({tuple(labels.tolist()) for _, labels in views}) == 30


def test_balanced_draws_are_augmented_draws_of_the_training_rows(lab, lt, backbone, monkeypatch):
    extracted = []

    def recording(_, images, *__):
        extracted.append(images)
        return torch.zeros(len(images), 32)

    monkeypatch.setattr(extraction, "extract", recording)
    stage2 = RECIPE.classifier(lt.spec, sampler="class_balanced").model_copy(update={"augment": ()})
    views = lab.views(backbone, stage2, lt.rows, SEED)
    training = lab.data.train.take(lt.rows)
    own = pixels_with_labels(training.images, training.labels)
    for images, (_, labels) in zip(extracted, views, strict=True):
        assert pixels_with_labels(images, labels) <= own
        assert len(images) == len(lt.rows)


def pixels_with_labels(images, labels):
    return {(image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}


def test_classifiers_on_one_backbone_share_its_views(lab, lt, backbone, monkeypatch):
    extractions = []

    def counting(*arguments):
        extractions.append(len(arguments[1]))
        return extract(*arguments)

    monkeypatch.setattr(extraction, "extract", counting)
    for data in (lt, lab.true(), lab.matched(list(lt.spec.counts), SEED)):
        lab.classifier(run_on(lt, data), backbone, data.rows, "classifier")
    assert extractions == [300] * VIEWS
    for sampler_run in range(2):
        lab.classifier(run_on(lt, lt, sampler="class_balanced"), backbone, lt.rows, f"again {sampler_run}")
    assert extractions == [300] * VIEWS + [len(lt.rows)] * VIEWS
    lab.correct(backbone, backbone.weight, backbone.bias)
    lab.correct(backbone, backbone.weight, backbone.bias)
    assert extractions[2 * VIEWS :] == [100]


def test_views_and_seeds_draw_other_augmentations(lab, lt, backbone):
    stage2 = RECIPE.classifier(lt.spec)
    views = [features for features, _ in lab.views(backbone, stage2, lt.rows, SEED)]
    other_seed = lab.views(backbone, stage2, lt.rows, SEED + 1)[0][0]
    autoaugmented = lab.views(backbone, RECIPE.classifier(lt.spec, autoaugment=True), lt.rows, SEED)[0][0]
    for other in (views[1], views[2], other_seed, autoaugmented):
        assert not torch.equal(views[0], other)
    again = lab.views(backbone, stage2, lt.rows, SEED)
    assert all(torch.equal(a, b) for a, (b, _) in zip(views, again, strict=True))
    # One draw an image whoever asks: lt's rows of the view are the true set's view at these rows.
    everything = lab.views(backbone, RECIPE.classifier(lab.true().spec), lab.true().rows, SEED)[0][0]
    assert torch.equal(views[0], everything[torch.from_numpy(lt.rows)])


def test_images_of_one_pixel_at_the_last_stage_are_refused(tmp_path):
    small = ImageSet(torch.zeros(3, 4, 4, 1, dtype=torch.uint8), torch.tensor([0, 1, 0]), ("a", "b"))
    with pytest.raises(UserError, match="4 x 4 pixels are too small"):
        Stages(ImageData("small", small, small), Store(tmp_path), CPU)
    narrow = ImageSet(torch.zeros(3, 5, 1, 1, dtype=torch.uint8), torch.tensor([0, 1, 0]), ("a", "b"))
    assert Stages(ImageData("narrow", narrow, narrow), Store(tmp_path), CPU).true().spec.counts == (2, 1)
