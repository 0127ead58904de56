"""Stage 2: extracting views, fitting on stored views, and running the backbone again instead."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.arms.common import CLASSES, data_spec, load_images, on_device
from benchmarks.arms.ours import AUGMENT
from benchmarks.arms.swapping import STAGE2
from benchmarks.workers import Pace
from tailscope.features import extract
from tailscope.methods.augmentations import build
from tailscope.spec import StageSpec
from tailscope.training.runtime import Runtime
from tailscope.training.stage1 import CHUNK_BATCHES, new_model
from tailscope.training.stage2 import fit_classifier
from tailscope.training.step import Normalizer


def extract_views(pace: Pace, *, data: str | None, images: int, model: str, device: str) -> None:
    """Augment all images and extract their features, a view a step; items are images."""
    on_device(pace, device)
    runtime = Runtime.choose(device)
    subset = load_images(data, images)
    normalize, augment = Normalizer.of(subset.images), build(AUGMENT)
    network = new_model(model, 3, CLASSES, seed=0).to(runtime.device)
    stream = torch.Generator().manual_seed(0)
    pace.ready(data_bytes=subset.images.numel())
    while True:
        extract(network, augment(subset.images, stream), normalize, runtime.low_precision, runtime, "benchmark")
        pace.step(images)


def fit(pace: Pace, *, images: int, dimension: int, views: int, epochs: int, device: str) -> None:
    """Fit a classifier on stored views, a whole fit a step; items are images of one view."""
    on_device(pace, device)
    runtime = Runtime.choose(device)
    labels = torch.arange(images) % CLASSES
    stream = torch.Generator().manual_seed(0)
    stored = [(torch.randn(images, dimension, generator=stream).to(runtime.low_precision), labels)] * views
    spec = StageSpec(
        data=data_spec(load_images(None, CLASSES)), train=STAGE2.model_copy(update={"epochs": epochs}), views=views
    )
    counts = torch.bincount(labels, minlength=CLASSES).tolist()
    pace.ready()
    while True:
        fit_classifier(spec, stored, counts, 0)
        pace.step(images)


def rerun(pace: Pace, *, data: str | None, images: int, batch: int, model: str, device: str) -> None:
    """Fit a classifier while the backbone runs again for every batch, with our own augmentation, type and layout."""
    on_device(pace, device)
    runtime = Runtime.choose(device)
    dtype = runtime.low_precision
    subset = load_images(data, images)
    normalize, augment = Normalizer.of(subset.images).to(runtime.device), build(AUGMENT)
    network = new_model(model, 3, CLASSES, seed=0).to(runtime.device).eval()
    pixels, labels = subset.images.to(runtime.device), subset.labels.to(runtime.device)
    classifier = nn.Linear(network.feature_dim, CLASSES, device=runtime.device)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.05, momentum=0.9, weight_decay=2e-4, fused=True)
    stream = torch.Generator(runtime.device).manual_seed(0)
    pace.ready()
    while True:
        order = torch.randperm(images, device=runtime.device)
        for rows in torch.split(order, CHUNK_BATCHES * batch):
            augmented = augment(pixels[rows], stream)
            for x, y in zip(torch.split(augmented, batch), torch.split(labels[rows], batch), strict=True):
                with torch.no_grad(), torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
                    features = network.features(normalize(x))
                loss = F.cross_entropy(classifier(features.float()), y)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                pace.step(len(y))
