"""The tables beside the paper's, and the page generated from stored results."""

import csv
import io
import json

import numpy as np
import pytest

import result_factory as factory
from scripts.docs_pages import GENERATED, generate, main
from tailscope import paper
from tailscope.errors import UserError
from tailscope.report.text import to_csv, to_markdown
from tailscope.reproduce.claims import build, write
from tailscope.reproduce.evidence import Evidence

PROSE = "# Title\n\nWhy ours differ: *because*.\n"
OVERVIEW = "<!-- results: overview -->\n<!-- /results: overview -->\n"


def tables(**results):
    return {numbers.name: (numbers, written) for numbers, written in build(Evidence(results))}


def read_csv(table):
    return list(csv.DictReader(io.StringIO(to_csv(table))))


def cifar(make, **options):
    return make(**{"name": "cifar10", "converged": True, **options})


def test_table_1_is_paper_ours_difference():
    swap = cifar(factory.swap)
    numbers, written = tables(swap=swap)["table1"]
    rows = {row["cell"]: row for row in read_csv(numbers)}
    for cell, theirs in paper.table1("cifar10-lt").items():
        accuracy = swap["cells"][cell]["accuracy"]
        mean = sum(accuracy) / 3
        sd = (sum((a - mean) ** 2 for a in accuracy) / 2) ** 0.5
        row = rows[cell]
        assert float(row["paper"]) == theirs
        assert float(row["ours"]) == pytest.approx(mean)
        assert float(row["ours_sd"]) == pytest.approx(sd)
        assert float(row["difference"]) == pytest.approx(mean - theirs)
        assert row["close"] == ("yes" if abs(mean - theirs) <= 0.015 else "no")
        shown = f"| {100 * theirs:.2f} % | {100 * mean:.2f} ± {100 * sd:.2f} (3) |"
        assert shown in to_markdown(written)
    assert "NOT" not in written.title


def test_figure_3_has_its_sixteen_cells_even_for_one_seed():
    numbers, written = tables(ladder=cifar(factory.ladder, seeds=1))["fig3"]
    rows = read_csv(numbers)
    assert {row["cell"] for row in rows} == set(paper.figure3("cifar10-lt"))
    assert {row["ours_sd"] for row in rows} == {""}
    assert "±" not in to_markdown(written).split(":---")[-1]


def test_a_shortened_recipe_is_never_called_a_reproduction():
    for _, written in tables(swap=cifar(factory.swap, converged=False)).values():
        assert "NOT a reproduction" in written.title


def test_figures_4_to_8_hold_each_groups_mean_and_deviation():
    geometry = cifar(factory.geometry)
    found = tables(geometry=geometry)
    assert set(found) == {"fig4", "fig5", "fig6", "fig7", "fig8"}
    row = next(r for r in read_csv(found["fig8"][0]) if (r["measure"], r["encoder"]) == ("center_shift_deg", "lt"))
    seeds = geometry["encoders"]["lt"]["seeds"].values()
    values = [run["paper"]["groups"]["tail"]["center_shift_deg"] for run in seeds]
    assert float(row["tail"]) == pytest.approx(np.mean(values))
    assert float(row["tail_sd"]) == pytest.approx(np.std(values, ddof=1))


def test_an_undefined_group_is_empty_not_zero():
    geometry = cifar(factory.geometry)
    for run in geometry["encoders"]["lt"]["seeds"].values():
        run["paper"]["groups"]["head"] = None
    row = read_csv(tables(geometry=geometry)["fig4"][0])[0]
    assert (row["head"], row["head_sd"]) == ("", "")
    assert "–" in to_markdown(tables(geometry=geometry)["fig4"][1])


def test_data_without_printed_numbers_get_ours_alone():
    numbers, written = tables(swap=factory.swap())["table1"]
    assert {(row["paper"], row["difference"], row["close"]) for row in read_csv(numbers)} == {("", "", "")}
    assert "–" in to_markdown(written)


