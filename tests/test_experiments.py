"""Swap, ladder and geometry: what they promise in JSON, what they share, and that their order does not matter."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiment_setups import EXPERIMENTS, TINY, entries, lab, settings, small_digits, timeless
from tailscope.data.subsets import resolve, subset
from tailscope.experiments.plans import ladder_runs, mean_entry, swap
from tailscope.experiments.runs import training_sets
from tailscope.experiments.stages import pretraining
from tailscope.measures import FIELDS
from tailscope.networks import MODELS
from tailscope.spec import RunSpec, backbone_key
from tailscope.store import Store
from tailscope.training.step import Normalizer

CELLS = {"lt->lt", "lt->true", "true->lt", "true->true"}
HEADER = {
    "schema",
    "created",
    "command",
    "spec",
    "environment",
    "dataset",
    "recipe",
    "counts",
    "groups",
    "groups_rule",
    "seeds",
    "subset_sha256",
    "warnings",
    "provenance",
}
CELL = {"accuracy", "mean", "ci95", "ci95_seeds", "ci95_kind", "per_class", "groups", "g_mean", "h_mean"}
PROVENANCE = {
    "row",
    "seed",
    "stage1",
    "stage2",
    "model",
    "parameters",
    "epochs",
    "steps",
    "batch",
    "learning_rate",
    "weight_decay",
    "augmentation",
    "sampler",
    "bn_mode",
    "selection",
    "subset_sha256",
    "precision",
    "compiled",
    "device",
    "seconds",
    "images_per_second",
    "key",
}
GEOMETRY = {
    *("index", "name", "group", "train_count", "unseen_count", "variance", "covariance_norm", "first_pc_share"),
    *("spread_train_deg", "spread_true_deg", "angular_width_deg", "escape_rate", "nearest_center_train_deg"),
    *("nearest_center_true_deg", "center_shift_deg", "spread_gap_deg", "spread_gap_p", "spread_gap_q"),
    *("center_shift_null_deg", "center_shift_excess_deg", "center_shift_p", "center_shift_q", "escape_conformal"),
    *("escape_rank", "displacement", "variance_ratio", "effective_rank", "covariance_norm_unbiased"),
    *("first_pc_share_low", "first_pc_share_high", "nearest_center_sample_train_deg"),
    *("nearest_center_sample_true_deg", "angles_train_quantiles_deg", "angles_true_quantiles_deg"),
}


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Swap, swap again, ladder and geometry over one store, and what the store held after each."""
    folder = tmp_path_factory.mktemp("story")
    data = small_digits()
    results, backbones, trained = {}, {}, {}
    for name in ("swap", "again", "ladder", "geometry"):
        own = lab(folder, data)  # a lab of its own, as another process would have
        results[name] = EXPERIMENTS["swap" if name == "again" else name](own, settings())
        backbones[name], trained[name] = entries(own.store, "stage1"), own.trained
    return SimpleNamespace(folder=folder, data=data, results=results, backbones=backbones, trained=trained)


def test_a_swap_trains_two_backbones_a_seed_and_its_repetition_none(story):
    assert story.backbones["swap"] == story.backbones["again"] == 2 * 2
    assert story.trained["swap"] == 2 * (2 + 4)
    assert story.trained["again"] == 0
    assert timeless(story.results["again"]) == timeless(story.results["swap"])
    assert story.results["again"]["provenance"] == story.results["swap"]["provenance"]  # seconds are the training's


def test_the_whole_story_trains_five_backbones_a_seed(story):
    assert story.backbones["ladder"] == 2 * 5
    assert story.backbones["geometry"] == 2 * 5
    assert story.trained["geometry"] == 0
    # The bound of the un-augmented ladder is the swap's lt->true.
    bound = story.results["ladder"]["augmentations"]["none"]["bound"]
    assert bound == story.results["swap"]["cells"]["lt->true"]


