"""The report's sentences, tables, files and page against the stored results they are made from."""

import csv
import html
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import result_factory as factory
from diagnosis_cases import scattered
from tailscope import paper, report
from tailscope.errors import UserError
from tailscope.groups import GROUPS
from tailscope.measures.fields import COLLAPSE
from tailscope.report import charts, marks, rows, schema, story, text
from tailscope.report.text import Column, Table, latex

DOCS = Path(__file__).resolve().parents[1] / "docs"
NASTY = ["<script>alert(1)</script>", "a, b", "=SUM(A1)", '50 % "_&#', "na\nme", "{x}", "|pipe|", "[y]", "ü–→", "\\z"]


def everything(**kwargs):
    return {
        "swap": factory.swap(**kwargs),
        "ladder": factory.ladder(**kwargs),
        "geometry": factory.geometry(**kwargs),
        "claims": factory.claims(),
    }


@pytest.fixture(scope="module")
def digits():
    return everything(names=NASTY)


@pytest.fixture(scope="module")
def drawn(digits):
    return charts.figures(digits)


@pytest.fixture(scope="module")
def built(tmp_path_factory, digits):
    out = factory.write(tmp_path_factory.mktemp("report"), **digits)
    return out, report.build(out)


def embedded(page, name):
    """Return the JSON that the page carries under an id."""
    return json.loads(re.search(rf'id="{name}">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)[1])


def test_noise_is_said_of_a_class_with_the_average_number_of_test_images():
    swap = factory.swap()
    swap["dataset"]["test_images"] = 100 * len(swap["counts"])  # of which a rare class may have few
    found = story.noise_of_recall(swap)
    assert "with 100 test images, as many as a class has on average, by up to 9.8 points; with fewer, by more" in found


def embedded_charts(page):
    return page.read_text(encoding="utf-8").count('class="chart" data-spec=')


# ---- the factory keeps the schema's promises


@pytest.mark.parametrize("seeds", [1, 2, 3])
@pytest.mark.parametrize("classes", [2, 10, 30])
def test_factory_keeps_the_promises_of_the_schema(classes, seeds):
    swap = factory.swap(classes, seeds, per_class=20)
    assert set(swap["cells"]) == set(factory.CELLS)
    for cell in swap["cells"].values():
        assert len(cell["accuracy"]) == seeds
        assert len(cell["per_class"]) == classes
        assert cell["mean"] == pytest.approx(sum(cell["per_class"]) / classes)
        assert (cell["ci95"] is None) == (seeds == 2)
    parts = swap["attribution"]
    assert parts["representation"]["points"] + parts["classifier"]["points"] == pytest.approx(parts["gap"])
    geometry = factory.geometry(classes, seeds)
    for encoder in geometry["encoders"].values():
        assert list(encoder["seeds"]) == [str(seed) for seed in range(seeds)]
        for variant in schema.VARIANTS:
            entries = [run[variant]["classes"] for run in encoder["seeds"].values()]
            for k, mean in enumerate(encoder["mean"][variant]["classes"]):
                assert mean["variance"] == pytest.approx(sum(entry[k]["variance"] for entry in entries) / seeds)
    json.dumps([swap, geometry, factory.ladder(classes, seeds, per_class=20), factory.claims()], allow_nan=False)


# ---- reading


def test_load_reads_what_is_there(tmp_path, digits):
    factory.write(tmp_path, swap=digits["swap"], claims=digits["claims"])
    (tmp_path / "notes.json").write_text("{")
    assert report.load(tmp_path) == {"swap": digits["swap"], "claims": digits["claims"]}


def test_a_folder_without_results_is_told_from_one_that_is_not_there(tmp_path):
    (tmp_path / "file").write_text("")
    for name, said in {
        "no": "no such folder",
        "file": "not a folder",
        "": r"ladder\.json, .*, diagnosis\.json,",
    }.items():
        with pytest.raises(UserError, match=said):
            report.build(tmp_path / name)


def broken(**changes):
    result = factory.swap(3, 1, per_class=5) | changes
    return json.dumps({key: value for key, value in result.items() if value is not ...})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no results"),
        ("", "the file is empty"),
        (broken()[:-40], "not valid JSON"),
        ("[]", "'schema' is 'list'"),
        ("{}", "'schema' is None"),
        (broken(schema="tailscope.swap/2"), "expected 'tailscope.swap/1'"),
        (broken(schema="tailscope.ladder/1"), "expected 'tailscope.swap/1'"),
        (broken(cells=...), "'cells' is missing"),
        (broken(cells={}), "'cells' is {}"),
        (broken(cells={"lt->lt": factory.swap(3, 1)["cells"]["lt->lt"]}), "'cells.lt->true' is missing"),
        (broken(seeds=["0", 1, 2]), "'seeds.0' is '0': input should be a valid integer"),
        (broken(counts=[5, -4]), "'counts.1' is -4"),
        (broken(seeds=[0, 1]), "'cells.lt->lt.accuracy' has 1 entries, expected 2"),
        ("null", "'schema' is 'NoneType'"),
        ("[" * 101 + "]" * 101, "nests deeper than 100 levels"),
        (broken(attribution={"gap": 0.1}), "'attribution.gap_ci95' is missing"),
        (broken(cells={name: {"mean": 0.5} for name in factory.CELLS}), "'cells.lt->lt.accuracy' is missing"),
        (broken(dataset={"name": "digits"}), "'dataset.class_names' is missing"),
        (broken(counts=[5, 4]), "different lengths"),
        (broken(warnings=[float("nan")]), "NaN"),
    ],
)
def test_load_refuses_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "swap.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        report.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_nothing_is_left_behind_where_out_cannot_be_written(tmp_path, digits):
    factory.write(tmp_path, swap=digits["swap"])
    (tmp_path / "tables").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot be written"):
        report.build(tmp_path, figures=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["swap.json", "tables"]


# ---- numbers as text


@given(st.floats(-2, 2))
def test_percent_is_the_number_rounded(value):
    shown = text.percent(value)
    assert float(shown.removesuffix(" %").replace(text.MINUS, "-")) == pytest.approx(100 * value, abs=0.0501)
    assert "-" not in shown
    assert not shown.startswith(f"{text.MINUS}0.0 ")


ANOTHER_MINUS = re.compile(r"(?:^|[\s(\[|])-\d", re.MULTILINE)
ANOTHER_PERCENT = re.compile(r"\d%")


def test_numbers_have_one_form_on_pages_in_tables_in_the_terminal_and_in_documentation(tailscope_, tmp_path):
    beaten = {"representation": -0.6, "classifier": 0.1}
    results = everything() | {"swap": factory.swap(matched=True, **beaten)}
    report.build(factory.write(tmp_path / "trained", **results), figures=False)
    train, unseen = scattered()
    for name, (features, labels) in {"train": train, "unseen": unseen}.items():
        np.savez(tmp_path / f"{name}.npz", features=features, labels=labels)
    given = (
        "--train",
        tmp_path / "train.npz",
        "--unseen",
        tmp_path / "unseen.npz",
        "--permutations",
        19,
        "--ceiling",
        0.3,
    )
    told = tailscope_("diagnose", *given, "--out", tmp_path / "diagnosed").out
    texts = {
        "terminal": told,
        "story": "\n".join([*story.findings(results), *story.caveats(results)]),
        "summary": "\n".join(dict(story.summary_rows(results)).values()),
    }
    for path in [*tmp_path.glob("*/*.html"), *tmp_path.glob("*/tables/*.md")]:
        visible = re.sub(r"<(style|script|pre).*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        texts[str(path)] = html.unescape(re.sub(r"<[^>]+>", " ", visible))
    texts |= {name: (DOCS / name).read_text(encoding="utf-8") for name in ("measures.md", "tutorial-cifar100.md")}
    assert text.MINUS in told
    assert sum(text.MINUS in one for one in texts.values()) > 5
    for where, one in texts.items():
        found = ANOTHER_MINUS.search(one) or ANOTHER_PERCENT.search(one)
        assert found is None, f"{where}: {one[found.start() - 40 : found.end() + 20]}"


def test_undefined_is_a_dash_everywhere():
    for write in (text.number, text.percent, text.points, text.significant, text.p_value):
        assert write(None) == "–"
    for kind in ("text", "count", "share", "whole", "points", "degrees", "plain", "p"):
        assert Column("x", "x", kind).written({"x": None}) == "–"


# ---- the story


def test_verdict_names_share_gap_and_intervals(digits):
    swap = digits["swap"]
    part = swap["attribution"]["representation"]
    low, high = (round(100 * bound) for bound in part["share_ci95"])
    gap_low, gap_high = (f"{100 * bound:.1f}" for bound in swap["attribution"]["gap_ci95"])
    sentence = story.verdict(swap)
    assert f"The representation accounts for {round(100 * part['share'])} % [{low}, {high}] of the gap" in sentence
    assert f"{100 * swap['attribution']['gap']:.1f} points [{gap_low}, {gap_high}]" in sentence
    assert f"{100 * swap['cells']['lt->lt']['mean']:.1f} %" in sentence
    assert story.findings(digits)[0] == sentence


@pytest.mark.parametrize(
    ("swap", "headline", "sentence", "caveat"),
    [
        ({}, "representation is the larger", "accounts for", None),
        (
            {"representation": 0.1, "classifier": 1.2, "per_class": 200},
            "classifier is the larger",
            "accounts for",
            None,
        ),
        ({"representation": 0.02, "classifier": 0.02}, "No clear long-tail gap", "includes 0", None),
        ({"representation": -0.6, "classifier": 0.0}, "No long-tail gap", "no long-tail gap to explain", None),
        ({"seeds": 1}, "in this pair of trainings", "accounts for", "this pair of trainings only"),
        ({"seeds": 2}, "without an interval", "splits into", "points only"),
        ({"seeds": 2, "representation": -0.6, "classifier": 0.0}, "No long-tail gap", "no long-tail gap", "points"),
        ({"representation": 0.9, "classifier": 0.87}, "order", "accounts for", "Order matters"),
        ({"converged": False}, "", "", "Not converged"),
    ],
)
def test_story_says_no_more_than_the_numbers_allow(swap, headline, sentence, caveat):
    results = {"swap": factory.swap(**{"converged": True, **swap})}
    assert headline in story.headline(results)
    assert sentence in story.findings(results)[0]
    caveats = " ".join(story.caveats(results))
    assert caveat in caveats if caveat else caveats == ""
    share = results["swap"]["attribution"]["representation"]["share"]
    assert ("% [" in story.findings(results)[0].split("gap")[0]) == (share is not None)


def test_split_of_recalls_agrees_with_the_attribution(digits):
    swap = digits["swap"]
    for row in rows.classes({"swap": swap}):
        for part in ("gap", "representation", "classifier"):
            assert row[part] == pytest.approx(swap["attribution"]["per_class"][part][row["index"]], abs=1e-12)


def test_order_matters_as_the_attribution_says():
    for representation in (0.2, 0.5, 0.9):
        swap = factory.swap(representation=representation, classifier=0.5)
        told = any(line.startswith("Order matters") for line in story.caveats({"swap": swap}))
        assert told == swap["attribution"]["order_matters"]


def test_matched_rows_split_the_parts_again():
    results = {"swap": factory.swap(matched=True)}
    stored = results["swap"]["attribution"]["matched"]["representation"]
    sentence = next(line for line in story.findings(results) if "come with imbalance" in line)
    for step in ("imbalance", "sample_count"):
        assert f"{100 * stored[step]['points']:.1f} points" in sentence


def test_geometry_counts_the_classes_that_most_seeds_flag(digits):
    for encoder in ("lt", "true"):
        seeds = digits["geometry"]["encoders"][encoder]["seeds"].values()
        expected = 0
        for k in range(10):
            entries = [run["calibrated"]["classes"][k] for run in seeds]
            flagged = [entry["spread_gap_q"] is not None and entry["spread_gap_q"] <= 0.05 for entry in entries]
            gap = [entry["spread_gap_deg"] for entry in entries]
            expected += sum(flagged) * 2 > len(flagged) and all(g is not None for g in gap) and sum(gap) > 0
        assert f"{encoder} {expected} of " in " ".join(story.findings(digits))


@pytest.mark.parametrize("verbs", [["swap"], ["ladder"], ["geometry"], ["swap", "ladder", "geometry", "claims"]])
def test_summary_fits_a_terminal(digits, verbs):
    found = story.summary_rows({verb: digits[verb] for verb in verbs})
    assert 2 <= len(found) <= 10
    assert len({label for label, _ in found}) == len(found)


def test_a_summary_ends_with_the_verdict_and_its_numbers():
    swap = factory.swap(representation=0.9, classifier=0.87)
    said = story.conclusion({"swap": swap})
    gap, parts = swap["attribution"]["gap"], [swap["attribution"][part]["points"] for part in story.PARTS]
    assert said.startswith(f"Representation and classifier both cost accuracy: of the {100 * gap:.1f} points [")
    assert said.endswith(
        f"{100 * parts[0]:.1f} are due to the representation and {100 * parts[1]:.1f} to the classifier."
    )
    unclear = {"swap": factory.swap(representation=0.02, classifier=0.02)}
    assert story.conclusion(unclear) == f"{story.headline(unclear)}."


def test_files_of_different_experiments_are_called_out():
    results = {"swap": factory.swap(5), "ladder": factory.ladder(6, name="cifar10", per_class=10)}
    warnings = " ".join(story.caveats(results))
    assert "differ in their data set" in warnings
    assert "differ in their counts" in warnings


def test_results_of_one_name_whose_recipes_or_subsets_differ_are_told_apart():
    spec = {
        "fingerprint": "f", "protocol": "nested", "subset_seed": None, "seeds": [0, 1], "matched": True,
        "permutations": 999, "backbones": ["lt"], "recipe": {"name": "demo", "card": "c", "stage2_loss": "focal"},
    }  # fmt: skip

    def told(verb, **changes):
        results = {"swap": factory.swap(seeds=2), verb: getattr(factory, verb)(seeds=2)}
        results["swap"]["spec"] = spec
        results[verb]["spec"] = {**spec, "seeds": [0], "matched": False, "permutations": 9, **changes}
        del results[verb]["spec"]["backbones"]
        return [line.partition("their ")[2].partition(":")[0] for line in rows.mismatches(results)]

    assert told("ladder") == told("geometry") == []
    assert told("geometry", fingerprint="g", protocol="ldam", subset_seed=1) == ["images", "protocol", "subset seed"]
    plain = {"name": "demo", "card": "other"}
    assert (told("geometry", recipe=plain), told("ladder", recipe=plain)) == ([], ["recipe's stage2_loss"])
    assert told("geometry", recipe={**plain, "loss": "focal", "stage1": {}}) == ["recipe's loss", "recipe's stage1"]


def test_claims_of_other_results_are_told():
    results = {"swap": factory.swap(seeds=2), "claims": factory.claims()}
    assert rows.mismatches(results) == []  # older files do not say whose they are
    results["claims"]["spec"] = results["swap"]["spec"]
    assert rows.mismatches(results) == []
    results["swap"] = {**results["swap"], "spec": {**results["swap"]["spec"], "seeds": [0, 1, 2]}}
    assert "claims.json was decided by another swap.json" in " ".join(rows.warnings(results))


@pytest.mark.parametrize("name", ["cifar10-fast", "cifar10-paper", "cifar100-fast"])
def test_stored_results_of_one_folder_belong_together(name):
    assert rows.mismatches(rows.load(Path(__file__).parents[1] / "results" / name)) == []


# ---- tables


@pytest.mark.parametrize("classes", [2, 10])
def test_csv_holds_every_number_in_full(classes, tmp_path):
    results = everything(classes=classes, seeds=3)
    written = report.write_tables(tmp_path, results)
    assert len(written) == 3 * len(rows.tables(results))
    with (tmp_path / "tables" / "swap.csv").open(newline="", encoding="utf-8") as file:
        stored = {row["pair"]: row for row in csv.DictReader(file)}
    for name, cell in results["swap"]["cells"].items():
        row = stored[name.replace("->", " → ")]
        assert float(row["mean"]) == cell["mean"]
        assert [float(row["ci_low"]), float(row["ci_high"])] == cell["ci95"]
        assert [float(row[f"seed_{seed}"]) for seed in range(3)] == cell["accuracy"]
        for group in GROUPS:
            assert row[group] == ("" if cell["groups"][group] is None else repr(cell["groups"][group]))
    with (tmp_path / "tables" / "geometry-classes-paper.csv").open(newline="", encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    stored_first = results["geometry"]["encoders"]["lt"]["mean"]["paper"]["classes"][0]
    assert float(first["variance"]) == stored_first["variance"]
    assert stored_first["center_shift_deg"] is None
    assert first["center_shift_deg"] == ""


def test_swap_and_ladder_tables_have_the_geometric_and_harmonic_mean_of_recalls():
    results = {"swap": factory.swap(per_class=200), "ladder": factory.ladder(per_class=200)}
    stored = {table.name: table for table in rows.tables(results)}
    cells = [*results["swap"]["cells"].values()]
    rungs = [cell for of in results["ladder"]["augmentations"].values() for cell in of.values()]
    for name, found in (("swap", cells), ("ladder", rungs)):
        assert {"g_mean", "h_mean"} < set(stored[name].fields)
        for row, cell in zip(stored[name].rows, found, strict=True):
            assert row["g_mean"] == pytest.approx(stats.gmean(cell["per_class"]))
            assert row["h_mean"] == pytest.approx(stats.hmean(cell["per_class"]))
    for cell in cells:
        del cell["g_mean"], cell["h_mean"]
    assert not {"g_mean", "h_mean"} & set(rows.tables(results)[0].fields)  # a file from before these were there


def test_collapse_is_shown_of_every_encoder_and_left_out_of_older_files():
    geometry = factory.geometry()
    tables = {table.name: table for table in rows.tables({"geometry": geometry})}
    table = tables["geometry-collapse-calibrated"]
    assert [row["measure"] for row in table.rows] == [measure.title for measure in COLLAPSE.values()]
    stored = geometry["encoders"]["lt+mixup"]["mean"]["calibrated"]["collapse"]["unseen"]
    assert [row["lt+mixup_unseen"] for row in table.rows] == [stored[name] for name in COLLAPSE]
    assert text.to_csv(table).splitlines()[0].startswith("measure,lt_train,lt_unseen,lt+mixup_train")
    for encoder in geometry["encoders"].values():
        for variant in encoder["mean"].values():
            del variant["collapse"]
    assert not any("collapse" in table.name for table in rows.tables({"geometry": geometry}))


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_any_class_name_survives_csv_and_stays_text(names):
    table = Table(
        "t", "t", [Column("name", "class"), Column("x", "x", "share")], [{"name": n, "x": 0.5} for n in names]
    )
    back = list(csv.DictReader(io.StringIO(text.to_csv(table), newline="")))
    for name, row in zip(names, back, strict=True):
        assert row["name"] == (f"'{name}" if name.startswith(text.FORMULA) else name)
        assert not row["name"].startswith(("=", "+", "-", "@"))


@given(st.lists(st.sampled_from(NASTY), min_size=1, max_size=4))
def test_markdown_and_latex_keep_one_row_a_line(names):
    table = Table(
        "t", "t", [Column("name", "class"), Column("x", "x", "points")], [{"name": n, "x": None} for n in names]
    )
    markdown = text.to_markdown(table).splitlines()
    assert len(markdown) == 4 + len(names)
    for line in markdown[4:]:
        assert len(re.findall(r"(?<!\\)\|", line)) == 3
        assert "<" not in line
        assert line.endswith("– |")
    body = text.to_latex(table).split("\\midrule\n")[1].splitlines()[: len(names)]
    for line in body:
        assert len(re.findall(r"(?<!\\)&", line)) == 1
        assert line.endswith(r"& -- \\")
        assert not re.search(r"(?<!\\)[%#_]", line)
        assert not line.startswith("[")


# ---- figures and page


def test_figures_come_in_three_formats(built, drawn):
    out, _ = built
    names = [entry.name for entry in drawn]
    assert {"profile", "attribution", "fig2", "fig3", "classes"} <= set(names)
    assert {f"fig{k}{suffix}" for k in range(4, 9) for suffix in ("", "-calibrated")} <= set(names)
    starts = {"svg": b"<svg", "png": b"\x89PNG", "pdf": b"%PDF"}
    for name in names:
        for suffix, start in starts.items():
            assert (out / "figures" / f"{name}.{suffix}").read_bytes().startswith(start)
        drawing = (out / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert "var(--" not in drawing
        assert "NaN" not in drawing


def test_page_is_small_self_contained_and_escapes_names(built):
    _, page = built
    content = page.read_text(encoding="utf-8")
    assert len(content.encode()) < 3_000_000
    assert "<script>alert" not in content
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in content
    own = re.sub(r"<script>.*?</script>", "", content, flags=re.DOTALL)
    assert not re.search(r"<(link|img|iframe|script|video|audio|object|embed)[^>]+(src|href|data)=", own)
    assert not re.search(r"@import|url\(", own)
    assert "default-src 'none'" in content
    assert content.count("</script>") == 5
    assert list(page.parent.glob("**/.*")) == []


def test_numbers_on_the_page_are_those_of_the_results(built, digits):
    _, page = built
    data = embedded(page, "report-data")
    assert data["cells"]["mean"] == pytest.approx([digits["swap"]["cells"][name]["mean"] for name in schema.CELLS])
    assert data["profile"]["count"] == digits["swap"]["counts"]
    stored = digits["geometry"]["encoders"]["lt"]["mean"]["calibrated"]["classes"]
    assert data["geometry_calibrated"]["spread_gap_deg"][:10] == pytest.approx(
        [entry["spread_gap_deg"] for entry in stored], rel=1e-5
    )
    content = page.read_text(encoding="utf-8").split('id="class-scroll"')[1].split("</table>")[0]
    found = [
        [html.unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall(r"<td>(.*?)</td>", line, re.DOTALL)]
        for line in re.findall(r"<tr(?: [^>]*)?>(<td>.*?)</tr>", content, re.DOTALL)
    ]
    assert [line[0] for line in found] == NASTY
    for k, line in enumerate(found):
        recalls = [digits["swap"]["cells"][name]["per_class"][k] for name in schema.CELLS]
        assert [float(cell.removesuffix("\u00a0%")) for cell in line[4:8]] == pytest.approx(
            [100 * recall for recall in recalls], abs=0.51
        )


def test_undefined_geometry_reaches_the_page_as_null_not_zero(built, digits):
    _, page = built
    data = embedded(page, "report-data")
    assert digits["geometry"]["encoders"]["lt"]["mean"]["paper"]["classes"][0]["escape_rate"] is None
    assert data["geometry_paper"]["escape_rate"][0] is None
    assert 0 not in data["geometry_paper"]["center_shift_deg"]


@pytest.mark.parametrize(
    ("verbs", "classes"), [(["swap"], 2), (["ladder"], 2), (["geometry"], 45), (["swap", "ladder"], 110)]
)
def test_page_is_built_from_whatever_is_there(tmp_path, verbs, classes):
    results = everything(classes=classes, seeds=1)
    factory.write(tmp_path, **{verb: results[verb] for verb in verbs})
    page = report.build(tmp_path, figures=False)
    specs = embedded(page, "report-specs")
    assert len(specs) == embedded_charts(page) > 0
    assert not (tmp_path / "figures").exists()


def test_charts_are_valid_and_have_the_rows_that_they_name(digits, drawn):
    data = charts.data(digits)
    for panel in (panel for entry in drawn for panel in entry.panels):
        spec = panel.chart.to_dict(validate=True)
        inline = spec.get("datasets", {})
        names = marks.data_names(spec)
        assert names <= set(data) | set(inline)
        known = {key for name in names for row in (inline.get(name) or data[name]) for key in row}
        known |= set(re.findall(r'"as": "(\w+)"', json.dumps(spec)))
        assert set(re.findall(r'"field": "(\w+)"', json.dumps(spec))) <= known


def test_the_papers_numbers_are_marked_where_it_printed_some(tmp_path):
    results = {"swap": factory.swap(name="cifar10"), "ladder": factory.ladder(name="cifar10")}
    data = charts.data(results)
    assert {row["cell"]: row["paper"] for row in data["cells"]} == paper.table1("cifar10-lt")
    marked = {f"{row['augmentation']}: {row['rung']}": row["paper"] for row in data["ladder"]}
    assert marked == paper.figure3("cifar10-lt")
    for drawn in (
        data["cells"],
        data["ladder"],
    ):  # a column, so that nobody takes a number for that of a tick before it
        assert {row["label_at"] for row in drawn} == {max(row["label_at"] for row in drawn)}
        assert all(row["label_at"] >= row["paper"] for row in drawn)
        assert all(row["text"].endswith(f", paper {100 * row['paper']:.1f}") for row in drawn)
    page = report.build(factory.write(tmp_path, **results)).read_text(encoding="utf-8")
    assert page.count("the paper's number</span>") + page.count("the paper&#39;s number</span>") == 2
    for name, count in (("fig2", 4), ("fig3", 16)):
        svg = (tmp_path / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert "the paper's number" in html.unescape(svg)
        assert len(re.findall(r'aria-roledescription="point"', svg)) >= count
    half = {"swap": factory.swap(name="cifar10", backbones=("lt",))}
    assert [row["paper"] for row in charts.data(half)["cells"]] == [0.7212, 0.8261]


def test_other_data_have_no_marks_of_the_paper(digits, drawn):
    assert {row["paper"] for name in ("cells", "ladder") for row in charts.data(digits)[name]} == {None}
    assert marks.PAPER_KEY not in {key for figure_ in drawn for key in figure_.keys}
    other = factory.swap(name="cifar10")
    other["spec"]["profile"] = "exp:10"
    assert {row["paper"] for row in rows.cells({"swap": other})} == {None}


@pytest.mark.parametrize("backbone", ["lt", "true"])
def test_half_a_swap_is_reported_as_far_as_it_goes(tmp_path, backbone):
    results = {"swap": factory.swap(backbones=(backbone,)), "ladder": factory.ladder(), "claims": factory.claims()}
    assert story.headline(results).startswith("No verdict yet: the backbone trained on the ")
    assert f"{backbone} → true" in story.verdict(results["swap"])
    assert "Gap" not in dict(story.summary_rows(results))
    assert [table.name for table in rows.tables(results)][:2] == ["swap", "ladder"]
    page = report.build(factory.write(tmp_path, **results))
    panels = 1 + 1 + 1 + 1  # profile, Figure 2, recalls without the split, ladder
    assert embedded_charts(page) == panels
    assert not (tmp_path / "figures" / "attribution.svg").exists()
    recalls = embedded(page, "report-data")["recalls"]
    missing = "true_lt" if backbone == "lt" else "lt_lt"
    assert set(recalls[missing]) == {None}


def test_files_of_different_seeds_say_so():
    results = {"swap": factory.swap(seeds=3), "ladder": factory.ladder(seeds=1)}
    assert "The results differ in their number of seeds: swap has 3 and ladder has 1." in story.caveats(results)
    assert not any("One seed" in text for text in story.caveats(results))
    assert not any("number of seeds" in text for text in story.caveats({"swap": results["swap"]}))


def test_an_attribution_without_its_cells_is_refused(tmp_path):
    swap = factory.swap()
    del swap["cells"]["true->lt"]
    with pytest.raises(UserError, match=r"field 'cells.true->lt' is missing"):
        report.load(factory.write(tmp_path, swap=swap))


def test_means_of_two_seeds_have_their_range(digits):
    for row in rows.geometry_classes(digits, "paper"):
        assert row["variance_min"] < row["variance_max"]
        assert row["variance_min"] <= row["variance"] <= row["variance_max"]


@pytest.mark.parametrize(
    ("row", "written"),
    [
        ({"x": 0.0085, "low": 0.0057, "high": 0.0113}, "0.0085 [0.0057, 0.0113]"),
        ({"x": -0.0072, "low": -0.0147, "high": 0.0003}, "−0.0072 [−0.0147, 0.0003]"),
        ({"x": 0.95, "low": 0.9, "high": 1.0}, "0.95 [0.90, 1.00]"),
        ({"x": 12.3, "low": 11.0, "high": 13.5}, "12.3 [11.00, 13.50]"),
    ],
)
def test_an_interval_is_written_with_the_decimals_of_its_value(row, written):
    assert Column("x", "x", "plain", bounds=("low", "high")).written(row) == written


def test_latex_knows_every_character_that_a_line_may_begin_with():
    assert latex("*a* [b] ✓ ✗") == r"{*}a{*} {[}b] $\surd$ $\times$"