def test_half_a_table_says_what_was_not_run():
    swap = cifar(factory.swap, backbones=("lt",))
    numbers, written = tables(swap=swap)["table1"]
    rows = {row["cell"]: row for row in read_csv(numbers)}
    assert list(rows) == ["lt->lt", "lt->true", "true->lt", "true->true", "lt stage1"]
    assert {cell for cell, row in rows.items() if row["ours"] == ""} == {"true->lt", "true->true"}
    assert all((row["ours"] == "") == (row["difference"] == "") for row in rows.values())
    assert rows["lt stage1"]["paper"] == "0.7178"  # Figure 3: Stage I without augmentation
    lines = to_markdown(written).splitlines()
    assert sum("| not run |" in line for line in lines) == 2
    assert any(line.startswith("| true→lt | 91.06 % | not run | – |") for line in lines)


def test_stage_1_stands_below_the_table_where_it_is_known():
    rows = read_csv(tables(swap=cifar(factory.swap))["table1"][0])
    assert [(row["cell"], row["paper"]) for row in rows[4:]] == [("lt stage1", "0.7178"), ("true stage1", "")]
    older = cifar(factory.swap)
    del older["stage1"]
    assert len(read_csv(tables(swap=older)["table1"][0])) == 4


def test_every_table_is_written_in_three_formats(tmp_path):
    paths = write(tmp_path, list(build(Evidence({"swap": cifar(factory.swap)}))))
    assert sorted(p.name for p in paths) == ["paper-table1.csv", "paper-table1.md", "paper-table1.tex"]
    assert r"\begin{tabular}" in (tmp_path / "tables" / "paper-table1.tex").read_text()


# -- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    root = tmp_path / "results"
    factory.write(root / "cifar10-paper", swap=cifar(factory.swap), claims=factory.claims())
    factory.write(root / "cifar10-fast", swap=cifar(factory.swap, seeds=1, converged=False))
    return root


def test_the_page_keeps_prose_and_writes_blocks(results):
    page = generate(results, f"{PROSE}\n{OVERVIEW}\nMore prose.\n")
    assert page.startswith(PROSE)
    assert "\nMore prose.\n" in page
    for name in ("cifar10-paper", "cifar10-fast"):
        assert page.count(f"<!-- results: {name} -->") == page.count(f"<!-- /results: {name} -->") == 1
    fast = page.split("<!-- results: cifar10-fast -->")[1].split("<!-- /results")[0]
    assert "NOT a reproduction" in fast
    assert "3 are needed" in fast  # claims are decided where there is no claims.json
    assert "MixUp shrinks the escape rate" in page  # and taken from it where there is
    assert "| results/cifar10-fast | cifar10-lt |" in page


