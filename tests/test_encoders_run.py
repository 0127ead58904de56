"""From names to a feature file: what the command line calls, on trees, lists and images in memory."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tailscope
from image_trees import tree
from tailscope.data import sources, subsets
from tailscope.data.sources import load
from tailscope.device import Runtime
from tailscope.encoders import Options, run_features
from tailscope.errors import UserError
from tailscope.networks import MODELS
from tailscope.store import Store
from tailscope.tables.table import FeatureTable, LinearLayer, align
from tailscope.training.loop import new_model
from tailscope.training.step import Normalizer

CPU = Runtime(torch.device("cpu"), torch.bfloat16)


def test_run_on_a_tree_with_a_torchvision_checkpoint(tmp_path: Path) -> None:
    tree(tmp_path / "data" / "train", ["ant", "bee"], images=4)
    tree(tmp_path / "data" / "val", ["ant", "bee"], images=1)
    model = MODELS.make("resnet10(width=8)", 3, 2)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "c.pth")
    results = [
        run_features(
            "resnet10(width=8)",
            f"folder:{tmp_path / 'data'}",
            tmp_path / f"{split}.npz",
            checkpoint=tmp_path / "c.pth",
            split=split,
            image_size=32,
            runtime=CPU,
        )
        for split in ("train", "val")
    ]
    assert [(r.rows, r.width, r.classes, r.skipped) for r in results] == [(8, 64, 2, 0), (2, 64, 2, 0)]
    train, val = align(FeatureTable.load(tmp_path / "train.npz"), FeatureTable.load(tmp_path / "val.npz"))
    assert train.class_names == ("ant", "bee")
    assert val.ids.tolist() == ["val/ant/0.png", "val/bee/0.png"]
    assert torch.equal(val.features[0], train.features[0])  # the same pixels
    classifier = LinearLayer.load(results[0].classifier)
    assert results[0].classifier.name == "train.classifier.npz"
    assert torch.equal(classifier.weight, model.classifier.weight.detach())
    assert train.provenance["split"] == "train"


def test_our_own_backbone_gets_the_normalisation_it_was_trained_with(tmp_path: Path) -> None:
    data = sources.load("digits")
    model = MODELS.make("resnet8", 1, 10).eval()
    torch.save(model.state_dict(), tmp_path / "c.pth")
    kept = data.train.labels.argsort(stable=True).split(data.train.counts())
    (tmp_path / "subset.json").write_text(json.dumps({"indices": [rows[:3].tolist() for rows in kept]}))
    run_features(
        "resnet8",
        "digits",
        tmp_path / "f.safetensors",
        checkpoint=tmp_path / "c.pth",
        split="train",
        subset=tmp_path / "subset.json",
        runtime=CPU,
    )
    rows = torch.cat([rows[:3] for rows in kept])
    with torch.no_grad():
        expected = model.features(Normalizer.of(data.train.images)(data.train.images[rows]))
    table = FeatureTable.load(tmp_path / "f.safetensors")
    torch.testing.assert_close(table.features, expected, rtol=1e-4, atol=1e-5)
    assert table.counts() == [3] * 10


def test_unreadable_images_stop_or_are_skipped(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "ant" / "1.jpg").write_bytes(b"no image")
    lines = ["ant/0.png 0", "ant/1.jpg 0", "bee/9.png 1", "bee/1.jpg 1"]
    (tmp_path / "list.txt").write_text("\n".join(lines))

    def run(name: str, **options):
        return run_features(
            "resnet8",
            f"list:{tmp_path / 'list.txt'}",
            tmp_path / name,
            normalize="cifar",
            image_size=16,
            runtime=CPU,
            **options,
        )

    both = r"2 images cannot be read: list.txt line 2: ant/1.jpg .*; list.txt line 3: bee/9.png \(missing\)"
    with pytest.raises(UserError, match=both):
        run("stops.npz")
    with pytest.raises(UserError, match=both):
        run("verified.npz", verify=True)
    assert not (tmp_path / "verified.npz.shards").exists()
    result = run("skips.npz", options=Options(skip_unreadable=True))
    assert (result.rows, result.skipped) == (2, 2)
    assert "2 images cannot be read" in result.warnings[-1]
    table = FeatureTable.load(tmp_path / "skips.npz")
    assert table.ids.tolist() == ["ant/0.png", "bee/1.jpg"]
    assert table.labels.tolist() == [0, 1]
    (tmp_path / "list.txt").write_text("\n".join(lines[1:3]))
    with pytest.raises(UserError, match="2 images cannot be read"):
        run("nothing.npz", options=Options(skip_unreadable=True))


def test_bad_runs(tmp_path: Path) -> None:
    tree(tmp_path / "data")
    out = tmp_path / "f.npz"

    def run(model: str = "resnet8", data: str = "digits", **options):
        run_features(model, data, out, **{"split": "train", "runtime": CPU, **options})

    bad_subset = tmp_path / "subset.json"
    cases = [
        ({"split": None}, "digits has the splits train, test"),
        (
            {"data": f"folder:{tmp_path / 'data'}", "split": None, "normalize": "cifar"},
            "may differ in size.*--image-size",
        ),
        ({"normalize": "imagenet"}, "--normalize imagenet: is for 3 channels, the model takes 1"),
        ({"subset": bad_subset}, "no subset.json"),
        ({"image_size": 0}, "--image-size 0"),
    ]
    for options, says in cases:
        with pytest.raises(UserError, match=says):
            run(**options)
    for content in ["{}", '{"indices": [["a"]]}', '{"indices": 3}', '{"indices": []}']:
        bad_subset.write_text(content)
        with pytest.raises(UserError, match=r"no subset.json"):
            run(subset=bad_subset)
    bad_subset.write_text('{"indices": [[0, 2.7]]}')
    with pytest.raises(UserError, match=r"subset.json: no subset.json .*2\.7 is no whole number"):
        run(subset=bad_subset)
    bad_subset.write_text('{"indices": [[0], [9999]]}')
    with pytest.raises(UserError, match="are not rows of these 1297 images"):
        run(subset=bad_subset)
    out.write_text("something of the user's")
    with pytest.raises(UserError, match="is there already; --overwrite replaces it"):
        run()
    assert out.read_text() == "something of the user's"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A store with two backbones on digits, of which the first was trained on three images a class."""
    digits, root = sources.load("digits"), tmp_path_factory.mktemp("store")
    rows = torch.cat([kept[:3] for kept in digits.train.labels.argsort(stable=True).split(digits.train.counts())])
    for key, seed in (("aa11", 0), ("bb22", 1)):
        spec = {"data": {"name": "digits", "profile": "balanced:3", "counts": [3] * 10}, "model": "resnet8"}
        meta = {"spec": {**spec, "augment": ["shift"], "mix": None}, "seed": seed}
        torch.manual_seed(seed)
        state = MODELS.make("resnet8", 1, 10).state_dict()
        Store(root).get_or_make("stage1", key, lambda _, s=state, m=meta: ({**s, "rows": rows}, m))
    return root, rows


