"""From a network and images to a verdict in one command, and the same from a module and batches in Python."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import tailscope
from image_trees import photos
from tailscope.data import sources
from tailscope.data.images import ImageFiles, read_image
from tailscope.data.sources import Division
from tailscope.device import Runtime
from tailscope.encoders import Options, extract
from tailscope.encoders.features import Network, extract_parts
from tailscope.errors import UserError
from tailscope.networks import MODELS
from tailscope.store import Store
from tailscope.tables.table import FeatureTable, LinearLayer

CPU = Runtime(torch.device("cpu"), torch.bfloat16)
NAME = "resnet10(width=8)"
COUNTS = {"train": (30, 12, 6), "val": (8, 8, 8), "test": (9, 9, 9)}


def network(seed: int, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS.make(NAME, 3, classes)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A tree with three splits, one with a single split, and checkpoints of three networks."""
    root = tmp_path_factory.mktemp("one_step")
    for seed, (split, counts) in enumerate(COUNTS.items()):
        photos(root / "photos", counts, split=split, seed=seed, side=24)
    photos(root / "one", (25, 10, 5, 1), split="all", seed=7, side=24)
    for name, seed, classes in (("a", 0, 3), ("b", 1, 3), ("five", 2, 5)):
        torch.save({"state_dict": network(seed, classes).state_dict()}, root / f"{name}.pth")
    return root


@pytest.fixture
def decoded(monkeypatch) -> Counter[str]:
    """How often each image is decoded."""
    seen: Counter[str] = Counter()
    image = ImageFiles.image

    def counted(self, row):
        seen[self.ids[row]] += 1
        return image(self, row)

    monkeypatch.setattr(ImageFiles, "image", counted)
    return seen


def command(here: Path, out: Path, *more: object, checkpoint: str = "a", data: str = "photos") -> list[object]:
    given = ["--checkpoint", here / f"{checkpoint}.pth", "--data", f"folder:{here / data}", "--image-size", 24]
    return ["diagnose", "--model", NAME, *given, "--out", out, "--permutations", 19, "--no-report", *more]


def measured(here: Path, out: Path, *more: object, **given: str) -> list[object]:
    """Return the command without a verdict, which takes seconds."""
    return command(here, out, "--no-verdict", *more, **given)


def numbers(result: dict) -> dict:
    """Return what was found, without the name of the classifier's file."""
    found = {field: result[field] for field in ("accuracy", "verdict", "classes", "groups", "counts", "warnings")}
    return {**found, "accuracy": {**found["accuracy"], "current": {**found["accuracy"]["current"], "classifier": ""}}}


def test_one_command_is_the_two_of_before(tailscope_, here: Path, tmp_path: Path) -> None:
    ended = tailscope_(*command(here, tmp_path / "one"))
    assert (ended.code, ended.err) == (0, "")
    said = "RGB, shorter side 27, centre 24 x 24, mean 0.485, 0.456, 0.406, deviation 0.229, 0.224, 0.225"
    assert f"{NAME} sees images as {said}" in ended.out
    for part, split in (("train", "train"), ("unseen", "val"), ("test", "test")):
        given = ["--checkpoint", here / "a.pth", "--data", f"folder:{here / 'photos'}", "--image-size", 24]
        made = tailscope_("features", "--model", NAME, *given, "--split", split, "--out", tmp_path / f"{part}.npz")
        assert made.code == 0
        kept = FeatureTable.load(tmp_path / "one" / "features" / f"{part}.npz")
        assert torch.equal(kept.features, FeatureTable.load(tmp_path / f"{part}.npz").features)
        assert kept.counts() == list(COUNTS[split])
    files = [
        ("train", "train.npz"),
        ("unseen", "unseen.npz"),
        ("test", "test.npz"),
        ("classifier", "train.classifier.npz"),
    ]
    options = [text for option, name in files for text in (f"--{option}", tmp_path / name)]
    ended = tailscope_("diagnose", *options, "--out", tmp_path / "two", "--permutations", 19, "--no-report")
    assert (ended.code, ended.err) == (0, "")
    one, two = (json.loads((tmp_path / name / "diagnosis.json").read_text()) for name in ("one", "two"))
    assert numbers(one) == numbers(two)
    assert one["dataset"]["name"] == "photos"
    made_of = one["provenance"]["unseen"]
    assert (made_of["model"], made_of["weights"], made_of["split"]) == (NAME, "a.pth", "val")
    assert made_of["preprocessing"].startswith("RGB: Compose( Resize(size=[27]")