@pytest.mark.parametrize("verb", ["swap", "ladder", "geometry"])
def test_every_result_has_the_promised_header(story, verb):
    result = story.results[verb]
    assert result.keys() >= HEADER
    assert result["schema"] == f"tailscope.{verb}/1"
    assert result["counts"] == resolve("exp:20", story.data.train.counts())
    assert (len(result["groups"]), result["groups_rule"]) == (10, "thirds")
    assert result["seeds"] == [0, 1]
    labels = story.data.train.labels
    expected = [subset(labels, result["counts"], protocol="nested", seed=seed).sha256 for seed in (0, 1)]
    assert result["subset_sha256"] == expected
    assert result["dataset"] == {
        "name": "digits",
        "class_names": [str(k) for k in range(10)],
        "train_images": 500,
        "test_images": 200,
    }
    assert result["recipe"] == {"name": "demo", "card": "A few steps.", "converged": False}
    assert any("A few steps." in text for text in result["warnings"])
    assert {"tailscope", "python", "torch"} <= result["environment"]["versions"].keys()
    assert {"cpu", "cores", "gpu"} <= result["environment"]["hardware"].keys()
    assert result["spec"]["fingerprint"] == story.data.fingerprint
    assert "/" not in json.dumps(result["spec"])  # no path of this machine
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    for row in result["provenance"]:
        assert row.keys() >= PROVENANCE
        assert row["model"] == "resnet8(width=4)"
        assert row["parameters"] == sum(p.numel() for p in MODELS.make("resnet8(width=4)", 1, 10).parameters())
        assert (row["steps"], row["batch"], row["selection"]) == (12, 64, "last epoch")
        assert row["epochs"] == -(-12 // -(-sum(row["counts"]) // 64))


def test_the_swap_has_the_promised_cells_and_attribution(story):
    result = story.results["swap"]
    assert result["cells"].keys() == CELLS
    for cell in result["cells"].values():
        assert cell.keys() == CELL
        assert len(cell["accuracy"]) == 2
        assert cell["mean"] == pytest.approx(np.mean(cell["accuracy"]))
        assert len(cell["per_class"]) == 10
        assert cell["groups"].keys() == {"head", "body", "tail"}
    mean = {name: cell["mean"] for name, cell in result["cells"].items()}
    found = result["attribution"]
    gap = mean["true->true"] - mean["lt->lt"]
    representation = (mean["true->lt"] - mean["lt->lt"] + mean["true->true"] - mean["lt->true"]) / 2
    assert found["gap"] == pytest.approx(gap)
    assert found["representation"]["points"] == pytest.approx(representation)
    assert found["classifier"]["points"] == pytest.approx(gap - representation)
    assert found["interaction"] == pytest.approx(
        mean["true->true"] - mean["true->lt"] - mean["lt->true"] + mean["lt->lt"]
    )
    promised = {"gap", "gap_ci95", "gap_ci95_seeds", "representation", "classifier", "interaction", "interaction_ci95"}
    assert found.keys() >= promised
    for part in ("representation", "classifier"):
        assert found[part].keys() >= {"points", "ci95", "ci95_seeds", "share", "share_ci95"}
    rows = [(row["row"], row["seed"], row["stage1"], row["stage2"]) for row in result["provenance"]]
    own = {(f"{name} stage1", seed, name, None) for name in ("lt", "true") for seed in (0, 1)}
    assert set(rows) == own | {(cell, seed, *cell.split("->")) for cell in CELLS for seed in (0, 1)}
    assert len({(row["key"], row["seed"]) for row in result["provenance"]}) == 4


def test_an_accuracy_is_what_the_stored_weights_give(story):
    """Rebuild one cell from the store with nothing but the network and NumPy."""
    store = Store(story.folder)
    own = lab(story.folder, story.data)
    sets = training_sets(own, settings(), 1)
    stage1, stage2 = TINY.backbone(sets["lt"].spec), TINY.classifier(sets["true"].spec)
    run = RunSpec(stage1=stage1, stage2=stage2, seed=1)
    state = store.read("stage1", run.backbone_key()).tensors
    assert state.pop("rows").tolist() == sets["lt"].rows.tolist()
    model = MODELS.make(TINY.model, 1, 10)
    model.load_state_dict(state)
    pixels = story.data.train.images.numpy() / 255
    x = (story.data.test.images.numpy() / 255 - pixels.mean()) / pixels.std()
    with torch.no_grad():
        features = model.eval().features(torch.from_numpy(x).float().permute(0, 3, 1, 2)).numpy()
    fitted = store.read("stage2", run.key()).tensors
    logits = features @ fitted["weight"].numpy().T + fitted["bias"].numpy()
    right = logits.argmax(1) == story.data.test.labels.numpy()
    cell = story.results["swap"]["cells"]["lt->true"]
    assert cell["accuracy"][1] == pytest.approx(right.mean(), abs=1 / 200 + 1e-9)


def test_the_ladder_has_the_promised_rungs(story):
    result = story.results["ladder"]
    assert list(result["augmentations"]) == ["none", "mixup", "autoaugment", "autoaugment+mixup"]
    for rungs in result["augmentations"].values():
        assert list(rungs) == ["stage1", "stage2", "stage2_aa", "bound"]
        assert all(cell.keys() == CELL and len(cell["accuracy"]) == 2 for cell in rungs.values())
    assert len(result["provenance"]) == 2 * 4 * 4
    sampled = {row["row"].split(": ")[1]: row["sampler"] for row in result["provenance"]}
    assert sampled == {
        "stage1": "instance",
        "stage2": "class_balanced",
        "stage2_aa": "class_balanced",
        "bound": "instance",
    }
    for row in result["provenance"]:
        name, rung = row["row"].split(": ")
        assert ("mixup" in row["augmentation"]) == ("mixup" in name)
        assert ("autoaugment" in row["augmentation"]) == ("autoaugment" in name)
        assert ("autoaugment" in (row["stage2_augmentation"] or "")) == (rung == "stage2_aa")


def test_the_geometry_has_the_promised_fields(story):
    result = story.results["geometry"]
    assert list(result["encoders"]) == ["lt", "lt+mixup", "true"]
    assert any("not converged" in text for text in result["warnings"])
    assert FIELDS.keys() >= GEOMETRY
    for encoder in result["encoders"].values():
        assert list(encoder["seeds"]) == ["0", "1"]
        for run in [*encoder["seeds"].values(), encoder["mean"]]:
            assert run.keys() == {"paper", "calibrated"}
            for variant in run.values():
                assert [entry["index"] for entry in variant["classes"]] == list(range(10))
                assert [entry["train_count"] for entry in variant["classes"]] == result["counts"]
                assert [entry["group"] for entry in variant["classes"]] == result["groups"]
                assert all(entry.keys() >= GEOMETRY for entry in variant["classes"])
                assert variant["groups"].keys() == {"head", "body", "tail"}
    true_counts, test_counts = story.data.train.counts(), story.data.test.counts()
    described = result["encoders"]["lt"]["seeds"]["0"]
    paper = [entry["unseen_count"] for entry in described["paper"]["classes"]]
    assert paper == [all_ - kept for all_, kept in zip(true_counts, result["counts"], strict=True)]
    assert [entry["unseen_count"] for entry in described["calibrated"]["classes"]] == test_counts


def test_a_geometry_entry_is_what_numpy_gives(story):
    own = lab(story.folder, story.data)
    lt = training_sets(own, settings(), 0)["lt"]
    backbone = own.backbone(TINY.backbone(lt.spec), lt.rows, 0, "")
    features = own.clean_features(backbone, "train").double().numpy()
    x = features[story.data.train.labels.numpy() == 2]  # D*: seen and unseen
    entry = story.results["geometry"]["encoders"]["lt"]["seeds"]["0"]["paper"]["classes"][2]
    covariance = np.cov(x.T)
    assert entry["variance"] == pytest.approx(np.trace(covariance), rel=1e-4)
    assert entry["covariance_norm"] == pytest.approx(np.linalg.norm(covariance), rel=1e-4)
    assert entry["first_pc_share"] == pytest.approx(np.linalg.eigvalsh(covariance)[-1] / np.trace(covariance), rel=1e-4)
    seen = lt.rows[story.data.train.labels.numpy()[lt.rows] == 2]
    a, b = features[seen].mean(0), x.mean(0)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert entry["center_shift_deg"] == pytest.approx(np.degrees(np.arccos(cosine)), abs=1e-2)


def test_collapse_is_what_numpy_gives_beside_the_classifier_of_stage_1(story):
    own = lab(story.folder, story.data)
    lt = training_sets(own, settings(), 0)["lt"]
    backbone = own.backbone(TINY.backbone(lt.spec), lt.rows, 0, "")
    train, test = (own.clean_features(backbone, split).double().numpy() for split in ("train", "test"))
    labels, answers = story.data.train.labels.numpy(), story.data.test.labels.numpy()
    rest = np.setdiff1d(np.arange(len(labels)), lt.rows)
    means = np.stack([train[lt.rows][labels[lt.rows] == k].mean(0) for k in range(10)])
    weight, bias = backbone.weight.double().numpy(), backbone.bias.double().numpy()
    sets = {
        ("paper", "train"): (train[lt.rows], labels[lt.rows]),
        ("paper", "unseen"): (train[rest], labels[rest]),
        ("calibrated", "unseen"): (test, answers),
    }
    entry = story.results["geometry"]["encoders"]["lt"]
    for (variant, part), (features, classes) in sets.items():
        found = entry["seeds"]["0"][variant]["collapse"][part]
        nearest = ((features[:, None] - means[None]) ** 2).sum(-1).argmin(1)
        assert found["nc4"] == pytest.approx(((features @ weight.T + bias).argmax(1) != nearest).mean(), abs=0.01)
        some = [features[classes == k] for k in range(10) if (classes == k).sum() > 1]
        pairs = [
            (a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()) / 2 / ((a.mean(0) - b.mean(0)) ** 2).sum()
            for i, a in enumerate(some)
            for b in some[:i]
        ]
        assert found["cdnv"] == pytest.approx(np.mean(pairs), rel=1e-4)
        seeds = [run[variant]["collapse"][part]["nc1"] for run in entry["seeds"].values()]
        assert entry["mean"][variant]["collapse"][part]["nc1"] == pytest.approx(np.mean(seeds))
    assert entry["seeds"]["0"]["calibrated"]["collapse"]["train"] == entry["seeds"]["0"]["paper"]["collapse"]["train"]


def test_pre_training_is_an_option_of_swap_and_ladder(tmp_path, story):
    own = lab(tmp_path, story.data)
    recipe = TINY.with_methods(pretrain="rotation")
    result = swap(own, settings(recipe=recipe, seeds=(0,)))
    assert (entries(own.store, "pretrained"), entries(own.store, "stage1")) == (2, 2)
    assert result["spec"]["recipe"]["pretrain"] == "rotation(length=1.0)"
    assert "pretrain" not in story.results["swap"]["spec"]["recipe"]
    card = result["provenance"][0]
    assert card["pretrain"] == "rotation(length=1.0)"
    assert card["pretraining_seconds"] > 0
    assert card["key"] not in [row["key"] for row in story.results["swap"]["provenance"]]
    runs = list(ladder_runs(settings(recipe=recipe), training_sets(own, settings(), 0), 0))
    assert {run.stage1.pretrain for run in runs} == {"rotation(length=1.0)"}
    assert len({backbone_key(pretraining(run.stage1), 0) for run in runs}) == 2  # mixing comes after it


def test_means_over_seeds_average_measurements_and_nothing_else():
    mean = mean_entry(
        [
            {
                "name": "a",
                "count": 5,
                "class": 1,
                "flagged": True,
                "x": 1.0,
                "y": None,
                "q": [1.0, 2.0],
                "z": None,
            },
            {
                "name": "a",
                "count": 5,
                "class": 8,
                "flagged": False,
                "x": 2.0,
                "y": 3.0,
                "q": [3.0, 4.0],
                "z": None,
            },
        ]
    )
    assert mean == {
        "name": "a",
        "count": 5,
        "class": None,
        "flagged": None,
        "x": 1.5,
        "y": None,
        "q": [2.0, 3.0],
        "z": None,
    }


def test_results_do_not_depend_on_what_ran_first(story, tmp_path):
    for verb in ("geometry", "ladder", "swap"):
        result = EXPERIMENTS[verb](lab(tmp_path, story.data), settings())
        assert timeless(result) == timeless(story.results[verb])


def test_a_seed_means_the_same_alone_and_among_others(story, tmp_path):
    alone = swap(lab(tmp_path, story.data), settings(seeds=(1,)))
    for name, cell in story.results["swap"]["cells"].items():
        assert alone["cells"][name]["accuracy"] == cell["accuracy"][1:]
    assert alone["subset_sha256"] == story.results["swap"]["subset_sha256"][1:]
    assert alone["attribution"]["ci95_kind"] == "item"


def test_the_matched_level_adds_cells_and_changes_none(story):
    own = lab(story.folder, story.data)
    result = swap(own, settings(matched=True))
    levels = ("lt", "true", "matched")
    assert result["cells"].keys() == {f"{a}->{b}" for a in levels for b in levels}
    assert own.trained == 2 * (1 + 5)  # the matched backbone, three classifiers on it, one on each of the others
    for name, cell in story.results["swap"]["cells"].items():
        assert result["cells"][name] == cell
    assert result["attribution"]["matched"].keys() == {"representation", "classifier"}
    before = story.results["swap"]["attribution"]
    assert {k: v for k, v in result["attribution"].items() if k != "matched"} == {
        k: v for k, v in before.items() if k != "matched"
    }
    matched = next(row for row in result["provenance"] if row["stage1"] == "matched")
    assert sum(matched["counts"]) == sum(result["counts"])
    assert max(matched["counts"]) - min(matched["counts"]) <= 1


def test_one_subset_seed_fixes_the_subset_and_nothing_else(story):
    fixed = settings(subset_seed=7)
    own = lab(story.folder, story.data)
    sets = [training_sets(own, fixed, seed) for seed in (0, 1)]
    expected = subset(story.data.train.labels, list(sets[0]["lt"].spec.counts), seed=7)
    assert [s["lt"].spec.indices_sha256 for s in sets] == [expected.sha256] * 2
    stages = {"stage1": TINY.backbone(sets[0]["lt"].spec), "stage2": TINY.classifier(sets[0]["lt"].spec)}
    keys = {RunSpec(**stages, seed=seed).key() for seed in (0, 1)}
    assert len(keys) == 2  # the seed still changes initialisation and order
    own_seed = training_sets(own, settings(subset_seed=None), 7)["lt"].spec
    assert own_seed == sets[0]["lt"].spec  # the seed's own subset is the one that its number draws


@pytest.mark.parametrize("protocol", ["nested", "ldam"])
def test_the_protocol_draws_the_subset(story, protocol):
    lt = training_sets(lab(story.folder, story.data), settings(protocol=protocol), 3)["lt"]
    drawn = subset(story.data.train.labels, list(lt.spec.counts), protocol=protocol, seed=3)
    assert (lt.spec.indices_sha256, lt.spec.protocol) == (drawn.sha256, protocol)
    assert lt.rows.tolist() == drawn.flat.tolist()


def test_pixel_statistics_are_those_of_the_true_set(story):
    own = lab(story.folder, story.data)
    expected = Normalizer.of(story.data.train.images)
    assert torch.equal(own.normalize.mean, expected.mean)