def test_a_stored_backbone_knows_its_training_images(trained, tmp_path: Path) -> None:
    root, rows = trained
    made = {
        part: run_features("store:aa", "digits", tmp_path / f"{part}.npz", split="train", part=part, store=root)
        for part in ("train", "unseen", None)
    }
    tables = {part: FeatureTable.load(result.features) for part, result in made.items()}
    assert tables["train"].labels.tolist() == sources.load("digits").train.labels[rows].tolist()
    assert {*tables["train"].ids} | {*tables["unseen"].ids} == {*tables[None].ids}
    assert len(tables["train"]) + len(tables["unseen"]) == len(tables[None]) == 1297
    assert torch.equal(tables["train"].features, tables[None].features[rows])
    assert tables["train"].provenance["model"] == "resnet8"
    kept = [np.flatnonzero(tables["train"].labels.numpy() == k) for k in range(10)]
    (tmp_path / "subset.json").write_text(json.dumps({"indices": [rows.numpy()[k].tolist() for k in kept]}))
    options = {"split": "train", "part": "unseen", "subset": tmp_path / "subset.json"}
    other = run_features("store:bb22", "digits", tmp_path / "other.npz", store=root, **options)
    assert FeatureTable.load(other.features).ids.tolist() == tables["unseen"].ids.tolist()
    assert LinearLayer.load(made["train"].classifier).weight.shape == (10, 32)