def test_the_same_command_decodes_nothing_again(tailscope_, here: Path, tmp_path: Path, decoded) -> None:
    assert tailscope_(*measured(here, tmp_path)).code == 0
    assert {name.partition("/")[0] for name in decoded} == set(COUNTS)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").glob("*[!r].npz")}
    sampled, first = sum(decoded.values()), (tmp_path / "diagnosis.json").read_text()
    decoded.clear()
    ended = tailscope_(*measured(here, tmp_path, "--alpha", 0.05))
    assert ended.code == 0
    assert "features/unseen.npz: 24 rows of features, kept from before" in ended.out
    assert sum(decoded.values()) <= 16 < sampled  # a few, for the size that all images have
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert json.loads((tmp_path / "diagnosis.json").read_text())["classes"] == json.loads(first)["classes"]


def test_features_of_another_network_or_other_images_are_refused(tailscope_, here: Path, tmp_path: Path) -> None:
    assert tailscope_(*measured(here, tmp_path)).code == 0
    ended = tailscope_(*measured(here, tmp_path, checkpoint="b"))
    assert ended.code == 2
    assert "features/train.npz: has features of another network or of other images" in ended.err
    assert "weights_sha256" in ended.err
    assert ended.err.count("\n") == 1
    ended = tailscope_(*measured(here, tmp_path, "--normalize", "cifar"))
    assert (ended.code, "('preprocessing' differ)" in ended.err) == (2, True)
    assert tailscope_(*measured(here, tmp_path, "--overwrite", checkpoint="b")).code == 0
    assert FeatureTable.load(tmp_path / "features" / "test.npz").provenance["weights"] == "b.pth"
    assert torch.equal(
        LinearLayer.load(tmp_path / "features" / "classifier.npz").weight, network(1).classifier.weight.detach()
    )
    (tmp_path / "features" / "unseen.npz").write_bytes(b"damaged")
    assert tailscope_(*measured(here, tmp_path, checkpoint="b")).code == 2
    assert tailscope_(*measured(here, tmp_path, "--overwrite", checkpoint="b")).code == 0


def test_the_same_images_with_other_ids_copy_nothing(tailscope_, here: Path, tmp_path: Path) -> None:
    """A file with a subset is replaced by one with all images: row 0 of the former is row 20 of the latter."""
    images = np.random.default_rng(0).integers(0, 256, (60, 24, 24, 3), dtype=np.uint8)
    labels, rows = np.arange(60) % 3, np.arange(20, 60)
    (tmp_path / "subset.json").write_text(json.dumps({"indices": [rows.tolist()]}))
    given = ["--model", NAME, "--checkpoint", here / "a.pth", "--data", tmp_path / "images.npz", "--normalize", "cifar"]
    others = ["--out", tmp_path / "out", "--no-verdict", "--permutations", 19, "--no-report"]
    for kept, more in ((rows, []), (np.arange(60), ["--subset", tmp_path / "subset.json", "--overwrite"])):
        arrays = {"train_images": images[kept], "train_labels": labels[kept]}
        np.savez(tmp_path / "images.npz", **arrays, test_images=255 - images[:30], test_labels=labels[:30])
        ended = tailscope_("diagnose", *given, *others, *more)
        assert (ended.code, ended.err) == (0, "")
    found = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert not [warning for warning in found["warnings"] if "are also in" in warning]
    train = FeatureTable.load(tmp_path / "out" / "features" / "train.npz")
    assert train.ids.tolist() == [f"train:{row}" for row in rows]


