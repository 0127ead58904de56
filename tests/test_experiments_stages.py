"""The two stages: half a swap, stage 1's own classifiers, shifted batch normalisation, and what each card says."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from experiment_setups import EXPERIMENTS, TINY, entries, lab, settings, small_digits, timeless
from tailscope.errors import UserError
from tailscope.experiments.plans import geometry, ladder
from tailscope.experiments.runs import parse_backbones, training_sets
from tailscope.methods import SAMPLERS
from tailscope.methods.augmentations import build
from tailscope.seeds import torch_stream
from tailscope.spec import DataSpec, RunSpec, backbone_key
from tailscope.training.recipes import Recipe

SHIFTED = TINY.with_bn_mode("shifted")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole swap, half of one, and a swap and ladder with shifted statistics, over one store."""
    folder, data = tmp_path_factory.mktemp("stages"), small_digits()
    results = {}
    for name, verb, changes in (
        ("half", "swap", {"backbones": ("lt",)}),
        ("whole", "swap", {}),
        ("shifted", "swap", {"recipe": SHIFTED}),
        ("ladder", "ladder", {"recipe": SHIFTED}),
    ):
        results[name] = EXPERIMENTS[verb](lab(folder, data), settings(seeds=(0,), **changes))
        if name == "half":
            trained = entries(lab(folder, data).store, "stage1")
    return SimpleNamespace(folder=folder, data=data, results=results, trained_by_half=trained)


# -- half a swap ---------------------------------------------------------------------------------------------------


def test_half_a_swap_trains_one_backbone_and_equals_its_half_of_the_whole(run):
    half, whole = run.results["half"], run.results["whole"]
    assert run.trained_by_half == 1
    assert list(half["cells"]) == ["lt->lt", "lt->true"]
    assert half["cells"] == {name: whole["cells"][name] for name in half["cells"]}
    assert half["stage1"] == {"lt": whole["stage1"]["lt"]}
    assert half["attribution"] is None
    assert any("attribution" in text for text in half["warnings"])
    assert half["spec"]["backbones"] == ["lt"]
    assert "backbones" not in whole["spec"]
    assert json.loads(json.dumps(half, allow_nan=False)) == half


def test_stage_1_is_the_backbones_own_classifier(run):
    own = lab(run.folder, run.data)
    sets = training_sets(own, settings(), 0)
    for name, cell in run.results["whole"]["stage1"].items():
        backbone = own.backbone(TINY.backbone(sets[name].spec), sets[name].rows, 0, "")
        features = own.clean_features(backbone, "test")
        with torch.no_grad():
            right = backbone.model.classifier(features).argmax(1) == run.data.test.labels
        assert cell["accuracy"] == [pytest.approx(right.double().mean().item())]
    assert run.results["ladder"]["augmentations"]["none"]["stage1"] == run.results["whole"]["stage1"]["lt"]


@pytest.mark.parametrize(
    ("text", "matched", "expected"),
    [
        ("lt", False, ("lt",)),
        ("true", True, ("true",)),
        ("matched, lt", True, ("lt", "matched")),
        ("true,lt", False, None),
        (None, True, None),
    ],
)
def test_backbones_are_parsed(text, matched, expected):
    assert parse_backbones(text, matched=matched) == expected


@pytest.mark.parametrize("text", ["", ",", "tail", "lt,matched"])
def test_unknown_backbones_are_refused(text):
    with pytest.raises(UserError, match=r"--backbones .*(expected some of|known:) lt, true"):
        parse_backbones(text)


# -- shifted batch normalisation -----------------------------------------------------------------------------------