def test_a_stored_backbone_of_photographs_sees_the_size_that_it_was_trained_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS.make("resnet10(width=4)", 3, 2)
    spec = {"data": {"name": "photos", "profile": "full", "counts": [4, 4]}, "model": "resnet10(width=4)"}
    meta = {"spec": {**spec, "augment": ["resized_crop(size=32)", "flip"], "mix": None}, "seed": 0}
    tensors = {**model.state_dict(), "rows": torch.arange(8)}
    Store(tmp_path / "store").get_or_make("stage1", "cc33", lambda _: (tensors, meta))
    tree(tmp_path / "images", ["ant", "bee"], 4)
    options = {"data": f"folder:{tmp_path / 'images'}", "split": None, "store": tmp_path / "store"}
    made = {
        size: FeatureTable.load(
            run_features("store:cc", out=tmp_path / f"{size}.npz", image_size=size, **options).features
        )
        for size in (None, 32, 224)
    }
    assert torch.equal(made[None].features, made[32].features)
    assert not torch.allclose(made[None].features, made[224].features)


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("store:", {}, "2 backbones; .* has 'aa11 .digits balanced:3, resnet8, shift, seed 0.', 'bb22"),
        ("store:cc", {}, "no such backbone"),
        ("store:aa", {"store": None}, "--store"),
        ("store:aa", {"store": Path("nowhere")}, "nowhere: no such folder"),
        ("store:aa", {"checkpoint": Path("c.pth")}, "has its own weights"),
        ("store:aa", {"part": "test"}, "unknown --part 'test'; known: train, unseen"),
        ("store:aa", {"part": "unseen", "split": "test"}, "is a part of the split train, not of test"),
        ("resnet8", {"part": "unseen"}, "needs --subset FILE or --model store:KEY"),
    ],
)
def test_what_is_wrong_with_a_stored_backbone_is_said(trained, tmp_path: Path, model, options, says) -> None:
    with pytest.raises(UserError, match=says):
        run_features(model, "digits", tmp_path / "f.npz", **({"split": "train", "store": trained[0]} | options))


def test_a_backbone_of_other_images_has_no_parts_of_these(trained, tmp_path: Path) -> None:
    images, labels = torch.zeros(40, 8, 8, 1, dtype=torch.uint8).numpy(), np.arange(40) % 4
    arrays = {
        f"{split}_{name}": x for split in ("train", "test") for name, x in (("images", images), ("labels", labels))
    }
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(UserError, match="trained on other images than these"):
        run_features(
            "store:aa", str(tmp_path / "data.npz"), tmp_path / "f.npz", split="train", part="train", store=trained[0]
        )


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    """The store of BBN and of pseudo-labels on the digits, and the keys of their last backbones."""
    store = tmp_path_factory.mktemp("systems")
    tailscope.compare("digits", methods="bbn; pseudo_labels", gaps="none", recipe="miniature", seeds=1, store=store)
    specs = {key: Store(store).meta("stage1", key)["spec"] for key in Store(store).keys("stage1")}
    return store, {
        field: next(key for key, spec in specs.items() if spec.get(field)) for field in ("second_sampler", "unlabelled")
    }


