"""Specs: keys change with everything that changes a result and with nothing else; JSON keeps every value."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tailscope.spec import DataSpec, RunSpec, StageSpec, TrainSpec, backbone_key, digest
from tailscope.training.recipes import RECIPES

DATA = DataSpec(
    name="digits",
    fingerprint="f" * 64,
    profile="exp:100",
    protocol="nested",
    subset_seed=0,
    indices_sha256="a" * 64,
    counts=(5, 3, 1),
)
TRAIN = TrainSpec(epochs=3, batch=64, learning_rate=0.1)
STAGE1 = StageSpec(data=DATA, train=TRAIN, model="resnet8(width=8)", augment=("crop(padding=1)",))
STAGE2 = StageSpec(data=DATA, train=TRAIN, augment=("crop(padding=1)",), views=2)
RUN = RunSpec(stage1=STAGE1, stage2=STAGE2, seed=0)

DECISIVE_DATA = {"fingerprint": "e" * 64, "indices_sha256": "b" * 64}
COSMETIC_DATA = {"name": "/data/other.npz", "profile": "full", "protocol": "ldam", "subset_seed": 9, "counts": (9,)}
DECISIVE_TRAIN: dict[str, Any] = {
    "epochs": 4,
    "steps": 3,
    "batch": 65,
    "learning_rate": math.nextafter(0.1, 1),
    "momentum": 0.8,
    "nesterov": True,
    "weight_decay": 0.0,
    "schedule": "onecycle()",
    "precision": "fp32",
    "micro_batches": 4,
}
DECISIVE_STAGE: dict[str, Any] = {
    "model": "resnet8(width=9)",
    "augment": ("crop(padding=1)", "flip"),
    "mix": "mixup(alpha=1.0)",
    "loss": "focal(gamma=2.0)",
    "sampler": "class_balanced",
    "views": 7,
    "bn_mode": "shifted",
    "start": "stage1",
    "last_layer": "cosine(scale=16.0)",
    "weights": "drw(start=0.8, beta=0.9999, mean_over='classes')",
    "pretrain": "rotation(length=1.0)",
    "task": "rotation(length=2.0)",
    "second_sampler": "reverse",
    "unlabelled": 0.5,
    "plugins": (("my_methods", "ab12"),),
}


def changed(spec: Any, /, **changes: Any) -> Any:
    """Return a validated copy."""
    return type(spec).model_validate({**spec.model_dump(), **changes})


def change_train(field: str) -> TrainSpec:
    changes = {field: DECISIVE_TRAIN[field]}
    return changed(TRAIN, **changes, **({"epochs": None} if field == "steps" else {}))


def test_the_lists_of_this_file_name_every_field():
    assert DECISIVE_DATA.keys() | COSMETIC_DATA.keys() == DataSpec.model_fields.keys()
    assert DECISIVE_TRAIN.keys() == TrainSpec.model_fields.keys()
    assert DECISIVE_STAGE.keys() | {"data", "train"} == StageSpec.model_fields.keys()


VARIANTS: list[StageSpec] = [
    *(changed(STAGE1, data=changed(DATA, **{field: value})) for field, value in DECISIVE_DATA.items()),
    *(changed(STAGE1, train=change_train(field)) for field in DECISIVE_TRAIN),
    *(changed(STAGE1, **{field: value}) for field, value in DECISIVE_STAGE.items()),
]


def test_every_decisive_field_of_stage_1_changes_both_keys():
    backbones = [backbone_key(stage, 0) for stage in [STAGE1, *VARIANTS]] + [backbone_key(STAGE1, 1)]
    assert len(set(backbones)) == len(backbones)
    runs = [RunSpec(stage1=stage, stage2=STAGE2, seed=0) for stage in [STAGE1, *VARIANTS]]
    keys = [run.key() for run in [*runs, changed(RUN, seed=1)]]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & set(backbones)
    assert [run.backbone_key() for run in runs] == backbones[:-1]


def test_every_decisive_field_of_stage_2_changes_its_key_alone():
    stages = [changed(STAGE2, **{name: getattr(v, name)}) for v in VARIANTS for name in ("data", "train")]
    stages += [changed(STAGE2, **{field: value}) for field, value in DECISIVE_STAGE.items()]
    runs = [RUN, *(RunSpec(stage1=STAGE1, stage2=stage, seed=0) for stage in set(stages) - {STAGE2})]
    assert len({run.key() for run in runs}) == len(runs)
    assert {run.backbone_key() for run in runs} == {RUN.backbone_key()}


@given(st.fixed_dictionaries({}, optional={field: st.just(value) for field, value in COSMETIC_DATA.items()}))
def test_names_paths_and_profile_texts_never_change_a_key(changes):
    data = changed(DATA, **changes)
    run = RunSpec(stage1=changed(STAGE1, data=data), stage2=changed(STAGE2, data=data), seed=0)
    assert (run.key(), run.backbone_key()) == (RUN.key(), RUN.backbone_key())


texts = st.text(max_size=20)
floats = st.floats(min_value=0, max_value=1e9, exclude_min=True, allow_subnormal=False)
data_specs = st.builds(
    DataSpec,
    name=texts,
    fingerprint=texts,
    profile=texts,
    protocol=texts,
    subset_seed=st.integers(),
    indices_sha256=texts,
    counts=st.lists(st.integers()).map(tuple),
)
lengths = st.one_of(
    st.fixed_dictionaries({"epochs": st.integers(1, 10**6)}), st.fixed_dictionaries({"steps": st.integers(1, 10**9)})
)
train_specs = st.builds(
    lambda length, **rest: TrainSpec(**length, **rest),
    lengths,
    batch=st.integers(1, 10**6),
    learning_rate=floats,
    momentum=st.floats(0, 0.99, allow_subnormal=False),
    nesterov=st.booleans(),
    weight_decay=floats,
    schedule=texts,
    precision=st.sampled_from(["auto", "fp32"]),
)
stage_specs = st.builds(
    StageSpec,
    data=data_specs,
    train=train_specs,
    model=st.none() | texts,
    augment=st.lists(texts, max_size=3).map(tuple),
    mix=st.none() | texts,
    loss=texts,
    sampler=texts,
    views=st.none() | st.integers(1),
)
run_specs = st.builds(RunSpec, stage1=stage_specs, stage2=stage_specs, seed=st.integers(0, 10**30))


@given(run_specs)
def test_json_keeps_every_value_and_the_key(run):
    for text in (run.model_dump_json(), json.dumps(run.model_dump(mode="json"))):
        read = RunSpec.model_validate_json(text)
        assert read == run
        assert read.key() == run.key()
    assert hash(run) == hash(RunSpec.model_validate_json(run.model_dump_json()))


@settings(max_examples=30)
@given(run_specs, run_specs)
def test_equal_keys_mean_equal_content(a, b):
    def content(run):
        return (run.stage1.content(), run.stage2.content(), run.seed)

    assert (a.key() == b.key()) == (content(a) == content(b))


@given(train_specs, st.integers(1, 10**6))
def test_lengths_count_batches_with_the_short_last_one(train, images):
    epochs, steps = train.lengths(images)
    per_epoch = math.ceil(images / train.batch)
    if train.epochs is not None:
        assert (epochs, steps) == (train.epochs, train.epochs * per_epoch)
    else:
        assert steps == train.steps
        assert (epochs - 1) * per_epoch < steps <= epochs * per_epoch


def test_lengths_of_the_papers_recipe():
    paper = TrainSpec(epochs=200, batch=128, learning_rate=0.1)
    assert paper.lengths(12_406) == (200, 19_400)
    assert paper.lengths(50_000) == (200, 78_200)
    assert TrainSpec(steps=400, batch=64, learning_rate=0.1).lengths(10) == (400, 400)
    assert TrainSpec(steps=1, batch=64, learning_rate=0.1).lengths(1_000) == (1, 1)


@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.fixed_dictionaries({"epochs": st.integers(1, 5)}) | st.fixed_dictionaries({"steps": st.integers(1, 60)}),
)
def test_images_are_those_of_the_batches_counted_one_by_one(images, batch, length):
    train = TrainSpec(**length, batch=batch, learning_rate=0.1)
    _, steps = train.lengths(images)
    seen, left = 0, 0
    for _ in range(steps):
        left = left or images  # the next epoch
        seen += min(batch, left)
        left -= min(batch, left)
    assert train.images(images) == seen


def test_images_of_the_fast_recipe():
    fast = RECIPES["fast"].stage1
    assert fast.images(12_406) == 383_700  # 30 epochs and 90 batches of 128; 3,000 full batches would be 384,000


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 3, "steps": 3},
        {"epochs": None},
        {"epochs": 0},
        {"batch": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
        {"learning_rate": math.nan},
        {"momentum": 1.0},
        {"weight_decay": -1e-9},
        {"weight_decay": math.inf},
        {"precision": "fp8"},
        {"colour": 1},
    ],
)
def test_impossible_trainings_are_refused(wrong):
    with pytest.raises(ValidationError):
        TrainSpec(**{"epochs": 3, "batch": 64, "learning_rate": 0.1, **wrong})


def test_specs_are_frozen_and_seeds_not_negative():
    with pytest.raises(ValidationError):
        RUN.seed = 1
    with pytest.raises(ValidationError):
        RunSpec(stage1=STAGE1, stage2=STAGE2, seed=-1)
    with pytest.raises(ValidationError):
        StageSpec(data=DATA, train=TRAIN, views=0)


def test_keys_stay_what_they_were():
    """A later version finds stored stages again. Whoever means to lose them records the new keys here."""
    assert digest({}) == "3f0a99256beeb89a6b9f2793885291a6"
    assert RUN.backbone_key() == "fe16f3ac921e8e8d87865570ac4d4a52"
    assert RUN.key() == "40c9d9bdab68116662bab016ad13d51d"


def test_keys_of_a_trained_store_stay_what_they_were():
    """The recipe fast on the published CIFAR-10-LT subset, as it was stored before there was a `bn_mode`."""
    subset = DataSpec(
        name="cifar10",
        fingerprint="98306f321e0e563adc3a1679d4ee853c1699631bdf2d90bdb4a7d66249d8577d",
        profile="exp:100",
        protocol="ldam",
        subset_seed=0,
        indices_sha256="4bf45bff8878d2786e47dccd702f96ff33b2b11d8c7da3b5015f10937290f866",
        counts=(5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50),
    )
    fast = RECIPES["fast"]
    run = RunSpec(stage1=fast.backbone(subset), stage2=fast.classifier(subset), seed=0)
    assert run.backbone_key() == "892e1381f2f02a41ed1af5bf123f0e12"
    assert run.key() == "d7f1505d09a692691deeeefad8e2215f"
    shifted = fast.model_copy(update={"bn_mode": "shifted"})
    moved = RunSpec(stage1=shifted.backbone(subset), stage2=shifted.classifier(subset), seed=0)
    assert moved.backbone_key() == run.backbone_key()
    assert moved.key() != run.key()
