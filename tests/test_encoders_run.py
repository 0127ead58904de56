"""From names to a feature file: what the command line calls, on trees, lists and images in memory."""

import json
from pathlib import Path

import pytest
import torch

from image_trees import tree
from tailscope.data import sources
from tailscope.encoders import Options, run_features
from tailscope.errors import UserError
from tailscope.feature_table import FeatureTable, align
from tailscope.linear_classifier import LinearClassifier
from tailscope.models import MODELS
from tailscope.training.runtime import Runtime
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
    classifier = LinearClassifier.load(results[0].classifier)
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
    bad_subset.write_text('{"indices": [[0], [9999]]}')
    with pytest.raises(UserError, match="are not rows of these 1297 images"):
        run(subset=bad_subset)
    out.write_text("something of the user's")
    with pytest.raises(UserError, match="is there already; --overwrite replaces it"):
        run()
    assert out.read_text() == "something of the user's"