def test_table_1_at_a_glance_has_the_papers_row_once_and_a_row_a_folder(results):
    half = cifar(factory.swap, seeds=1, backbones=("lt",))
    factory.write(results / "half", swap=half)
    factory.write(results / "digits", swap=factory.swap(name="digits"))  # of which the paper has no numbers
    page = generate(results, PROSE + OVERVIEW)
    table = page.split("Table 1 at a glance")[1].split("<!--")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    found = {(row[0], row[1]): row[2:] for row in rows[2:]}
    theirs = [
        f"{100 * paper.table1('cifar10-lt')[cell]:.2f}" for cell in ("lt->lt", "lt->true", "true->lt", "true->true")
    ]
    assert found["cifar10-lt", "the paper"][1:] == theirs
    assert [key for key in found if key[1] == "the paper"] == [("cifar10-lt", "the paper")]
    assert {folder for _, folder in found} == {"the paper", "cifar10-paper", "cifar10-fast", "half", "digits"}
    assert found["cifar10-lt", "half"][3:] == ["–", "–"]
    assert found["cifar10-lt", "half"][1] == f"{100 * half['cells']['lt->lt']['accuracy'][0]:.2f}"
    assert "±" in found["cifar10-lt", "cifar10-paper"][1]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize(
    "verbs",
    [("swap",), ("half",), ("ladder",), ("geometry",), ("half", "geometry"), ("swap", "ladder", "geometry", "claims")],
)
def test_the_page_takes_whatever_a_folder_holds(results, name, verbs):
    made = {
        "swap": ("swap", cifar(factory.swap, name=name)),
        "half": ("swap", cifar(factory.swap, name=name, seeds=1, backbones=("lt",))),
        "ladder": ("ladder", cifar(factory.ladder, name=name, seeds=2)),  # a queue adds seeds one by one
        "geometry": ("geometry", cifar(factory.geometry, name=name, seeds=1)),
        "claims": ("claims", factory.claims()),
    }
    factory.write(results / "another", **dict(made[verb] for verb in verbs))
    page = generate(results, PROSE + OVERVIEW)
    block = page.split("<!-- results: another -->")[1].split("<!-- /results")[0]
    titles = {"swap": "Table 1", "half": "Table 1", "ladder": "Figure 3", "geometry": "Figure 8"}
    for verb, title in titles.items():
        assert (f"**{title}:" in block) == (verb in verbs or (title == "Table 1" and bool({"swap", "half"} & {*verbs})))
    assert ("not run" in block) == ("half" in verbs)
    if verbs == ("half", "geometry"):
        assert "Seeds 0;" in block
    if "claims" in verbs:
        assert "Seeds swap 0 1 2, ladder 0 1, geometry 0;" in block
    assert generate(results, page) == page


def test_the_page_is_stable_and_prose_within_it_stays(results):
    page = generate(results, PROSE + OVERVIEW)
    assert generate(results, page) == page
    commented = page.replace(
        "<!-- results: cifar10-paper -->", "The gap has a cause.\n\n<!-- results: cifar10-paper -->"
    )
    assert generate(results, commented) == commented


def test_new_results_change_the_page(results):
    page = generate(results, PROSE)
    path = results / "cifar10-paper" / "swap.json"
    stored = json.loads(path.read_text())
    stored["cells"]["lt->lt"]["accuracy"] = [0.7, 0.71, 0.72]
    path.write_text(json.dumps(stored))
    assert "71.00 ± 1.00 (3)" in generate(results, page)


def test_a_page_of_results_that_are_gone_is_refused(results):
    with pytest.raises(UserError, match=r"block 'results: old' has no result files"):
        generate(results, "<!-- results: old -->\n<!-- /results: old -->\n")
    with pytest.raises(UserError, match="without its end"):
        generate(results, "<!-- results: cifar10-fast -->\n")
    with pytest.raises(UserError, match="no folder with result files"):
        generate(results / "cifar10-fast" / "nothing", PROSE)


def test_a_folder_of_two_recipes_is_refused(results):
    factory.write(results / "cifar10-fast", ladder=cifar(factory.ladder))
    with pytest.raises(UserError, match="different data sets or recipes"):
        generate(results, PROSE)


def test_check_tells_whether_the_pages_are_up_to_date(results, tmp_path, capsys):
    page, of_measures = tmp_path / "reproduction.md", tmp_path / "measures.md"
    page.write_text(PROSE)
    for name, written in GENERATED.items():
        (tmp_path / name).write_text(written())
    options = ["--results", str(results), "--docs", str(tmp_path)]
    assert main([*options, "--check"]) == 1
    assert page.read_text() == PROSE
    assert main(options) == 0
    assert main([*options, "--check"]) == 0
    of_measures.write_text("old")
    assert main([*options, "--check"]) == 1
    assert main(["--results", str(tmp_path / "missing"), "--docs", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_the_committed_pages_say_what_the_code_and_the_committed_results_say(capsys):
    from conftest import REPOSITORY

    if not (REPOSITORY / "results").is_dir():
        pytest.skip("no results in this checkout")
    assert main(["--check"]) == 0, capsys.readouterr().err
