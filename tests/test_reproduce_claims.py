"""The paper's numbers and claims against formulas written out here, SciPy, and results whose truth is known."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import result_factory as factory
from tailscope import paper
from tailscope.intervals import paired
from tailscope.reproduce.claims import check, document, tally
from tailscope.reproduce.evidence import Claim, Evidence, over_seeds, permutation_p, positive, rank_correlation, within
from tailscope.training.recipes import RECIPES

FIELDS = {"claim", "figure", "statistic", "estimate", "ci95", "verdict"}


def by_id(claims):
    return {claim.id: claim for claim in claims}


def cifar(make, **options):
    return make(name="cifar10", **{"converged": True, **options})


# -- what the paper printed ---------------------------------------------------------------------------------------


def test_table1_gives_the_representation_70_per_cent_of_cifar10s_gap():
    a = paper.table1("cifar10-lt")
    representation = 0.5 * (a["true->lt"] - a["lt->lt"] + a["true->true"] - a["lt->true"])
    assert representation == pytest.approx(0.14675)
    assert representation / (a["true->true"] - a["lt->lt"]) == pytest.approx(0.702, abs=5e-4)


@pytest.mark.parametrize("dataset", ["cifar10-lt", "cifar100-lt", "imagenet-lt"])
def test_true_lt_beats_lt_true_in_print(dataset):
    a = paper.table1(dataset)
    assert sorted(a, key=a.get) == ["lt->lt", "lt->true", "true->lt", "true->true"]


def test_every_number_names_its_place_and_whose_it_is():
    printed = paper.read("published.json")
    assert printed["whose"].startswith("the paper's")
    assert all(printed[block]["where"] for block in ("table1", "fig3", "section3"))
    assert len(paper.figure3("cifar10-lt")) == 16
    assert all(0.7 < v < 0.9 for v in paper.figure3("cifar10-lt").values())
    assert paper.table1("digits") == {}


def test_the_recipe_as_printed_is_section_3():
    printed = paper.read("published.json")["section3"]
    recipe = RECIPES["paper-as-printed"]
    for stage, numbers in (("stage1", printed["cifar_stage1"]), ("stage2", printed["stage2"])):
        for field in ("epochs", "batch", "learning_rate", "weight_decay"):
            assert getattr(getattr(recipe, stage), field) == numbers[field]
    first = printed["cifar_stage1"]
    assert recipe.stage1.momentum == first["momentum"]
    assert recipe.model.startswith(first["model"].lower().replace("-", ""))
    drops = ", ".join(map(str, first["drop_epochs"]))
    assert recipe.stage1.schedule == (
        f"multistep(warmup={first['warmup_epochs']}, drops=({drops}), factor={first['drop_factor']})"
    )
    assert recipe.stage2.schedule.startswith(printed["stage2"]["schedule"])
    assert recipe.mix == f"mixup(alpha={printed['mixup_alpha']})"
    assert RECIPES["paper"].stage1 == recipe.stage1.model_copy(update={"learning_rate": 0.1})
    assert RECIPES["paper"].stage2 == recipe.stage2


# -- the statistics ------------------------------------------------------------------------------------------------


def test_permutation_p_is_the_share_of_all_orders():
    rarity, values = np.arange(6.0), np.array([0.1, 0.5, 0.2, 0.9, 0.7, 1.1])
    observed = stats.spearmanr(rarity, values).statistic
    every = [stats.spearmanr(order, values).statistic for order in itertools.permutations(rarity)]
    assert permutation_p(rarity, values) == pytest.approx(np.mean(np.array(every) >= observed - 1e-12), abs=0.006)
    two_sided = np.mean(np.abs(every) >= observed - 1e-12)
    assert permutation_p(rarity, -values, two_sided=True) == pytest.approx(two_sided, abs=0.006)
    assert permutation_p(rarity, -values) > 0.9


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-9, 9)), min_size=3, max_size=12))
def test_rank_correlation_is_spearmans_and_leaves_out_undefined_classes(classes):
    counts, values = np.array(classes, dtype=float).T
    rarity = stats.rankdata(-counts)
    found = rank_correlation(rarity, values)
    if min(len(set(counts)), len(set(values))) == 1:
        assert found is None
    else:
        assert found == pytest.approx(stats.spearmanr(rarity, values).statistic)
    assert rank_correlation(np.append(rarity, 99.0), np.append(values, np.nan)) == found


def test_interval_over_seeds_is_students():
    values = [0.3, 0.5, 0.45]
    t = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert over_seeds(values).ci95_seeds == pytest.approx((t.low, t.high))


@given(st.floats(-1, 1), st.floats(0, 0.5), st.integers(1, 5), st.none() | st.floats(0.0001, 1))
def test_verdicts_follow_the_interval(estimate, half, seeds, p):
    claim = positive(Claim("id", "", "", "", estimate, [estimate - half, estimate + half], p=p, seeds=seeds))
    assert claim.as_claimed == (estimate > 0)
    expected = "undecided"
    if seeds >= 3 and estimate - half > 0 and (p is None or p <= 0.05):
        expected = "holds"
    if seeds >= 3 and estimate + half < 0:
        expected = "fails"
    assert claim.verdict == expected
    assert (claim.reason is None) == (expected != "undecided")


@pytest.mark.parametrize(
    ("ci95", "p", "verdict"),
    [
        ([0.9, 1.2], None, "holds"),
        ([0.9, 1.2], 0.01, "fails"),
        ([0.7, 1.2], None, "undecided"),
        ([0.5, 0.7], None, "fails"),
        ([1.3, 1.7], None, "fails"),
        (None, None, "undecided"),
    ],
)
def test_nearly_equal_is_within_conventional_limits(ci95, p, verdict):
    assert within(Claim("id", "", "", "", 1.0, ci95, p=p, seeds=3), 0.8, 1.25).verdict == verdict


# -- the claims ----------------------------------------------------------------------------------------------------


def with_accuracies(accuracies):
    """Swap and ladder results of three nearly equal seeds around the given accuracies."""
    swap, ladder = cifar(factory.swap), cifar(factory.ladder)
    noise = [-1e-6, 0.0, 1e-6]
    for row, value in accuracies.items():
        name, _, rung = row.partition(": ")
        cell = ladder["augmentations"][name][rung] if rung else swap["cells"][row]
        cell["accuracy"] = [value + (k + len(row)) % 3 * e for k, e in enumerate(noise)]
    return Evidence({"swap": swap, "ladder": ladder})


def test_the_papers_own_numbers_satisfy_every_ordering_and_their_mirror_image_none():
    printed = paper.table1("cifar10-lt") | paper.figure3("cifar10-lt")
    holding = check(with_accuracies(printed))
    assert len(holding) == 3 + 12 + 12
    assert {claim.verdict for claim in holding} == {"holds"}
    assert all(claim.estimate == pytest.approx(claim.published, abs=1e-5) for claim in holding)
    mirrored = check(with_accuracies({row: 1 - value for row, value in printed.items()}))
    assert {claim.verdict for claim in mirrored} == {"fails"}


def test_accuracies_are_compared_item_by_item_where_outcomes_are_known():
    rng = np.random.default_rng(0)
    outcomes = {row: rng.random((3, 400)) < 0.6 for row in factory.CELLS}
    swap = cifar(factory.swap)
    for row, right in outcomes.items():
        swap["cells"][row]["accuracy"] = right.mean(1).tolist()
    claim = check(Evidence({"swap": swap}, outcomes))[0]
    difference = outcomes["true->lt"].astype(float) - outcomes["lt->true"]
    assert claim.estimate == pytest.approx(difference.mean())
    assert claim.ci95 == pytest.approx(paired(difference).ci95)
    assert claim.ci95_kind == "mover"
    alone = check(Evidence({"swap": swap}))[0]
    assert alone.estimate == pytest.approx(claim.estimate)
    assert alone.ci95 == pytest.approx(over_seeds(difference.mean(1).tolist()).ci95_seeds)


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_decide_nothing_but_show_the_sign(seeds):
    swap = cifar(factory.swap, seeds=seeds)
    claims = check(Evidence({"swap": swap, "geometry": cifar(factory.geometry, seeds=seeds)}))
    assert {claim.verdict for claim in claims} == {"undecided"}
    assert all("3 are needed" in claim.reason for claim in claims)
    assert by_id(claims)["table1/representation-is-the-bottleneck"].as_claimed is True


def test_one_seed_decides_item_by_item_for_its_trainings_alone():
    rng = np.random.default_rng(0)
    right = {"lt->lt": 0.3, "lt->true": 0.5, "true->lt": 0.8, "true->true": 0.8}
    outcomes = {row: rng.random((1, 400)) < accuracy for row, accuracy in right.items()}
    swap = cifar(factory.swap, seeds=1, converged=False)
    for row, hits in outcomes.items():
        swap["cells"][row]["accuracy"] = hits.mean(1).tolist()
    geometry = cifar(factory.geometry, seeds=1, converged=False)
    claims = by_id(check(Evidence({"swap": swap, "geometry": geometry}, outcomes)))
    clear = claims["table1/representation-is-the-bottleneck"]
    assert (clear.verdict, clear.ci95_kind) == ("holds", "item")
    assert "one seed" in clear.reason
    assert "shortened" in clear.reason
    assert claims["table1/true-true-is-best"].verdict == "undecided"  # equal accuracies
    assert {claim.verdict for name, claim in claims.items() if name.startswith("fig")} == {"undecided"}
    two = {row: np.repeat(hits, 2, axis=0) for row, hits in outcomes.items()}
    for row, hits in two.items():
        swap["cells"][row]["accuracy"] = hits.mean(1).tolist()
    assert {claim.verdict for claim in check(Evidence({"swap": swap}, two))} == {"undecided"}


def test_claims_about_a_backbone_that_was_not_trained_are_undecided():
    half = cifar(factory.swap, backbones=("lt",))
    claims = by_id(check(Evidence({"swap": half})))
    assert len(claims) == 3
    missing = claims["table1/representation-is-the-bottleneck"]
    assert (missing.verdict, missing.estimate, missing.reason) == ("undecided", None, "not run: true→lt")
    assert missing.published == pytest.approx(0.0845)
    assert claims["table1/better-classifier-helps"].verdict == "holds"


def test_a_shortened_recipe_decides_no_geometry_and_says_so():
    geometry = check(Evidence({"geometry": cifar(factory.geometry, converged=False)}))
    assert {claim.verdict for claim in geometry} == {"undecided"}
    assert all("not converged" in claim.reason and claim.estimate is not None for claim in geometry)
    decided = [c for c in check(Evidence({"swap": cifar(factory.swap, converged=False)})) if c.verdict != "undecided"]
    assert decided
    assert all("shortened" in claim.reason for claim in decided)


def test_geometry_statistics_equal_naive_loops():
    result = cifar(factory.geometry)
    claims = by_id(check(Evidence({"geometry": result})))
    tail = [k for k, group in enumerate(result["groups"]) if group == "tail"]

    def seed_means(encoder, classes, value):
        runs = [run["paper"]["classes"] for run in result["encoders"][encoder]["seeds"].values()]
        return np.array([np.mean([value(run[k]) for k in classes]) for run in runs])

    def gap(entry):
        return entry["spread_true_deg"] - entry["spread_train_deg"]

    shrunk = seed_means("lt", tail, gap) - seed_means("lt+mixup", tail, gap)
    assert claims["fig6/mixup-shrinks-gap"].estimate == pytest.approx(shrunk.mean())
    bounds = stats.ttest_1samp(shrunk, 0).confidence_interval(0.95)
    assert claims["fig6/mixup-shrinks-gap"].ci95 == pytest.approx([bounds.low, bounds.high])

    shift, width = (seed_means("lt", tail, lambda e, f=f: e[f]) for f in ("center_shift_deg", "spread_train_deg"))
    assert claims["fig8/shift-equals-width"].estimate == pytest.approx((shift / width).mean())

    # Class 0 has no unseen samples, so no escape rate: nine classes take part.
    runs = [run["paper"]["classes"] for run in result["encoders"]["lt"]["seeds"].values()]
    assert runs[0][0]["escape_rate"] is None
    rho = [stats.spearmanr(range(1, 10), [e["escape_rate"] for e in run[1:]]).statistic for run in runs]
    assert claims["fig6/escape-grows"].estimate == pytest.approx(np.mean(rho))


def test_geometry_verdicts_follow_the_truth_of_the_results():
    result = cifar(factory.geometry)
    claims = by_id(check(Evidence({"geometry": result})))
    for name in ("fig4/variance-grows", "fig5/first-pc-larger-under-lt", "fig6/escape-grows", "fig6/gap-grows",
                 "fig6/gap-grows-beyond-chance", "fig7/center-shrinks", "fig7/center-shrinks-less-lt+mixup",
                 "fig8/mixup-lowers-shift"):  # fmt: skip
        assert claims[name].verdict == "holds", name
    result["encoders"]["lt"], result["encoders"]["true"] = result["encoders"]["true"], result["encoders"]["lt"]
    swapped = by_id(check(Evidence({"geometry": result})))
    for name in ("fig5/first-pc-larger-under-lt", "fig6/escape-larger-under-lt", "fig4/variance-flat-under-true"):
        assert swapped[name].verdict == "fails", name


def test_a_trend_that_classes_could_show_by_chance_is_undecided():
    result = cifar(factory.geometry)
    shuffled = [3, 0, 8, 1, 9, 2, 5, 4, 6, 7]  # the same in every seed: narrow over seeds, weak over classes
    for run in result["encoders"]["lt"]["seeds"].values():
        for entry, rank in zip(run["paper"]["classes"], shuffled, strict=True):
            entry["variance"] = float(rank)
    claim = by_id(check(Evidence({"geometry": result})))["fig4/variance-grows"]
    assert (claim.verdict, claim.ci95[0] > 0, claim.p > 0.05) == ("undecided", True, True)
    assert "chance" in claim.reason


def test_without_groups_claims_about_the_tail_are_not_measured():
    result = cifar(factory.geometry, classes=2)
    claims = by_id(check(Evidence({"geometry": result})))
    assert claims["fig6/mixup-shrinks-gap"].reason == "not measured"
    assert claims["fig6/mixup-shrinks-gap"].estimate is None


def test_other_data_get_no_orderings_of_figure_3():
    claims = check(Evidence({"swap": factory.swap(), "ladder": factory.ladder()}))
    assert {claim.figure for claim in claims} == {"Table 1, Figure 2"}
    assert all(claim.published is None for claim in claims)


def test_the_document_is_json_with_the_promised_fields():
    evidence = Evidence({"swap": cifar(factory.swap), "geometry": cifar(factory.geometry)})
    claims = check(evidence)
    stored = json.loads(json.dumps(document(evidence, claims, "2026-11-23T08:00:00+00:00"), allow_nan=False))
    assert stored["schema"] == "tailscope.claims/1"
    assert all(set(claim) >= FIELDS for claim in stored["claims"])
    assert len({claim["id"] for claim in stored["claims"]}) == len(claims)
    assert tally(stored["claims"]).endswith("undecided")
