"""Methods compared: what is trained, what is chosen on what, and every number against a loop written out."""

import json
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import experiment_setups
import tailscope
from tailscope.classifiers import CLASSIFIERS
from tailscope.errors import UserError
from tailscope.experiments import compare
from tailscope.experiments.compare import CompareSettings
from tailscope.experiments.runs import training_sets
from tailscope.intervals import holm, p_of_zero, paired
from tailscope.methods import SYSTEMS
from tailscope.methods.systems import System, parse
from tailscope.report import build
from tailscope.report.objects import Comparison
from tailscope.report.reading import read
from tailscope.spec import StageSpec, backbone_key

THREE = "ce; la(tau=2); mixup + crt"
DRS = "drs(start=0.8, then='class_balanced')"


def settings(methods=THREE, **changes):
    values = dict(experiment_setups.settings(seeds=changes.pop("seeds", (0, 1, 2))))
    return CompareSettings.model_validate({**values, "methods": methods, **changes})


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The three methods with their stages."""
    lab = experiment_setups.lab(tmp_path_factory.mktemp("store"))
    return lab, compare.compare(lab, settings())


def by_name(result):
    return {method["name"]: method for method in result["methods"]}


# -- methods as text ------------------------------------------------------------------------------------------------


def test_a_method_is_a_sum_of_calls():
    ce, tau, both, plain = parse("ce; tau(0.7) ;mixup(alpha=0.2)  +  crt; loss:focal(gamma=1)", CLASSIFIERS)
    assert (ce.name, ce.call, ce.system()) == ("ce", "ce", System(stage1={"loss": "cross_entropy"}))
    assert (tau.name, tau.call) == ("tau(0.7)", "tau(tau=0.7)")
    assert (both.name, both.call) == ("mixup(alpha=0.2) + crt", "mixup(alpha=0.2) + crt")
    assert both.system().stage1 == {"mix": "mixup(alpha=0.2)"}
    assert both.system().stage2 == {"sampler": "class_balanced"}
    assert (plain.call, plain.system().stage1) == ("loss:focal(gamma=1.0)", {"loss": "focal(gamma=1.0)"})


@pytest.mark.parametrize(
    ("call", "field"),
    [("equalization", "loss"), ("square_root", "sampler"), ("augment:flip", "augment"), ("softmax", "classifier")],
)
def test_whatever_is_registered_is_a_method_by_itself(call, field):
    system = parse(f"ce; {call}", CLASSIFIERS)[1].system()
    assert field in system.stage1 or system.classifier


def test_augmentations_add_up():
    system = parse("ce; augment:flip + augment:crop(padding=2)", CLASSIFIERS)[1].system()
    assert system.stage1 == {"augment": ["flip", "crop(padding=2)"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ce", "at least two"),
        ("ce; crtt", "did you mean 'crt'"),
        ("ce; crt + crt", "--methods crt + crt: both set the sampler"),
        ("ce; crt + class_balanced_sampling; lws + tau", "--methods lws + tau: both set the classifier"),
        ("ce; balanced_softmax + focal", "both set the loss"),
        ("ce; tau(0.5); tau(tau=0.5)", "tau(0.5) and tau(tau=0.5) are the same method"),
        ("ce; shape:x", "unknown kind 'shape'"),
        ("ce; tau(t=1)", "unknown argument 't'"),
        ("ce; tau(tau=", "expected a name or a call"),
        ("ce; loss:focl", "did you mean 'focal'"),
    ],
)
def test_a_wrong_list_is_one_true_line(text, said):
    with pytest.raises(UserError) as error:
        parse(text, CLASSIFIERS)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("entry", list(SYSTEMS), ids=lambda entry: entry.name)
def test_every_registered_method_is_data_that_stages_understand(entry):
    system = SYSTEMS.make(entry.name)
    known = {*StageSpec.model_fields, "autoaugment"}
    assert {*system.stage1, *(system.stage2 or {})} <= known
    assert entry.summary.endswith((".", ").")), entry.summary
    for name, values in system.grid.items():
        assert entry.defaults[name] in values, "the published value is one of those that are tried"
        for value in values:
            SYSTEMS.make(f"{entry.name}({name}={value!r})")
    if system.classifier:
        CLASSIFIERS.make(system.classifier)
    for stage in (system.stage1, system.stage2 or {}):
        compare.spelled(stage)


@pytest.mark.parametrize("entry", list(SYSTEMS), ids=lambda entry: entry.name)
def test_every_registered_method_makes_a_plan_whose_parts_fit_each_other(entry, tmp_path):
    lab = experiment_setups.lab(tmp_path)
    first, method = parse(f"loss:label_smoothing; {entry.name}", CLASSIFIERS)
    sets = training_sets(lab, settings(), 0)
    runs = list(compare._runs([first, method], settings(), sets, 0))
    assert [run.row for run in runs if run.method] == ["loss:label_smoothing", entry.name]
    own = next(run for run in runs if run.row == entry.name)
    assert own.stage1.train == settings().recipe.stage1
    changed = {name for name, value in dict(own.stage1).items() if value != dict(runs[0].stage1)[name]}
    assert changed <= {*method.system().stage1, "loss", "augment"}


@pytest.mark.parametrize(
    ("call", "stage1"),
    [
        ("cost_sensitive", {"loss": "cross_entropy", "weights": "batch_mean(of='inverse(power=1.0)')"}),
        (
            "ldam_drw(scale=20)",
            {
                "loss": "ldam(max_margin=0.5, scale=20.0)",
                "last_layer": "cosine(scale=20.0)",
                "weights": "batch_mean(of='drw(start=0.8, beta=0.9999)')",
            },
        ),
        ("remix + ce_drs", {"mix": "remix(alpha=1.0, kappa=3.0, tau=0.5)", "sampler": DRS, "loss": "cross_entropy"}),
        ("bag_of_tricks", {"mix": "mixup(alpha=1.0)", "sampler": DRS}),
        (
            "balanced_softmax_augmented",
            {"loss": "balanced_softmax", "augment": ["autoaugment_filled", "cutout"]},
        ),
    ],
)
def test_a_whole_system_is_the_sum_of_its_published_parts(call, stage1):
    assert compare.spelled(parse(f"ce; {call}", CLASSIFIERS)[1].system().stage1) == stage1


def test_a_classifier_of_cosines_is_as_sure_as_its_scale_says(tmp_path):
    lab = experiment_setups.lab(tmp_path)
    result = by_name(compare.compare(lab, settings("ce; ldam(scale=9)", seeds=(0,), gaps="none")))["ldam(scale=9)"]
    lt, recipe = training_sets(lab, settings(), 0)["lt"], settings().recipe
    changes = {"loss": "ldam(max_margin=0.5, scale=9.0)", "last_layer": "cosine(scale=9.0)"}
    stage1 = recipe.backbone(lt.spec).model_copy(update=changes)
    backbone = lab.backbone(stage1, lt.rows, 0, "")
    features = lab.clean_features(backbone, "test").double().numpy()
    weight = lab.store.read("stage1", backbone_key(stage1, 0)).tensors["classifier.weight"].double().numpy()
    cosines = (features @ weight.T) / np.linalg.norm(features, axis=1)[:, None] / np.linalg.norm(weight, axis=1)
    probabilities = np.exp(9 * cosines) / np.exp(9 * cosines).sum(1, keepdims=True)
    right = cosines.argmax(1) == lab.data.test.labels.numpy()
    assert result["mean"] == pytest.approx(right.mean())
    assert result["calibration_error"]["mean"] == pytest.approx(
        calibration_error(probabilities.max(1), right), abs=1e-4
    )


def test_what_rebalances_a_classifier_of_cosines_starts_from_its_logits(tmp_path):
    """Of `ldam + la` they are s cos(w, f) - log prior, whatever the length of f (Menon et al. 2021, equation 9)."""
    lab = experiment_setups.lab(tmp_path)
    result = by_name(compare.compare(lab, settings("ce; ldam + la; ldam + tau", seeds=(0,), gaps="none")))
    lt, recipe = training_sets(lab, settings(), 0)["lt"], settings().recipe
    changes = {"loss": "ldam(max_margin=0.5, scale=30.0)", "last_layer": "cosine(scale=30.0)"}
    stage1 = recipe.backbone(lt.spec).model_copy(update=changes)
    features = lab.clean_features(lab.backbone(stage1, lt.rows, 0, ""), "test").double().numpy()
    weight = lab.store.read("stage1", backbone_key(stage1, 0)).tensors["classifier.weight"].double().numpy()
    cosines = (features @ weight.T) / np.linalg.norm(features, axis=1)[:, None] / np.linalg.norm(weight, axis=1)
    logits = {"ldam + tau": cosines, "ldam + la": 30 * cosines - np.log(np.array(lt.spec.counts) / len(lt.rows))}
    for name, found in logits.items():
        right = found.argmax(1) == lab.data.test.labels.numpy()
        assert result[name]["mean"] == pytest.approx(right.mean())
        if name == "ldam + la":
            sure = np.exp(found - found.max(1, keepdims=True))
            confidence = (sure / sure.sum(1, keepdims=True)).max(1)
            assert result[name]["calibration_error"]["mean"] == pytest.approx(
                calibration_error(confidence, right), abs=1e-4
            )


def test_mislas_sees_the_statistics_of_balanced_draws_only_where_it_is_asked_to(tmp_path):
    lab = experiment_setups.lab(tmp_path)
    methods = "mixup; mislas; mislas(bn_mode='shifted'); ldam_drw; ce_drs"
    result = by_name(compare.compare(lab, settings(methods, seeds=(0,), gaps="none")))
    assert experiment_setups.entries(lab.store, "stage1") == 3
    assert experiment_setups.entries(lab.store, "shifted") == 1
    assert result["mislas"]["backbone"] == result["mixup"]["backbone"]
    assert len({tuple(result[name]["per_class"]) for name in methods.split("; ")[:3]}) == 3
    with pytest.raises(UserError, match="unknown mislas"):
        parse("ce; mislas(bn_mode='moving')", CLASSIFIERS)


def test_a_method_may_not_train_longer():
    with pytest.raises(ValueError, match="may not change 'train'"):
        System(stage1={"train": {"steps": 10**6}})


def test_what_is_written_out_is_not_tried():
    open_, written, product = parse("ce; la; la(1.0) + mixup(1.0); mixup + lws", CLASSIFIERS)[1:]
    assert [one.call for one in open_.choices()][:2] == ["la(tau=1.0)", "la(tau=0.25)"]
    assert len(open_.choices()) == 7
    assert [one.call for one in written.choices()] == ["la(tau=1.0) + mixup(alpha=1.0)"]
    assert len(product.choices()) == 6


# -- the statistics, written out --------------------------------------------------------------------------------------


def test_p_of_one_seed_is_the_normal_test_of_paired_items():
    difference = np.random.default_rng(0).integers(-1, 2, (1, 200)) + (np.arange(200) < 30)
    mean, deviation = difference.mean(), difference.std(ddof=1)
    assert p_of_zero(difference) == pytest.approx(2 * stats.norm.sf(abs(mean) / (deviation / math.sqrt(200))), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_p_of_several_seeds_is_the_level_whose_interval_ends_at_zero(seed):
    stream = np.random.default_rng(seed)
    values = stream.integers(-1, 2, (4, 60)) + 0.05 * stream.normal(size=(4, 1)) + 0.1
    seeds, items = values.shape
    residual = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    by_seed = values.mean(1).var(ddof=1) / seeds
    noise = (residual**2).sum() / ((seeds - 1) * (items - 1)) / (seeds * items)
    by_item = max(0.0, values.mean(0).var(ddof=1) / items - noise)
    p = p_of_zero(values)
    assert p is not None
    t, z = stats.t.isf(p / 2, seeds - 1), stats.norm.isf(p / 2)
    half = math.sqrt(max(t**2 * by_seed, z**2 * noise) + z**2 * by_item)
    assert abs(values.mean()) == pytest.approx(half, rel=1e-6)
    assert (p < 0.05) == paired(values).excludes_zero()


def test_p_of_a_difference_that_is_everywhere_is_as_good_as_zero():
    assert p_of_zero(np.ones((3, 60)) + 1e-9 * np.random.default_rng(0).normal(size=(3, 60))) < 1e-9


def test_p_where_there_is_no_interval_or_no_difference():
    assert p_of_zero(np.ones((2, 10))) is None
    assert p_of_zero(np.zeros((3, 10))) == 1.0
    assert p_of_zero(np.ones((3, 10))) == 0.0


@given(st.lists(st.none() | st.floats(0, 1), max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values):
    known = sorted(p for p in p_values if p is not None)
    for level in (0.01, 0.05, 0.2):
        rejected = 0  # Holm 1979: go on while the k-th smallest p is at most level / (m - k + 1)
        while rejected < len(known) and known[rejected] * (len(known) - rejected) <= level:
            rejected += 1
        assert sum(p is not None and p <= level for p in holm(p_values)) == rejected


def calibration_error(confidence, right):
    """Sum over 15 bins of their share times the distance of accuracy and mean confidence (Guo et al. 2017, eq. 3)."""
    total, place = 0.0, np.minimum((confidence * 15).astype(int), 14)
    for b in range(15):
        if (inside := place == b).any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


# -- a comparison ---------------------------------------------------------------------------------------------------


def predictions(lab, name):
    """Return a method's predictions [S, M] and confidences, from what the store holds, by formulas."""
    found, confidences = [], []
    recipe = settings().recipe
    for seed in (0, 1, 2):
        sets = training_sets(lab, settings(), seed)
        lt = sets["lt"]
        mixes = "mixup" in name
        stage1 = recipe.backbone(lt.spec, mix=mixes)
        backbone = lab.backbone(stage1, lt.rows, seed, "")
        features = lab.clean_features(backbone, "test").double().numpy()
        weight, bias = (
            lab.store.read("stage1", backbone_key(stage1, seed)).tensors[f"classifier.{k}"] for k in ("weight", "bias")
        )
        if mixes:
            stage2 = recipe.classifier(lt.spec, sampler="class_balanced")
            key = compare.RunSpec(stage1=stage1, stage2=stage2, seed=seed).key()
            weight, bias = (lab.store.read("stage2", key).tensors[k] for k in ("weight", "bias"))
        logits = features @ weight.double().numpy().T + bias.double().numpy()
        if name.startswith("la"):
            logits = logits - 2 * np.log(np.array(lt.spec.counts) / sum(lt.spec.counts))
        probabilities = np.exp(logits - logits.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        found.append(logits.argmax(1))
        confidences.append(probabilities.max(1))
    return np.array(found), np.array(confidences)


def test_every_number_is_that_of_a_loop(compared):
    lab, result = compared
    labels = lab.data.test.labels.numpy()
    right = {}
    for name, method in by_name(result).items():
        predicted, confidence = predictions(lab, name)
        right[name] = predicted == labels
        assert method["accuracy"] == pytest.approx(right[name].mean(1).tolist())
        assert method["per_class"] == pytest.approx([right[name][:, labels == k].mean() for k in range(10)])
        errors = [calibration_error(c, r) for c, r in zip(confidence, right[name], strict=True)]
        assert method["calibration_error"]["by_seed"] == pytest.approx(errors, abs=1e-4)
    p_values = []
    for name in ("la(tau=2)", "mixup + crt"):
        stored, difference = by_name(result)[name]["difference"], right[name].astype(float) - right["ce"]
        assert stored["points"] == pytest.approx(difference.mean())
        assert stored["ci95"] == pytest.approx(list(paired(difference).ci95))
        p_values.append(stored["p"])
    low, high = sorted(p_values)
    adjusted = sorted(by_name(result)[name]["difference"]["p_holm"] for name in ("la(tau=2)", "mixup + crt"))
    assert adjusted == pytest.approx([min(1, 2 * low), max(min(1, 2 * low), high)])
    assert by_name(result)["ce"]["difference"] is None


def test_the_gaps_add_up_to_the_distance_from_the_full_data(compared):
    result = compared[1]
    ce = by_name(result)["ce"]
    for method in result["methods"]:
        gaps, parts = method["gaps"], ("representation", "classifier")
        assert sum(gaps[part]["points"] for part in parts) == pytest.approx(
            result["reference"]["mean"] - method["mean"]
        )
        assert gaps["representation"]["points"] == pytest.approx(result["reference"]["mean"] - gaps["bound"])
        if method is not ce:
            for part in parts:
                change = gaps[part]["points"] - ce["gaps"][part]["points"]
                assert gaps["change"][part]["points"] == pytest.approx(change)
    assert by_name(result)["la(tau=2)"]["gaps"]["change"]["representation"] == {
        "points": 0.0,
        "ci95": [0.0, 0.0],
        "p": None,
        "p_holm": None,
    }
    for part in ("representation", "classifier"):
        tested = [m["gaps"]["change"][part] for m in result["methods"] if m is not ce]
        known = sorted(one["p"] for one in tested if one["p"] is not None)
        for one in tested:
            if one["p"] is not None:
                steps = [min(1.0, p * (len(known) - k)) for k, p in enumerate(known) if p <= one["p"]]
                assert one["p_holm"] == pytest.approx(max(steps))


def test_the_gaps_are_those_of_swap(compared):
    lab, result = compared
    swap = experiment_setups.EXPERIMENTS["swap"](lab, experiment_setups.settings(seeds=(0, 1, 2)))
    assert result["reference"] == swap["cells"]["true->true"]
    assert by_name(result)["ce"]["gaps"]["bound"] == swap["cells"]["lt->true"]["mean"]
    assert by_name(result)["ce"]["mean"] == swap["stage1"]["lt"]["mean"]


def test_methods_share_backbones_and_all_train_equally_long(compared):
    lab, result = compared
    assert experiment_setups.entries(lab.store, "stage1") == 9, "three seeds of lt, lt with MixUp, and true"
    assert {method["backbone"] for method in result["methods"]} == {"lt", "lt, mix mixup(alpha=1.0)"}
    assert {card["steps"] for card in result["provenance"]} == {12}
    lt = [card for card in result["provenance"] if card["stage1"] == "lt"]
    assert len({(card["seed"], card["subset_sha256"]) for card in lt}) == 3


def test_a_second_run_trains_nothing_and_says_the_same(compared, tmp_path):
    lab, result = compared
    again = experiment_setups.lab(lab.store.root)
    timeless = experiment_setups.timeless
    repeated = compare.compare(again, settings())
    assert again.trained == 0
    for one in (result := json.loads(json.dumps(result)), repeated):
        for method in one["methods"]:
            del method["seconds"]
    assert timeless(json.loads(json.dumps(repeated))) == timeless(result)


def test_an_interrupted_run_loses_nothing(tmp_path, monkeypatch):
    lab, done = experiment_setups.lab(tmp_path), []
    scored = compare._scored

    def interrupted(*arguments):
        done.append(arguments)
        if len(done) == 3:
            raise KeyboardInterrupt
        return scored(*arguments)

    monkeypatch.setattr(compare, "_scored", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(lab, settings(seeds=(0,)))
    monkeypatch.undo()
    finished = lab.trained
    again = experiment_setups.lab(tmp_path)
    compare.compare(again, settings(seeds=(0,)))
    whole = experiment_setups.lab(tmp_path)
    compare.compare(whole, settings(seeds=(0,)))
    assert finished > 0
    assert finished + again.trained == 7, "three backbones, the classifier of cRT and three trained on D*"
    assert whole.trained == 0


def test_the_plan_is_what_is_trained(tmp_path):
    lab = experiment_setups.lab(tmp_path)
    plan = compare.plan(lab, settings(seeds=(0, 1)))
    assert plan["to_train"] == {"backbone": 6, "classifier": 8}
    assert experiment_setups.entries(lab.store, "stage1") == 0
    compare.compare(lab, settings(seeds=(0, 1)))
    assert lab.trained == 14
    after = compare.plan(lab, settings(seeds=(0, 1)))
    assert after["to_train"] == {"backbone": 0, "classifier": 0}
    assert len(after["plan"]) == 14


def test_without_the_full_data_the_representation_is_set_against_the_baseline(compared):
    lab, whole = compared
    bounds = compare.compare(experiment_setups.lab(lab.store.root), settings(gaps="bounds"))
    assert bounds["reference"] is None
    for one, other in zip(bounds["methods"], whole["methods"], strict=True):
        assert one["gaps"]["representation"] is None
        assert {**one["gaps"], "representation": 0} == {**other["gaps"], "representation": 0}
    none = compare.compare(experiment_setups.lab(lab.store.root), settings(gaps="none"))
    assert [method["gaps"] for method in none["methods"]] == [None] * 3


@pytest.mark.parametrize("method", ["focal(gamma=-1)", "crt_smoothed(head=2)", "loss:focl", "loss:ldam"])
def test_what_cannot_be_used_is_refused_before_anything_is_trained(tmp_path, method):
    lab = experiment_setups.lab(tmp_path)
    with pytest.raises(UserError):
        compare.compare(lab, settings(f"ce; {method}"))
    assert lab.trained == 0


def test_the_published_value_may_stand_beside_the_chosen_one(tmp_path):
    result = compare.compare(
        experiment_setups.lab(tmp_path), settings("ce; la; la(tau=1)", tune="cut", gaps="none", seeds=(0,))
    )
    assert by_name(result)["la(tau=1)"]["calls"] == ["la(tau=1.0)"]


def test_a_change_without_effect_is_told(tmp_path):
    result = compare.compare(
        experiment_setups.lab(tmp_path), settings("ce; loss:equalization", seeds=(0,), gaps="none")
    )
    assert [text for text in result["warnings"] if "loss:equalization predicts the same as ce" in text]


# -- hyper-parameters -----------------------------------------------------------------------------------------------


def test_the_cut_is_a_tenth_of_each_class_the_same_for_all(tmp_path):
    lab = experiment_setups.lab(tmp_path)
    lt = training_sets(lab, settings(), 0)["lt"]
    held_out = compare._cut(lab, lt, 0)
    labels = lab.data.train.labels.numpy()[lt.rows]
    for k, images in enumerate(lt.spec.counts):
        expected = 0 if images == 1 else max(1, round(images / 10))
        assert held_out[labels == k].sum() == expected
    assert np.array_equal(held_out, compare._cut(lab, lt, 0))
    assert not np.array_equal(held_out, compare._cut(lab, lt, 1))
    rest = lab.without(lt, held_out)
    assert {*rest.rows} | {*lt.rows[held_out]} == {*lt.rows}
    assert not {*rest.rows} & {*lt.rows[held_out]}
    assert sum(rest.spec.counts) == len(rest.rows)


def test_what_is_chosen_does_best_on_the_cut_and_never_sees_the_test_images(tmp_path, monkeypatch):
    lab = experiment_setups.lab(tmp_path)
    chosen_before_any_test, clean = [], lab.clean_features

    def watched(backbone, split, rows=None):
        if split == "test":
            chosen_before_any_test.append(backbone.key)
            raise KeyboardInterrupt
        return clean(backbone, split, rows)

    monkeypatch.setattr(lab, "clean_features", watched)
    sets = training_sets(lab, settings(), 0)
    methods = parse("ce; la", CLASSIFIERS)
    found = compare._choose(lab, settings().recipe, methods, sets["lt"], 0, [])
    assert not chosen_before_any_test
    held_out = compare._cut(lab, sets["lt"], 0)
    rest, rows = lab.without(sets["lt"], held_out), sets["lt"].rows[held_out]
    backbone = lab.backbone(settings().recipe.backbone(rest.spec), rest.rows, 0, "")
    assert not {*rest.rows} & {*rows}
    logits = clean(backbone, "train", rows) @ backbone.weight.T + backbone.bias
    labels, prior = lab.data.train.labels[torch.from_numpy(rows)], torch.tensor(rest.spec.counts) / len(rest.rows)
    best: dict[float, float] = {}
    for tau in (1.0, 0.25, 0.5, 0.75, 1.25, 1.5, 2.0):
        predicted = (logits - tau * prior.log()).argmax(1)
        recalls = [float((predicted[labels == k] == k).float().mean()) for k in labels.unique()]
        best[tau] = round(float(np.mean(recalls)), 6)
    assert found[0].call == "ce"
    assert found[1].call == f"la(tau={max(best, key=best.__getitem__)})"


def test_chosen_values_are_told_for_each_seed(tmp_path):
    result = compare.compare(experiment_setups.lab(tmp_path), settings("ce; la", tune="cut", gaps="none", seeds=(0, 1)))
    calls = by_name(result)["la"]["calls"]
    assert len(calls) == 2
    assert all(call.startswith("la(tau=") for call in calls)
    assert "tenth" in result["rule"]


# -- the result -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gaps", ["all", "bounds", "none"])
@pytest.mark.parametrize("seeds", [(0,), (0, 1), (0, 1, 2)], ids=len)
def test_a_report_of_every_kind_of_comparison(compared, tmp_path, gaps, seeds):
    lab = compared[0]
    result = compare.compare(experiment_setups.lab(lab.store.root), settings(gaps=gaps, seeds=seeds))
    (tmp_path / "compare.json").write_text(json.dumps(result))
    stored = Comparison(read(tmp_path / "compare.json", "compare"))
    page = build(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert page.name == "report.html"
    assert stored.headline.split(" ")[0] in text
    assert stored.plots == ([] if gaps == "none" else ["plane"]) + ["methods"]
    assert stored.tables == ["methods", "gaps", "classes"]
    assert stored.verb == "compare"
    assert "mixup + crt" in stored.summary()
    assert "<svg" in stored._repr_html_()
    assert "None" not in stored.summary()


def test_a_comparison_beside_others_has_a_page_of_its_own(compared, tmp_path):
    lab, result = compared
    swap = experiment_setups.EXPERIMENTS["swap"](lab, experiment_setups.settings(seeds=(0,)))
    for name, one in (("compare", result), ("swap", swap)):
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    assert build(tmp_path, figures=False).name == "report.html"
    assert (tmp_path / "compare.html").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"baseline": "x"}, "'baseline' names none"),
        ({"reference": None}, "does not go with 'reference'"),
        ({"methods": []}, "methods"),
    ],
)
def test_a_damaged_result_is_refused_in_one_line(compared, tmp_path, change, said):
    (tmp_path / "compare.json").write_text(json.dumps(compared[1] | change))
    with pytest.raises(UserError) as error:
        build(tmp_path)
    assert said in str(error.value)