def test_interrupted_it_goes_on_where_it_was(tailscope_, here: Path, tmp_path: Path, monkeypatch) -> None:
    seen: list[int] = []

    def interrupted(features, images, *rest, most: int):
        if len(seen) == most:
            raise KeyboardInterrupt
        seen.append(len(images))
        return forward(features, images, *rest)

    forward = extract.forward
    monkeypatch.setattr(extract, "forward", lambda *given: interrupted(*given, most=4))
    options = Options(batch=8, shard=8)

    def run() -> dict[str, FeatureTable]:
        given = Network(checkpoint=here / "a.pth", image_size=24)
        source = f"folder:{here / 'photos'}"
        return extract_parts(NAME, source, given, Division(), out=tmp_path, options=options, runtime=CPU).tables

    with pytest.raises(KeyboardInterrupt):
        run()
    assert [path.name for path in (tmp_path / "features").iterdir()] == ["train.npz.shards"]
    monkeypatch.setattr(extract, "forward", lambda *given: interrupted(*given, most=8))
    with pytest.raises(KeyboardInterrupt):
        run()
    assert sum(seen) == 48 + 16  # all of train, each once, and two batches of unseen
    monkeypatch.setattr(extract, "forward", lambda *given: interrupted(*given, most=100))
    tables = run()
    assert sum(seen) == 48 + 24 + 27
    assert {part: len(table) for part, table in tables.items()} == {"train": 48, "unseen": 24, "test": 27}
    monkeypatch.setattr(extract, "forward", lambda *given: interrupted(*given, most=len(seen)))
    ended = tailscope_(*measured(here, tmp_path / "other"))
    assert (ended.code, "the same command keeps what is finished" in ended.err) == (130, True)


def test_a_hold_out_is_a_share_of_every_class_and_is_declared(tailscope_, here: Path, tmp_path: Path) -> None:
    ended = tailscope_(*measured(here, tmp_path, "--holdout", 0.2, data="one/all"))
    assert ended.code == 0, ended.err
    train, unseen = (FeatureTable.load(tmp_path / "features" / f"{part}.npz") for part in ("train", "unseen"))
    assert (train.counts(), unseen.counts()) == ([20, 8, 4, 1], [5, 2, 1, 0])
    assert len({*train.ids, *unseen.ids}) == 41
    warnings = json.loads((tmp_path / "diagnosis.json").read_text())["warnings"]
    declared = "8 of 41 images of .* count as unseen; the verdict holds only if the network was not trained on them"
    assert sum(re.search(declared, text) is not None for text in warnings) == 1
    misfit = "its classifier has 3 outputs and the training images have 4 classes, so it is not used"
    assert any(misfit in text for text in warnings)
    assert misfit in ended.out
    assert not (tmp_path / "features" / "classifier.npz").exists()
    other = tailscope_(*measured(here, tmp_path / "other", "--holdout", 0.2, "--seed", 1, data="one/all"))
    assert other.code == 0
    assert {*FeatureTable.load(tmp_path / "other" / "features" / "unseen.npz").ids} != {*unseen.ids}