def test_a_network_of_two_branches_gives_the_features_of_both(systems, tmp_path):
    store, keys = systems
    found = run_features(f"store:{keys['second_sampler']}", "digits", tmp_path / "f.npz", split="test", store=store)
    kept = Store(store).read("stage1", keys["second_sampler"]).tensors
    model = new_model("resnet8(width=4)", 1, 10, 0, branches=2).eval()
    model.load_state_dict({name: kept[name] for name in model.state_dict()})
    digits = load("digits")
    with torch.inference_mode():
        expected = model.features(Normalizer.of(digits.train.images)(digits.test.images))
    table = FeatureTable.load(found.features)
    assert table.width == model.feature_dim
    torch.testing.assert_close(table.features, expected, rtol=2e-2, atol=2e-2)
    assert found.classifier is not None


def test_of_images_that_had_pseudo_labels_none_is_unseen(systems, tmp_path):
    store, keys = systems
    model = f"store:{keys['unlabelled']}"
    with pytest.raises(UserError, match="--part unseen: it was trained on the other images of this data set, too"):
        run_features(model, "digits", tmp_path / "f.npz", split="train", part="unseen", store=store)
    with pytest.raises(UserError, match="without their labels, so that none is unseen; give others by --unseen SOURCE"):
        tailscope.diagnose(model=model, data="digits", store=store, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda held: held["spec"].update(fingerprint="0" * 64, data="cifar10"), r"its spec.fingerprint .*\(cifar10\)"),
        (lambda held: held["indices"][0].reverse(), "its sha256 is not that of its indices"),
        (lambda held: (held.pop("spec"), held["counts"].reverse()), "its counts are not those of the classes"),
        (lambda held: (held.pop("spec"), held.pop("sha256"), held["indices"].reverse(), held["counts"].reverse()),
         "its counts are not those of the classes"),
    ],
)  # fmt: skip
def test_a_subset_of_other_images_is_refused(tmp_path: Path, change, says: str) -> None:
    file = tmp_path / "subset.json"
    held = tailscope.verbs.subset("digits", profile="exp:10", out=tmp_path)

    def rows() -> np.ndarray:
        return subsets.read_rows(file, sources.load("digits").train.labels, lambda: sources.load("digits").fingerprint)

    assert rows().tolist() == [row for kept in held["indices"] for row in kept]
    change(held)
    file.write_text(json.dumps(held))
    with pytest.raises(UserError, match=rf"--subset {file}: {says}"):
        rows()
    with pytest.raises(UserError, match=rf"--subset {file}: {says}"):
        run_features("resnet8", "digits", tmp_path / "f.npz", split="train", subset=file)


def test_a_subset_of_a_data_set_fits_its_training_images_alone(tmp_path: Path) -> None:
    for split in ("train", "test"):
        tree(tmp_path / "data" / split, images=4)
    held = tailscope.verbs.subset(f"folder:{tmp_path / 'data'}", profile="step:2", out=tmp_path)
    train = sources.open_images(f"folder:{tmp_path / 'data' / 'train'}").splits["all"]
    rows = subsets.read_rows(tmp_path / "subset.json", train.labels, lambda: None)
    assert rows.tolist() == [row for kept in held["indices"] for row in kept]
    with pytest.raises(UserError, match="its counts are not those of the classes"):
        subsets.read_rows(tmp_path / "subset.json", train.labels.flip(0), lambda: None)


def test_a_subset_is_of_the_training_split(tmp_path: Path) -> None:
    (tmp_path / "subset.json").write_text(json.dumps({"indices": [[0, 1]] * 10}))
    with pytest.raises(UserError, match=r"subset.json: says which images of the split train to take, not of test"):
        run_features("resnet8", "digits", tmp_path / "f.npz", split="test", subset=tmp_path / "subset.json")


def test_overwritten_features_keep_no_classifier_of_the_network_before(tmp_path: Path) -> None:
    (tmp_path / "f.classifier.npz").write_bytes(b"of before")
    model = MODELS.make("resnet8", 1, 10)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("classifier.")}
    torch.save(state, tmp_path / "c.pth")
    given = {"checkpoint": tmp_path / "c.pth", "split": "test", "runtime": CPU, "overwrite": True}
    assert run_features("resnet8", "digits", tmp_path / "f.npz", **given).classifier is None
    assert not (tmp_path / "f.classifier.npz").exists()