def test_shifted_statistics_are_those_of_pytorchs_update_bn(run):
    """An independent implementation of the cumulative average, on the same augmented draws."""
    own = lab(run.folder, run.data)
    sets = training_sets(own, settings(), 0)
    stage1, stage2 = SHIFTED.backbone(sets["true"].spec), SHIFTED.classifier(sets["lt"].spec, sampler="class_balanced")
    backbone = own.backbone(stage1, sets["true"].rows, 0, "")
    before = copy.deepcopy(backbone.model.state_dict())
    rows = sets["lt"].rows
    shifted = own.for_stage2(backbone, stage2, rows, 0)

    labels = run.data.train.labels.numpy()[rows]
    draw = torch_stream(0, "stage2", "draw", 0)
    drawn = rows[SAMPLERS.make("class_balanced", torch.from_numpy(labels), 10)(len(rows), draw).numpy()]
    drawn = drawn[torch.randperm(len(drawn), generator=torch_stream(0, "stage2", "bn")).numpy()]
    images = build(stage2.augment)(run.data.train.images[drawn], torch_stream(0, "stage2", "augment", 0))
    reference = copy.deepcopy(backbone.model)
    with torch.no_grad():
        torch.optim.swa_utils.update_bn([own.normalize(batch) for batch in images.split(500)], reference)
    expected, found = reference.state_dict(), shifted.model.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
        running = "running" in name or "num_batches" in name
        assert running or torch.equal(found[name], before[name])  # weights and affine parameters are fixed
    assert any(not torch.allclose(found[n], before[n], rtol=0.01) for n in found if "running_mean" in n)
    assert not any(layer.training for layer in shifted.model.modules() if isinstance(layer, nn.BatchNorm2d))
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, before[name])  # the stored backbone is left alone


def test_test_features_and_accuracy_use_the_shifted_statistics(run):
    own = lab(run.folder, run.data)
    sets = training_sets(own, settings(), 0)
    stage1, stage2 = SHIFTED.backbone(sets["lt"].spec), SHIFTED.classifier(sets["true"].spec)
    backbone = own.backbone(stage1, sets["lt"].rows, 0, "")
    shifted = own.for_stage2(backbone, stage2, sets["true"].rows, 0)
    with torch.no_grad():
        features = shifted.model.features(own.normalize(run.data.test.images))
    assert not torch.allclose(features, own.clean_features(backbone, "test"), rtol=0.01)
    spec = RunSpec(stage1=stage1, stage2=stage2, seed=0)
    fitted = own.store.read("stage2", spec.key())
    right = (features @ fitted.tensors["weight"].T + fitted.tensors["bias"]).argmax(1) == run.data.test.labels
    accuracy = run.results["shifted"]["cells"]["lt->true"]["accuracy"][0]
    assert accuracy == pytest.approx(right.double().mean().item(), abs=1 / 200 + 1e-9)
    assert fitted.meta["bn_mode"] == "shifted"


def test_shifting_keeps_the_backbones_and_changes_every_classifier(run):
    whole, shifted = run.results["whole"], run.results["shifted"]
    assert shifted["stage1"] == whole["stage1"]
    cards = {name: {row["row"]: row for row in run.results[name]["provenance"]} for name in ("whole", "shifted")}
    assert {row["key"] for row in cards["whole"].values()} == {row["key"] for row in cards["shifted"].values()}
    for row in whole["cells"]:
        assert cards["whole"][row]["stage2_key"] != cards["shifted"][row]["stage2_key"]
    assert shifted["spec"]["recipe"]["bn_mode"] == "shifted"
    assert "bn_mode" not in whole["spec"]["recipe"]
    assert "shifted batch normalisation" in shifted["recipe"]["card"]
    again = EXPERIMENTS["swap"](lab(run.folder, run.data), settings(seeds=(0,), recipe=SHIFTED))
    assert timeless(again) == timeless(shifted)


# -- cards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), [("whole", "frozen"), ("shifted", "shifted"), ("ladder", "shifted")])
def test_a_card_tells_both_stages(run, name, mode):
    own = lab(run.folder, run.data)
    sets = training_sets(own, settings(), 0)
    for card in run.results[name]["provenance"]:
        data = sets[card["stage1"]].spec
        assert (card["subset_sha256"], card["counts"]) == (data.indices_sha256, list(data.counts))
        assert own.store.has("stage1", card["key"])
        if card["stage2"] is None:
            assert {value for field, value in card.items() if field.startswith("stage2_")} == {None}
            assert card["bn_mode"] is None
            continue
        data = sets[card["stage2"]].spec
        assert card["bn_mode"] == mode
        assert (card["stage2_subset_sha256"], card["stage2_counts"]) == (data.indices_sha256, list(data.counts))
        assert card["stage2_profile"] == data.profile
        stored = own.store.read("stage2", card["stage2_key"])
        assert card["stage2_parameters"] == sum(np.prod(tensor.shape) for tensor in stored.tensors.values())
        assert (card["stage2_steps"], card["stage2_batch"]) == (stored.meta["steps"], 64)