@pytest.mark.parametrize("kept", ["list", "numbers of names", "names of numbers, below"])
def test_a_checkpoint_that_names_its_classes_is_matched_by_name(tailscope_, here: Path, tmp_path: Path, kept) -> None:
    names, state = ["n02", "n00", "n01"], network(0).state_dict()
    state |= {name: tensor[[2, 0, 1]] for name, tensor in state.items() if name.startswith("classifier.")}
    said = {
        "list": {"classes": names},
        "numbers of names": {"class_to_idx": {name: k for k, name in enumerate(names)}},
        "names of numbers, below": {"args": {"idx_to_class": dict(enumerate(names))}},
    }[kept]
    torch.save({"state_dict": state, **said}, tmp_path / "c.pth")
    own = {}
    for name, root in (("named", tmp_path), ("plain", here)):
        given = Network(checkpoint=root / ("c.pth" if name == "named" else "a.pth"), image_size=24)
        source, out = f"folder:{here / 'photos'}", tmp_path / name
        found = extract_parts(NAME, source, given, Division(), out=out, options=Options(), runtime=CPU)
        own[name] = found.classifier.aligned(found.tables["train"].class_names, 64, "photos")
    assert torch.equal(own["named"].weight, own["plain"].weight)
    assert torch.equal(own["named"].bias, own["plain"].bias)
    given = ["--checkpoint", tmp_path / "c.pth", "--data", f"folder:{here / 'photos'}", "--image-size", 24]
    assert tailscope_("features", "--model", NAME, *given, "--split", "val", "--out", tmp_path / "val.npz").code == 0
    assert LinearLayer.load(tmp_path / "val.classifier.npz").class_names == tuple(names)


def test_a_classifier_of_other_names_is_not_used(tailscope_, here: Path, tmp_path: Path) -> None:
    content = {"state_dict": network(0).state_dict(), "class_names": ["n00", "n01", "cat"]}
    torch.save(content, tmp_path / "c.pth")
    given = Network(checkpoint=tmp_path / "c.pth", image_size=24)
    source = f"folder:{here / 'photos'}"
    found = extract_parts(NAME, source, given, Division(), out=tmp_path, options=Options(), runtime=CPU)
    assert found.classifier is None
    has = "has the classes 'n00', 'n01', 'cat' and the training images have 'n00', 'n01', 'n02', so it is not used"
    assert has in found.tables["train"].notes[-1]
    given = ["--checkpoint", tmp_path / "c.pth", "--data", source, "--split", "val", "--image-size", 24]
    ended = tailscope_("features", "--model", NAME, *given, "--out", tmp_path / "val.npz")
    assert "names its classes otherwise; they are taken in the order of the data's" in ended.out
    assert LinearLayer.load(tmp_path / "val.classifier.npz").class_names is None


def test_a_hold_out_of_what_a_classifier_knows_is_doubted(here: Path, tmp_path: Path) -> None:
    found = extract_parts(
        NAME,
        f"folder:{here / 'photos' / 'train'}",
        Network(checkpoint=here / "a.pth", image_size=24),
        Division(holdout=0.5),
        out=tmp_path,
        options=Options(),
        runtime=CPU,
    )
    assert found.classifier is not None
    assert "may well have been trained on this data" in found.tables["train"].notes[-1]


@pytest.mark.parametrize(
    ("more", "data", "says"),
    [
        ([], "one/all", "nothing says which of its images are unseen; give others by --unseen SOURCE, or .*--holdout"),
        (["--holdout", 0.2], "photos", "--holdout: .*photos has val and test; leave it out"),
        (["--holdout", 1], "one/all", "--holdout 1: expected a share above 0 and below 1"),
        (["--holdout", 0.1, "--unseen", "digits"], "one/all", "--holdout and --unseen: give one of them"),
        (["--train", "a.npz"], "photos", "--model and --train: give images for the network by --data"),
        (["--unseen", "digits", "--unseen", "digits"], "photos", "--unseen: beside --model give one source of images"),
        (["--unseen", "folder:nowhere"], "one/all", "folder:nowhere: no such directory"),
    ],
)
def test_what_is_missing_or_too_much_is_one_line(tailscope_, here, tmp_path, more, data, says) -> None:
    ended = tailscope_(*measured(here, tmp_path, *more, data=data))
    assert ended.code == 2
    assert re.search(f"error: .*{says}", ended.err), ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "--train and --unseen: give both, or a network and images by --model and --data"),
        (["--unseen", "b.npz"], "--train and --unseen: give both"),
        (["--model", "resnet8"], "--model resnet8: give the images by --data"),
        (["--checkpoint", "c.pth", "--train", "a.npz"], "--checkpoint: goes with --model"),
        (["--holdout", "0.2"], "--holdout: goes with --model"),
    ],
)
def test_half_a_command_says_the_other_half(tailscope_, monkeypatch, given, says) -> None:
    monkeypatch.setenv("TAILSCOPE_STORE", "somewhere")  # set for other commands
    ended = tailscope_("diagnose", *given)
    assert (ended.code, ended.err.startswith(f"error: {says}")) == (2, True), ended.err


