"""Memorisation by subsampled training, against loops written out, truth that is known, and the store's own networks."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

import experiment_setups
from tailscope.errors import UserError
from tailscope.experiments import memorization as memory
from tailscope.experiments.memorization import MemorizationSettings, Trials, draw, jackknife, rank_correlation
from tailscope.experiments.options import Memorization as Request
from tailscope.measures import describe
from tailscope.networks import MODELS
from tailscope.report import build
from tailscope.report import memorization as words
from tailscope.report.objects import Memorization
from tailscope.report.reading import read


def settings(**changes):
    values = dict(experiment_setups.settings(seeds=changes.pop("seeds", (0, 1))))
    return MemorizationSettings.model_validate({**values, "trainings": 5, "share": 0.7, **changes})


@pytest.fixture(scope="module")
def memorized(tmp_path_factory):
    lab = experiment_setups.lab(tmp_path_factory.mktemp("store"))
    return lab, memory.memorization(lab, settings())


def tried(learner, images, labels, trainings, share=0.7, seed=0):
    """Train `learner` on random parts: `learner(images, labels)` returns a function of images to labels."""
    trials = Trials(labels)
    for k in range(trainings):
        kept, put_back = draw(labels, share, seed, k)
        trials.add(learner(images[kept], labels[kept])(images) == labels, kept, put_back)
    return trials


def nearest(images, labels):
    """Return the classifier that says of an image what the nearest training image is."""
    return lambda asked: labels[np.abs(asked[:, None] - images[None]).argmin(1)]


def random_trials(seed, trainings=9, images=14, classes=3):
    stream = np.random.default_rng(seed)
    trials = Trials(stream.integers(0, classes, images))
    for _ in range(trainings):
        trials.add(stream.random(images) < 0.6, stream.random(images) < 0.7)
    return trials


# -- estimates --------------------------------------------------------------------------------------------------------


def loop(trials):
    """Memorisation of each image by the formula, one training after the other; None where undefined."""
    found = []
    for i in range(len(trials.labels)):
        kept = [right[i] for right, part in zip(trials.right, trials.kept, strict=True) if part[i]]
        left_out = [right[i] for right, part in zip(trials.right, trials.kept, strict=True) if not part[i]]
        found.append(sum(kept) / len(kept) - sum(left_out) / len(left_out) if kept and left_out else None)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_memorisation_is_what_a_loop_says(seed):
    trials = random_trials(seed, trainings=4, images=30)
    written = [math.nan if value is None else value for value in loop(trials)]
    np.testing.assert_allclose(trials.scores()[0], written)
    assert 0 < np.isnan(written).sum() < 30


def test_a_wrong_label_is_memorised_and_a_copied_image_is_not():
    images = np.concatenate([np.linspace(0, 1, 40), np.linspace(5, 6, 40), [0.512], [5.55] * 6])
    labels = np.concatenate([np.zeros(40), np.ones(40), [1], np.ones(6)]).astype(np.int64)
    memorised = tried(nearest, images, labels, 60).scores()[0]
    assert memorised[80] == 1.0  # among images of another class: right only where it is its own neighbour
    assert np.abs(memorised[81:]).max() < 0.05  # where one of six is left out, another knows it
    assert np.abs(np.delete(memorised, 80)).mean() < 0.1


def test_a_memory_that_knows_nothing_else_memorises_all():
    labels = np.arange(30) % 5

    def by_heart(images, known):
        return lambda asked: np.array([dict(zip(images, known, strict=True)).get(one, -1) for one in asked])

    trials = tried(by_heart, np.arange(30), labels, 20)
    assert trials.scores()[0].tolist() == [1.0] * 30
    mean, half = jackknife([trials], 5, [])
    assert mean.tolist() == [1.0] * 5
    assert np.isnan(half).all()  # trainings that all say the same tell nothing about others


@pytest.mark.parametrize("seed", range(3))
def test_class_means_and_their_intervals_are_a_jackknife_written_out(seed):
    trials = [random_trials(10 * seed + k, trainings=8, images=24) for k in range(2)]
    groups = [np.array([0, 2]), np.array([1]), np.array([], dtype=np.int64)]

    def means(of):
        found = []
        for k in range(3):
            values = [v for one in of for v, c in zip(loop(one), one.labels, strict=True) if c == k and v is not None]
            found.append(np.mean(values))
        return np.array([*found, np.mean([found[0], found[2]]), found[1]])

    def without(one, k):
        left = Trials(one.labels)
        for j, (right, kept) in enumerate(zip(one.right, one.kept, strict=True)):
            if j != k:
                left.add(right, kept)
        return left

    variance = np.zeros(5)
    for s, one in enumerate(trials):
        left = np.array([means([*trials[:s], without(one, k), *trials[s + 1 :]]) for k in range(8)])
        variance += 7 / 8 * ((left - left.mean(0)) ** 2).sum(0)
    mean, half = jackknife(trials, 3, groups)
    np.testing.assert_allclose(mean[:5], means(trials))
    np.testing.assert_allclose(half[:5], stats.t.ppf(0.975, 14) * np.sqrt(variance))
    assert np.isnan([mean[5], half[5]]).all()


@pytest.mark.parametrize("trainings", [8, 30])
def test_intervals_hold_the_truth_as_often_as_they_say(trainings):
    """Networks that differ in how good they are, and images that gain by being trained on as much as is known."""
    stream, hits = np.random.default_rng(trainings), []
    labels = np.zeros(25, dtype=np.int64)
    gain = stream.uniform(0, 0.5, 25)
    for _ in range(150):
        trials = Trials(labels)
        for quality in stream.normal(0, 0.05, trainings):
            kept = np.zeros(25, dtype=bool)
            kept[stream.permutation(25)[:18]] = True
            trials.add(stream.random(25) < 0.4 + quality + gain * kept, kept)
        mean, half = jackknife([trials], 1, [])
        known = ~np.isnan(trials.scores()[0])
        hits.append(abs(mean[0] - gain[known].mean()) <= half[0])
    assert 0.91 <= np.mean(hits) <= 0.99


def test_what_chance_calls_memorised_is_what_shuffling_the_networks_does():
    trials, stream = random_trials(1, trainings=10, images=8), np.random.default_rng(0)
    right, kept = np.stack(trials.right), np.stack(trials.kept)
    shuffled = []
    for _ in range(4_000):
        mixed = Trials(trials.labels, list(right[stream.permutation(10)]), list(kept))
        shuffled.append(mixed.scores()[0] > 0.25 + 1e-9)
    np.testing.assert_allclose(trials.by_chance(), np.mean(shuffled, axis=0), atol=0.04)


def test_the_threshold_is_exceeded_only_beyond_rounding():
    assert memory.above(np.array([7 / 10 - 9 / 20, 0.35 - 0.1, 0.2501, np.nan])).tolist() == [False, False, True, False]


# -- parts -----------------------------------------------------------------------------------------------------------


def test_parts_are_uniform_of_the_share_and_never_lack_a_class():
    labels = np.repeat([0, 1, 2], [60, 3, 1])
    drawn = [draw(labels, 0.5, 0, k) for k in range(400)]
    for kept, put_back in drawn:
        assert kept.sum() == 32 + len(put_back)
        assert set(labels[kept]) == {0, 1, 2}
    shares = np.mean([kept for kept, _ in drawn], axis=0)
    assert np.abs(shares[:60] - 0.5).max() < 0.1
    assert shares[63] == 1.0
    empty = np.mean([1 in put_back for _, put_back in drawn])
    assert abs(empty - 1 / 8) < 0.06  # three images, each left out by half of the parts
    assert np.ptp(shares[60:63]) < 0.1  # any of the three is put back
    assert np.array_equal(draw(labels, 0.5, 0, 7)[0], drawn[7][0])
    assert not np.array_equal(draw(labels, 0.5, 1, 7)[0], drawn[7][0])


# -- correlation -----------------------------------------------------------------------------------------------------


def test_rank_correlation_is_spearmans_over_the_pairs_that_are_there():
    stream = np.random.default_rng(0)
    x, z = stream.normal(size=12), stream.integers(1, 9, 12).astype(float)
    y = x + stream.normal(size=12)
    y[3] = np.nan
    known = ~np.isnan(y)
    found = rank_correlation(x, y)
    r = stats.spearmanr(x[known], y[known]).statistic
    assert found["spearman"] == pytest.approx(r)
    ends = [math.tanh(math.atanh(r) + s * 1.959964 * math.sqrt((1 + r * r / 2) / (11 - 3))) for s in (-1, 1)]
    assert found["ci95"] == pytest.approx(ends, abs=1e-6)
    ranks = [stats.rankdata(v[known]) for v in (x, y, z)]
    left = [v - np.polyval(np.polyfit(ranks[2], v, 1), ranks[2]) for v in ranks[:2]]
    assert rank_correlation(x, y, given=z)["spearman"] == pytest.approx(np.corrcoef(*left)[0, 1])


@pytest.mark.parametrize(
    ("x", "y", "given", "spearman", "bounded"),
    [
        ([1, 2], [1, 2], None, None, False),
        ([1, 2, 3], [1, 1, 1], None, None, False),
        ([1, 2, 3], [1, 3, 2], None, 0.5, False),
        ([1, 2, 3, 4], [1, 2, 3, 4], None, 1.0, False),
        ([1, 2, 3, 4], [1, 3, 2, 4], None, 0.8, True),
        ([1, 2, 3, 4], [1, 3, 2, 4], [1, 2, 3, 4], None, False),
    ],
)
def test_a_correlation_that_means_nothing_is_none(x, y, given, spearman, bounded):
    found = rank_correlation(*(None if v is None else np.array(v, dtype=float) for v in (x, y, given)))
    assert found["spearman"] == (None if spearman is None else pytest.approx(spearman))
    assert (found["ci95"] is not None) == bounded


# -- the experiment ----------------------------------------------------------------------------------------------------


def test_every_number_is_what_the_stored_networks_say(memorized):
    lab, result = memorized
    labels = lab.data.train.labels.numpy()
    cards = [card for card in result["provenance"] if card["row"] == "part"]
    assert len({card["key"] for card in cards}) == len(cards) == 2 * 5
    pooled = {k: [] for k in range(10)}
    for seed, stored in enumerate(result["images"]):
        rows = np.array(stored["rows"])
        assert np.bincount(labels[rows]).tolist() == result["counts"]
        trials = Trials(labels[rows])
        for card in (one for one in cards if one["seed"] == seed):
            tensors = lab.store.read("stage1", card["key"]).tensors
            model = memory_model(tensors)
            with torch.inference_mode():
                logits = model(lab.normalize(lab.data.train.images[rows]))
            part = tensors["rows"].numpy()
            assert card["counts"] == np.bincount(labels[part], minlength=10).tolist()
            assert abs(len(part) - 0.7 * len(rows)) <= 0.5 + sum(c["put_back"] for c in result["classes"])
            trials.add(logits.argmax(1).numpy() == labels[rows], np.isin(rows, part))
        written = loop(trials)
        assert stored["memorization"] == [
            value if value is None else pytest.approx(value, abs=1e-6) for value in written
        ]
        for value, k in zip(written, labels[rows], strict=True):
            pooled[k].append(value)
    for k, entry in enumerate(result["classes"]):
        known = [value for value in pooled[k] if value is not None]
        assert (entry["images"], entry["undefined"]) == (len(known), len(pooled[k]) - len(known))
        assert entry["memorization"] == (pytest.approx(np.mean(known)) if known else None)
        assert entry["above"] == (pytest.approx(np.mean([v > 0.25 + 1e-9 for v in known])) if known else None)
        assert known == [] or entry["recall_kept"] - entry["recall_left_out"] == pytest.approx(entry["memorization"])
    assert any(0 < abs(entry["memorization"] or 0) < 1 for entry in result["classes"])
    json.dumps(result, allow_nan=False)


def memory_model(tensors):
    model = MODELS.make(experiment_setups.TINY.model, 1, 10)
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "rows"})
    return model.eval()


def test_the_spread_gap_is_that_of_the_backbone_on_the_whole_set(memorized):
    lab, result = memorized
    gaps = []
    for seed in (0, 1):
        card = next(c for c in result["provenance"] if (c["row"], c["seed"]) == ("lt", seed))
        rows = lab.store.read("stage1", card["key"]).tensors["rows"]
        model = memory_model(lab.store.read("stage1", card["key"]).tensors)
        with torch.inference_mode():
            train, test = (
                model.features(lab.normalize(images)) for images in (lab.data.train.images[rows], lab.data.test.images)
            )
        names = [str(k) for k in range(10)]
        found = describe(train, lab.data.train.labels[rows], test, lab.data.test.labels, names, permutations=0)
        gaps.append([entry["spread_gap_deg"] for entry in found.classes])
    for k, entry in enumerate(result["classes"]):
        values = [gap[k] for gap in gaps]
        wanted = None if None in values else pytest.approx(np.mean(values), abs=1e-3)
        assert entry["spread_gap_deg"] == wanted
    both = [(e["memorization"], e["spread_gap_deg"]) for e in result["classes"]]
    both = np.array([pair for pair in both if None not in pair])
    assert result["correlation"]["spearman"] == pytest.approx(stats.spearmanr(*both.T).statistic)


def test_more_trainings_add_to_what_is_stored_and_the_backbone_is_that_of_swap(memorized):
    lab, _ = memorized
    again = experiment_setups.lab(lab.store.root)
    more = memory.memorization(again, settings(trainings=6))
    assert again.trained == 2
    assert len(more["provenance"]) == 2 * 7
    assert experiment_setups.entries(lab.store, "stage1") == 2 * 7
    experiment_setups.EXPERIMENTS["swap"](again, experiment_setups.settings(seeds=(0, 1), backbones=("lt",)))
    assert experiment_setups.entries(lab.store, "stage1") == 2 * 7


def test_a_plan_trains_nothing_and_knows_what_is_stored(memorized):
    lab, _ = memorized
    planned = memory.plan(lab, settings(seeds=(0, 9)))
    stored = [row["stored"] for row in planned["plan"]]
    assert stored == [True] * 6 + [False] * 6
    assert planned["to_train"] == {"backbone": 6}
    assert experiment_setups.entries(lab.store, "stage1") >= 12
    pretrained = experiment_setups.TINY.model_copy(update={"loss": "focal(gamma=2.0)"})
    assert memory.plan(lab, settings(recipe=pretrained))["to_train"] == {"backbone": 12}


def test_a_class_of_one_image_is_undefined_and_said_to_be(memorized):
    _, result = memorized
    single = [entry for entry in result["classes"] if entry["count"] == 1]
    for entry in single:
        assert entry["memorization"] is entry["ci95"] is entry["above"] is None
    assert any("undefined" in line for line in result["warnings"])
    assert any("about 1.5 trainings leave out an image" in line for line in result["warnings"])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(UserError, match=r"--share .*: must lie strictly between 0 and 1"):
        MemorizationSettings.of(Request("digits", share=share))


# -- what people see ---------------------------------------------------------------------------------------------------


def test_the_verb_writes_a_result_that_reads_back_and_says_itself(tailscope_, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "build", partial(build, figures=False))
    run = ("--data", "digits", "--profile", "exp:20", "--recipe", "miniature", "--trainings", 3)
    ended = tailscope_("memorization", *run, "--out", tmp_path)
    assert (ended.code, ended.err) == (0, "")
    result = read(tmp_path / "memorization.json", "memorization")
    assert words.findings(result)[0] in ended.out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert words.headline(result) in page
    assert (tmp_path / "tables" / "memorization-classes.csv").read_text().count("\n") == 11
    planned = tailscope_("memorization", *run, "--out", tmp_path, "--plan")
    assert planned.out.endswith("to train: 0 backbones; the rest is stored\n")


@pytest.mark.parametrize(
    ("spearman", "ci95", "given", "head", "advised"),
    [
        (0.9, [0.5, 0.99], [0.1, 0.9], "wider spread gap are memorised more", "instead of many."),
        (0.9, [0.5, 0.99], [-0.4, 0.9], "wider spread gap are memorised more", "it may say no more"),
        (-0.9, [-0.99, -0.5], None, "wider spread gap are memorised less", "Do not read"),
        (0.3, [-0.4, 0.8], None, "no clear relation over 2 classes", "Train more networks"),
        (None, None, None, "no clear relation", "Train more networks"),
    ],
)
def test_no_more_is_said_than_the_interval_allows(memorized, spearman, ci95, given, head, advised):
    _, result = memorized
    correlation = {"classes": 2, "spearman": spearman, "ci95": ci95, "given_counts": {"spearman": 0.5, "ci95": given}}
    changed = result | {"correlation": correlation}
    assert head in words.headline(changed)
    assert advised in words.advice(changed)[0]


def test_a_result_in_python_has_tables_plots_and_a_page(memorized, tmp_path):
    _, result = memorized
    held = Memorization(result)
    assert held.tables == ["classes", "groups"]
    assert held.plots == ["memorised", "beside-gap"]
    assert held.summary().count("\n") > 10
    held.report(tmp_path / "one.html")
    (tmp_path / "memorization.json").write_text(json.dumps(result))
    assert build(tmp_path, figures=False).name == "report.html"
    for broken in ({"by_group": {"head": {}}}, {"classes": result["classes"][1:]}, {"total": None}):
        (tmp_path / "memorization.json").write_text(json.dumps(result | broken))
        with pytest.raises(UserError, match=r"memorization.json: field .*; run the verb again"):
            build(tmp_path, figures=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainings": 0}, "--trainings 0: give at least 2"),
        ({"trainings": 1}, "--trainings 1: give at least 2"),
        ({"share": 0.9999}, "--share 0.9999: none of .* images is in some parts and left out of others"),
    ],
)
def test_what_would_tell_nothing_of_any_image_is_refused_before_any_training(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        memory.run(Request("digits", recipe="miniature", store=tmp_path, **changes))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