# -- another network, another loss -----------------------------------------------------------------------------------


def test_another_network_or_loss_is_another_backbone_and_stands_on_the_card():
    recipe = TINY.with_methods(model="resnet8(width=16)", loss="focal(gamma=1)")
    assert recipe.backbone(DATA).model == "resnet8(width=16)"
    assert recipe.backbone(DATA).loss == "focal(gamma=1.0)"
    assert recipe.classifier(DATA).loss == TINY.classifier(DATA).loss == "cross_entropy"
    assert recipe.card == f"{TINY.card} Stage 1 has the model resnet8(width=16) and the loss focal(gamma=1.0)."
    assert TINY.with_methods(model=None, loss=None) is TINY
    assert TINY.with_methods(model=TINY.model, loss="cross_entropy") is TINY
    assert "loss" not in TINY.model_dump()  # results of before stay results of this recipe
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    for model, loss, says in (("resnet9", None, "unknown model"), (None, "focal(alpha=1)", "unknown argument 'alpha'")):
        with pytest.raises(UserError, match=says):
            TINY.with_methods(model=model, loss=loss)


DATA = DataSpec(
    name="a", fingerprint="f", profile="full", protocol="nested", subset_seed=0, indices_sha256="", counts=(2, 1)
)


def test_every_method_can_be_chosen_for_its_stage():
    recipe = TINY.with_methods(
        sampler="square_root", always_mix="mixup(alpha=1)", stage2_loss="focal", stage2_sampler="class_balanced"
    )
    recipe = recipe.with_schedule("cosine").with_augment(["flip", "crop(padding=2)"])
    stage1, stage2 = recipe.backbone(DATA), recipe.classifier(DATA)
    assert (stage1.sampler, stage1.mix, stage1.loss) == ("square_root", "mixup(alpha=1.0)", "cross_entropy")
    assert (stage2.sampler, stage2.mix, stage2.loss) == ("class_balanced", None, "focal(gamma=2.0)")
    assert stage1.augment == stage2.augment == ("flip", "crop(padding=2)")
    assert (stage1.train.schedule, stage2.train.schedule) == ("cosine", TINY.stage2.schedule)
    assert recipe.classifier(DATA, sampler="instance").sampler == "instance"  # an experiment has the last word
    assert recipe.card == (
        f"{TINY.card} Stage 1 has the sampler square_root and the mixing mixup(alpha=1.0). Stage 2 has the loss"
        " focal(gamma=2.0) and the sampler class_balanced. Stage 1 has the schedule cosine. Images are augmented by"
        " flip, then crop(padding=2)."
    )
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert TINY.with_augment(["none"]).backbone(DATA).augment == ()
    assert TINY.with_augment(None) is TINY.with_schedule(None) is TINY
    assert TINY.with_augment(TINY.augment) is TINY
    with pytest.raises(UserError, match="the recipe demo is for images in memory, not in files"):
        TINY.with_augment(["resized_crop"])


def test_what_is_not_chosen_leaves_keys_as_they_were():
    """The keys of a backbone and a classifier of before there was a choice, computed then."""
    stage1, stage2 = TINY.backbone(DATA), TINY.classifier(DATA)
    assert "plugins" not in stage1.content() | stage2.content()
    assert backbone_key(stage1, 0) == "b27abed531ef2e34e3a110b831208285"
    assert RunSpec(stage1=stage1, stage2=stage2, seed=0).key() == "dc4ee1fd167b34eae980f0ce62e415ab"


# -- the command line ----------------------------------------------------------------------------------------------