def test_unseen_and_test_images_may_come_from_elsewhere(tailscope_, here: Path, tmp_path: Path) -> None:
    photo = here / "photos"
    more = ["--unseen", f"folder:{photo / 'val'}", "--test", f"folder:{photo / 'test'}"]
    assert tailscope_(*command(here, tmp_path / "apart", *more, data="photos/train")).code == 0
    assert tailscope_(*command(here, tmp_path / "together")).code == 0
    apart, together = (json.loads((tmp_path / n / "diagnosis.json").read_text()) for n in ("apart", "together"))
    assert (apart["accuracy"], apart["verdict"]) == (together["accuracy"], together["verdict"])
    ended = tailscope_(*command(here, tmp_path / "strange", "--unseen", f"folder:{here / 'one' / 'all'}"))
    assert (ended.code, "has samples of 'n03', which" in ended.err) == (2, True)
    assert not (tmp_path / "strange" / "features").exists()  # before any work


def test_images_that_cannot_be_read_stop_it_or_are_left_out(tailscope_, here: Path, tmp_path: Path) -> None:
    shutil.copytree(here / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "val" / "n01" / "3.jpg").write_bytes(b"no image")
    given = ["--checkpoint", here / "a.pth", "--data", f"folder:{tmp_path / 'photos'}", "--image-size", 24]
    run = ["diagnose", "--model", NAME, *given, "--out", tmp_path / "out", "--no-verdict", "--no-report"]
    ended = tailscope_(*run)
    assert (ended.code, "1 image cannot be read: val/n01/3.jpg" in ended.err) == (2, True)
    for _ in range(2):  # extracted, then kept
        ended = tailscope_(*run, "--skip-unreadable", "--json")
        assert ended.code == 0
        result = json.loads(ended.out)  # notes go to standard error
        assert "photos: 1 of 24 unseen images cannot be read and were left out" in result["warnings"]
        assert result["dataset"]["unseen_images"] == 23


def test_an_image_that_was_mended_is_extracted_though_it_is_as_long_as_before(tailscope_, here, tmp_path) -> None:
    shutil.copytree(here / "photos", tmp_path / "photos")
    broken = tmp_path / "photos" / "val" / "n01" / "3.jpg"
    content = broken.read_bytes()
    given = ["--checkpoint", here / "a.pth", "--data", f"folder:{tmp_path / 'photos'}", "--image-size", 24]
    run = ["diagnose", "--model", NAME, *given, "--out", tmp_path / "out", "--no-verdict", "--no-report", "--json"]
    for now, images in ((bytes(len(content)), 23), (content, 24)):
        broken.write_bytes(now)
        ended = tailscope_(*run, "--skip-unreadable", "--overwrite")
        result = json.loads(ended.out)
        assert result["dataset"]["unseen_images"] == images
        assert any("cannot be read" in line for line in result["warnings"]) == (images == 23)


def test_without_a_folder_nothing_is_kept(here: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"checkpoint": here / "a.pth", "data": f"folder:{here / 'photos'}", "image_size": 24}
    result = tailscope.diagnose(model=NAME, **given, verdict=False, permutations=0)
    assert [result["spec"]["encoders"]["photos"][part]["source"] for part in COUNTS if part != "val"] == [
        "train",
        "test",
    ]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match="unknown data set 'photos'; did you mean folder:photos"):
        tailscope.diagnose(model=NAME, data="photos")


