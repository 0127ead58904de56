"""What every registered method promises; a new entry is checked from the day it is registered."""

import re

import pytest
import torch

from tailscope.methods import AUGMENTATIONS, LOSSES, SAMPLERS
from tailscope.training import contract
from tailscope.training.contract import COUNTS, EVERY
from training_setups import made_loss

SMALL = {"resnet10": "(width=8)", **{f"resnet{depth}": "(width=4)" for depth in (20, 32, 44, 56)}}
"""Networks that take long to train are checked with fewer channels."""
PROMISES = [
    (one, f"{entry.name}{SMALL.get(entry.name, '')}")
    for registry in EVERY
    for entry in registry
    if entry.plugin is None
    for one in contract.CHECKS[registry.kind]
]


def names(registry):
    return [entry.name for entry in registry if entry.plugin is None]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("one", "call"), PROMISES, ids=[f"{call}: {one.promise}" for one, call in PROMISES])
def test_promise_is_kept(one, call):
    contract.run(one, call)


@pytest.mark.parametrize("changes", [{"second_sampler": "reverse"}, {"unlabelled": 0.5}], ids=lambda c: next(iter(c)))
def test_what_no_registry_names_trains_and_resumes_too(changes):
    contract._resumes(contract._stage(**changes))


@pytest.mark.parametrize("registry", EVERY, ids=lambda r: r.kind)
def test_every_entry_has_a_one_line_summary(registry):
    for entry in registry:
        assert entry.plugin or re.search(r"[.)]$", entry.summary), entry.name


@pytest.mark.parametrize("name", names(AUGMENTATIONS))
def test_augmentation_depends_on_the_generator(name):
    augment = AUGMENTATIONS.make(name)
    images = torch.randint(256, (64, 8, 8, 3), dtype=torch.uint8, generator=generator(1))
    assert not torch.equal(augment(images, generator(1)), augment(images, generator(2)))


@pytest.mark.parametrize("name", names(SAMPLERS))
def test_sampler_depends_on_the_generator(name):
    draw = SAMPLERS.make(name, torch.arange(4).repeat_interleave(torch.tensor(COUNTS)), 4)
    moment = (0.9,) if "progress" in SAMPLERS.needs(name) else ()
    assert not torch.equal(draw(32, generator(1), *moment), draw(32, generator(2), *moment))


@pytest.mark.parametrize("name", names(LOSSES))
def test_loss_compiles_as_one_graph(name):
    loss = made_loss(name, torch.tensor(COUNTS))
    logits, labels = torch.randn(8, 4, generator=generator()), torch.arange(8) % 4
    torch.compiler.reset()  # it compiles a function a few times only
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, labels), loss(logits, labels))