def test_half_a_swap_from_the_command_line_reports_what_is_there(tailscope_, tmp_path):
    command = ("swap", "--data", "digits", "--recipe", "demo", "--seeds", 1, "--out", tmp_path)
    shown = tailscope_(*command, "--backbones", "lt", "--bn-mode", "shifted")
    assert (shown.code, shown.err) == (0, "")
    assert "No verdict yet: the backbone trained on the full set is not trained" in " ".join(shown.out.split())
    stored = json.loads((tmp_path / "swap.json").read_text())
    assert (stored["spec"]["backbones"], stored["spec"]["recipe"]["bn_mode"]) == (["lt"], "shifted")
    page = (tmp_path / "report.html").read_text()
    assert "with its own classifier" in page
    assert sorted(path.stem for path in (tmp_path / "figures").glob("*.svg")) == ["classes", "fig2", "profile"]
    assert "true → lt" not in (tmp_path / "tables" / "swap.md").read_text()
    for option, value in (("--backbones", "tail"), ("--bn-mode", "adaptive")):
        refused = tailscope_(*command, "--overwrite", option, value)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert f"unknown {option} {value!r}" in refused.err
    for option, value in (("--loss", "focal(gamma=-1)"), ("--model", "resnet20(width=0)"), ("--loss", "huber")):
        refused = tailscope_(*command, "--overwrite", option, value)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert value.split("(")[0] in refused.err
    changed = tailscope_(*command, "--overwrite", "--backbones", "lt", "--loss", "focal(gamma=1)")
    assert (changed.code, changed.err) == (0, "")
    stored = json.loads((tmp_path / "swap.json").read_text())
    assert stored["spec"]["recipe"]["loss"] == "focal(gamma=1.0)"
    assert "the loss focal(gamma=1.0)" in stored["recipe"]["card"]


def test_the_methods_of_a_command_are_those_of_its_stages(tailscope_, tmp_path):
    swap = ("swap", "--data", "digits", "--recipe", "demo", "--seeds", 1, "--backbones", "lt", "--out", tmp_path)
    chosen = ("--sampler", "square_root", "--mix", "mixup(alpha=0.5)", "--augment", "flip", "--augment", "crop")
    shown = tailscope_(*swap, *chosen, "--stage2-loss", "balanced_softmax", "--stage2-sampler", "class_balanced")
    assert (shown.code, shown.err) == (0, "")
    stage1, stage2 = (
        [json.loads(path.read_text())["spec"] for path in (tmp_path / "store").glob(f"{kind}/*/meta.json")]
        for kind in ("stage1", "stage2")
    )
    assert [(one["sampler"], one["mix"], one["augment"]) for one in stage1] == [
        ("square_root", "mixup(alpha=0.5)", ["flip", "crop(padding=4)"])
    ]
    assert {(one["sampler"], one["loss"]) for one in stage2} == {("class_balanced", "balanced_softmax")}


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("ladder", "--mix", "mixup"), "No such option: --mix"),
        (("ladder", "--stage2-sampler", "instance"), "No such option: --stage2-sampler"),
        (("geometry", "--stage2-loss", "focal"), "No such option: --stage2-loss"),
        (("ladder", "--augment", "autoaugment"), "ladder: its rows add autoaugment(policy="),
        (("swap", "--sampler", "balanced"), "unknown sampler 'balanced'; did you mean 'class_balanced'?"),
        (("swap", "--mix", "mixups"), "unknown mixing 'mixups'; did you mean 'mixup'?"),
        (("swap", "--augment", "flap"), "unknown augmentation 'flap'; did you mean 'flip'?"),
        (("swap", "--schedule", "cosin"), "unknown schedule 'cosin'; did you mean 'cosine'?"),
    ],
)
def test_methods_that_do_not_go_together_are_refused_before_any_training(tailscope_, tmp_path, command, says):
    shown = tailscope_(*command, "--data", "digits", "--recipe", "demo", "--out", tmp_path)
    assert (shown.code, shown.out) == (2, "")
    assert says in shown.err
    assert list(tmp_path.rglob("meta.json")) == []


def test_rows_with_and_without_mixing_are_not_made_of_a_recipe_that_always_mixes(tmp_path):
    mixing = settings(recipe=TINY.with_methods(always_mix="mixup"), seeds=(0,))
    for experiment in (ladder, geometry):
        with pytest.raises(UserError, match="its rows are backbones with and without mixing"):
            experiment(lab(tmp_path), mixing)