def test_the_splits_that_a_source_has() -> None:
    pixels, labels = torch.zeros(6, 4, 4, 1, dtype=torch.uint8), torch.tensor([0, 0, 0, 1, 1, 1])
    images = sources.ImageSet(pixels, labels, ("a", "b"))

    def parts(splits: list[str], **wanted) -> dict[str, str]:
        opened = sources.OpenedImages("hf:x", "x", {name: images.of_split("x", name) for name in splits})
        known = wanted.pop("known", None)
        divided = sources.divide(opened, lambda _: known, Division(**wanted))
        return {part: f"{origin['split']} {len(divided.images[part])}" for part, origin in divided.origins.items()}

    assert parts(["train", "validation", "test"]) == {"train": "train 6", "unseen": "validation 6", "test": "test 6"}
    assert parts(["train", "test"]) == {"train": "train 6", "unseen": "test 6"}
    assert parts(["train", "dev"]) == {"train": "train 6", "unseen": "dev 6"}
    known = {"known": np.array([0, 3])}
    assert parts(["train", "test"], **known) == {"train": "train 2", "unseen": "train 4", "test": "test 6"}
    assert parts(["train", "test"], known=np.arange(6)) == {"train": "train 6", "unseen": "test 6"}
    assert parts(["all"], holdout=0.01) == {"train": "all 4", "unseen": "all 2"}
    assert parts(["all"], holdout=0.99) == {"train": "all 2", "unseen": "all 4"}
    for splits, wanted, says in [
        (["val", "test"], {}, "has no split to train on, only val, test"),
        (["train", "test"], {"holdout": 0.5}, "has test; leave it out"),
        (["train"], {"holdout": 0.5, **known}, "images that are known not to be trained on"),
    ]:
        with pytest.raises(UserError, match=says):
            parts(splits, **wanted)


def test_a_stored_backbone_knows_its_unseen_images(tailscope_, tmp_path: Path) -> None:
    digits = sources.load("digits")
    by_class = digits.train.labels.argsort(stable=True).split(digits.train.counts())
    kept = [rows[: 20 - k].tolist() for k, rows in enumerate(by_class)]
    rows = torch.tensor([row for of_class in kept for row in of_class])
    spec = {"data": {"name": "digits", "profile": "x", "counts": list(map(len, kept))}, "model": "resnet8"}
    meta = {"spec": {**spec, "augment": ["shift"], "mix": None}, "seed": 0}
    torch.manual_seed(0)
    state = MODELS.make("resnet8", 1, 10).state_dict()
    Store(tmp_path / "store").get_or_make("stage1", "aa11", lambda _: ({**state, "rows": rows}, meta))
    (tmp_path / "subset.json").write_text(json.dumps({"indices": kept}))
    torch.save(state, tmp_path / "c.pth")
    networks = {
        "store": ["--model", "store:aa", "--store", tmp_path / "store"],
        "subset": ["--model", "resnet8", "--checkpoint", tmp_path / "c.pth", "--subset", tmp_path / "subset.json"],
    }
    found = {}
    for name, given in networks.items():
        out = tmp_path / name
        ended = tailscope_(
            "diagnose", *given, "--data", "digits", "--out", out, "--permutations", 0, "--no-verdict", "--no-report"
        )
        assert (ended.code, ended.err) == (0, "")
        found[name] = json.loads((out / "diagnosis.json").read_text())
    result = found["store"]
    assert result["counts"] == list(map(len, kept))
    assert result["dataset"]["unseen_images"] == 1297 - len(rows)
    assert (result["dataset"]["test_images"], result["dataset"]["name"]) == (500, "digits")
    assert result["classes"] == found["subset"]["classes"]


# -- in Python --


PIXELS = v2.Compose(
    [
        v2.Resize(27),
        v2.CenterCrop(24),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        v2.ToPureTensor(),
    ]
)


@pytest.fixture(scope="module")
def loaders(here: Path) -> dict[str, DataLoader]:
    sets = {s: ImageFolder(here / "photos" / s, PIXELS, loader=lambda p: read_image(Path(p))) for s in COUNTS}
    return {split: DataLoader(images, batch_size=64) for split, images in sets.items()}