def test_the_command_line_compares_plans_and_refuses(tailscope_, tmp_path):
    run = ("compare", "--data", "digits", "--profile", "exp:20", "--recipe", "demo", "--seeds", 1, "--out", tmp_path)
    planned = tailscope_(*run, "--methods", "ce; la", "--plan")
    assert (planned.code, planned.err) == (0, "")
    assert "to train: 2 backbones and 2 classifiers" in planned.out
    assert not (tmp_path / "compare.json").exists()
    ended = tailscope_(*run, "--methods", "ce; la")
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert "la" in ended.out
    assert (tmp_path / "report.html").exists()
    other = tailscope_(*run, "--methods", "ce; tau")
    assert (other.code, "methods differ" in other.err) == (2, True)
    wrong = tailscope_(*run, "--methods", "ce; la", "--tune", "test")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert "unknown --tune 'test'" in wrong.err


EVERY = """
ce; la; tau; ncm; lws; disalign; crt; crt_smoothed; mislas; focal; class_balanced; cost_sensitive; ce_drw; ce_drs;
ldam; ldam_drw; balanced_softmax; balanced_softmax_augmented; label_aware_smoothing; square_root_sampling;
class_balanced_sampling; mixup; mixup + crt; mixup + ce_drw; remix + ce_drw; bag_of_tricks; ssp;
ssp + balanced_softmax; autoaugment; bbn; pseudo_labels
"""


@pytest.mark.slow
def test_all_that_there_is_on_digits_within_ten_minutes(tmp_path):
    """31 methods on 22 backbones. What re-balancing is for is seen even here: it closes the classifier gap."""
    started = time.monotonic()
    result = tailscope.compare("digits", methods=EVERY, recipe="demo", seeds=1, out=tmp_path)
    assert time.monotonic() - started < 600
    methods = by_name(result)
    assert len(methods) == 31
    ce = methods["ce"]
    for name in ("la", "crt", "balanced_softmax", "ldam_drw"):
        assert methods[name]["mean"] > ce["mean"]
        assert methods[name]["groups"]["tail"] > ce["groups"]["tail"]
    assert methods["la"]["gaps"]["change"]["classifier"]["ci95"][1] < 0
    assert ce["gaps"]["representation"]["ci95"][0] > 0
    assert (tmp_path / "report.html").exists()