def whole(loader: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_a_module_and_loaders_give_what_the_command_gives(tailscope_, here: Path, tmp_path: Path, loaders) -> None:
    assert tailscope_(*command(here, tmp_path)).code == 0
    expected = json.loads((tmp_path / "diagnosis.json").read_text())
    net = network(0).train()
    net.layer1.eval()  # a part that somebody froze
    modes = [module.training for module in net.modules()]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = tailscope.diagnose(loaders["train"], loaders["val"], test=loaders["test"], model=net, permutations=19)
    as_json = json.loads(json.dumps(found))
    assert numbers(as_json) == numbers(expected)
    assert [module.training for module in net.modules()] == modes
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert found["provenance"]["train"]["preprocessing"] == "as given"
    arrays = {split: whole(loader) for split, loader in loaders.items()}
    arrays["val"] = (arrays["val"][0].numpy(), arrays["val"][1].tolist())
    again = tailscope.diagnose(arrays["train"], arrays["val"], test=arrays["test"], model=net, permutations=19)
    assert again["accuracy"]["current"]["per_class"] == found["accuracy"]["current"]["per_class"]
    assert again["dataset"]["class_names"] == ["0", "1", "2"]


class Plain(nn.Module):
    """A network as people write it, whose classifier is found by what it computes."""

    def __init__(self, classes: int = 3, width: int = 12) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.5))
        self.last = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(x).mean((2, 3)))


def test_a_network_of_ones_own_is_used_with_its_own_classifier(loaders) -> None:
    torch.manual_seed(0)
    net = Plain()
    arrays = {split: whole(loader) for split, loader in loaders.items()}
    found = tailscope.diagnose(arrays["train"], arrays["test"], model=nn.DataParallel(net), permutations=0)
    with torch.no_grad():
        right = net.eval()(arrays["test"][0]).argmax(1) == arrays["test"][1]
    assert found["accuracy"]["current"]["mean"] == pytest.approx(right.double().mean().item())
    other = tailscope.diagnose(arrays["train"], arrays["test"], model=Plain(7), permutations=0)
    assert any("its classifier has 7 outputs and the training images have 3 classes" in w for w in other["warnings"])


def test_mistakes_with_a_module_are_one_line(loaders) -> None:
    train, test = (whole(loaders[split]) for split in ("train", "test"))
    twice = DataLoader(loaders["train"].dataset, sampler=WeightedRandomSampler([1.0] * 48, 48))
    images_alone = DataLoader(train[0], batch_size=8)
    cases = [
        ({"train": train}, "give its inputs as train and unseen"),
        ({"train": train, "unseen": test, "data": "digits"}, "and no data"),
        ({"train": train, "unseen": test, "checkpoint": "c.pth"}, "checkpoint: goes with a network that is named"),
        ({"train": train, "unseen": test, "resize": 7}, "resize: goes with a network that is named"),
        ({"train": (train[0].byte(), train[1]), "unseen": test}, r"train: its images are uint8 \[48, 3, 24, 24\]"),
        ({"train": (train[0], train[1][1:]), "unseen": test}, "train: 48 images and 47 labels"),
        ({"train": train, "unseen": "b.npz"}, "unseen: a str; beside a network, give a DataLoader or a pair"),
        ({"train": twice, "unseen": test}, "train: its sampler draws some images several times"),
        ({"train": train, "unseen": images_alone}, "unseen: gives batches of type Tensor"),
        ({"train": train, "unseen": (test[0][:0], test[1][:0])}, "unseen: no images"),
        ({"train": (train[0][:, :1], train[1]), "unseen": test}, r"Plain: fails on an input of shape \[2, 1, 24, 24\]"),
    ]
    net = Plain().train()
    for given, says in cases:
        with pytest.raises(UserError, match=says):
            tailscope.diagnose(**given, model=net)
        assert net.training
    with pytest.raises(UserError, match="has 3 values, as many as the data has classes"):
        tailscope.diagnose(train, test, model=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1), nn.Flatten()))
