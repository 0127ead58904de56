"""The report of a diagnosis, the page of measures, and the tutorial, which is run as it is written."""

import functools
import html
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

import result_factory
import tailscope
from diagnosis_cases import CLASSES, FEW, head_biased, noise, scattered, separable, table, weak
from tailscope import cli, report
from tailscope.diagnosis.verdict import decide
from tailscope.errors import UserError
from tailscope.intervals import Interval
from tailscope.measures import FIELDS
from tailscope.measures.fields import COLLAPSE
from tailscope.report import diagnosis, diagnosis_charts
from tailscope.report.reading import page_name
from tailscope.report.text import percent, significant
from tailscope.results import write
from tailscope.tables.table import FeatureTable

REPOSITORY = Path(__file__).resolve().parents[1]
TUTORIAL = REPOSITORY / "docs" / "tutorial-digits.md"


@pytest.fixture(scope="module")
def result():
    train, unseen = separable()
    names = {"class_names": [f"<b>{k}</b>" for k in range(9)]}
    return tailscope.diagnose(
        table(*train, **names), table(*unseen, **names), classifier=head_biased(), permutations=99
    )


@pytest.fixture(scope="module")
def page(result, tmp_path_factory):
    out = tmp_path_factory.mktemp("diagnosis")
    write(out, "diagnosis", result)
    return report.build(out)


def test_collapse_and_means_of_recalls_are_in_folded_tables(page, result):
    text = page.read_text(encoding="utf-8").replace("\u00a0", " ")
    folded = re.findall(r'<details class="numbers"[^>]*>(.*?)</details>', text, re.DOTALL)
    collapsed = next(fold for fold in folded if "how far the features have collapsed" in fold)
    for name, measure in COLLAPSE.items():
        assert html.escape(measure.meaning, quote=False) in html.unescape(collapsed).replace("\u00a0", " ")
        assert significant(result["collapse"]["unseen"][name]) in collapsed
    accuracies = next(fold for fold in folded if "the accuracies behind the verdict" in fold)
    assert percent(result["accuracy"]["current"]["g_mean"]) in accuracies.replace("\u202f", " ")
    before = {name: value for name, value in result.items() if name != "collapse"}
    assert "diagnosis-collapse" not in {table.name for table in diagnosis.tables(before)}


def test_the_page_says_the_verdict_first(page, result):
    text = page.read_text(encoding="utf-8")
    assert page.name == "report.html"
    heading = re.search(r"<h1>(.*?)</h1>", text)[1].replace("\u00a0", " ")
    assert heading == diagnosis.headline(result)
    assert heading.startswith("The classifier is the bottleneck")
    assert "<b>3</b>" not in text.split("<script")[0]
    assert "http://" not in text.split("<script")[0]
    assert {path.stem for path in (page.parent / "figures").glob("*.svg")} == {
        "waterfall",
        "scatter",
        "confusion",
        "map",
    }


def test_every_measure_has_an_explanation_and_a_definition(page):
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r'<dt id="measure-(\w+)">', text)
    assert {column.field for column in diagnosis.LOCAL} <= set(shown) <= set(FIELDS)


def test_a_class_leads_to_its_samples(page, result):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r'<td><a href="#(samples-\d+)">', text)
    assert sorted(links) == sorted(re.findall(r'<details class="fold" id="(samples-\d+)">', text))
    assert len(links) == CLASSES
    lines = (page.parent / "tables" / "diagnosis-samples.csv").read_text().splitlines()
    kinds = [kind for entry in result["drilldown"]["classes"] for kind in entry["samples"].values()]
    assert len(lines) == 1 + sum(len(kind["first"]) for kind in kinds)


def test_a_diagnosis_of_before_has_no_samples_and_the_page_builds(result, tmp_path):
    write(tmp_path, "diagnosis", {key: value for key, value in result.items() if key != "drilldown"})
    text = report.build(tmp_path, figures=False).read_text(encoding="utf-8")
    assert 'id="samples"' not in text
    assert "<th>F1" not in text


def test_the_waterfall_adds_up(result):
    bars = diagnosis.steps(result)
    assert [bar["start"] for bar in bars[1:]] == [bar["end"] for bar in bars[:-1]]
    assert bars[0]["end"] == pytest.approx(100 * result["accuracy"]["current"]["mean"])
    assert bars[-1]["end"] == 100


def test_tables_hold_what_the_result_holds(page, result):
    lines = (page.parent / "tables" / "diagnosis-classes.csv").read_text().splitlines()
    assert len(lines) == 1 + len(result["classes"])
    heads = lines[0].split(",")
    first = dict(zip(heads, lines[1].split(","), strict=True))
    assert float(first["recall_current"]) == result["accuracy"]["current"]["per_class"][0]
    assert float(first["spread_gap_deg"]) == result["classes"][0]["spread_gap_deg"]
    assert first["bottleneck"] == result["verdict"]["classes"][0]["bottleneck"]


@pytest.mark.parametrize("options", [{"verdict": False}, {}], ids=["measured", "compared"])
def test_other_pages(options, tmp_path):
    train, unseen = scattered()
    given = ([table(*train)] * 2, [table(*unseen)] * 2) if not options else (table(*train), table(*unseen))
    write(tmp_path, "diagnosis", tailscope.diagnose(*given, permutations=9, **options))
    text = report.build(tmp_path, figures=False).read_text(encoding="utf-8")
    assert ('id="encoders"' in text) == (not options)
    assert ("Measured, without a verdict" in text) == bool(options)


def test_a_diagnosis_beside_experiments_has_a_page_of_its_own(result, tmp_path):
    result_factory.write(tmp_path, swap=result_factory.swap(seeds=1))
    write(tmp_path, "diagnosis", result)
    assert report.build(tmp_path, figures=False) == tmp_path / "report.html"
    assert [page_name(tmp_path, verb) for verb in ("diagnosis", "swap")] == ["diagnosis.html", "report.html"]
    assert diagnosis.headline(result) not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "From the current accuracy to the ceiling" in (tmp_path / "diagnosis.html").read_text(encoding="utf-8")


def test_a_page_that_got_a_name_of_its_own_leaves_no_older_one(result, tmp_path):
    write(tmp_path, "diagnosis", result)
    assert report.build(tmp_path, figures=False) == tmp_path / "report.html"
    shutil.copy(REPOSITORY / "results" / "digits-compare" / "compare.json", tmp_path)
    report.build(tmp_path, figures=False)
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["compare.html", "diagnosis.html"]


def test_measures_beyond_the_moderate_are_undefined_and_the_page_builds(tmp_path):
    sides = [FeatureTable.from_arrays(x * 1e52, y) for x, y in separable()]  # variances of about 1e104
    found = tailscope.diagnose(*sides, permutations=0)
    assert {entry["variance"] for entry in found["classes"]} == {None}
    assert any(text.startswith("variance lies outside the range of numbers") for text in found["warnings"])
    write(tmp_path, "diagnosis", found)
    assert "variance lies outside the range" in report.build(tmp_path, figures=False).read_text(encoding="utf-8")


def test_a_damaged_diagnosis_is_refused(result, tmp_path):
    path = tmp_path / "diagnosis.json"
    for stored, words in [("{", "not valid JSON"), ("{}", "schema")]:
        path.write_text(stored)
        with pytest.raises(UserError, match=words):
            report.build(tmp_path)
    path.write_text(json.dumps({key: value for key, value in result.items() if key != "pairs"}))
    with pytest.raises(UserError, match="'pairs' is missing"):
        report.build(tmp_path)


def test_the_notebook_is_the_tutorial_with_what_it_prints():
    tutorials = runpy.run_path(str(REPOSITORY / "examples" / "tutorials.py"))
    parts = tutorials["split"](TUTORIAL.read_text(encoding="utf-8"))
    path = REPOSITORY / "examples" / "tutorial-digits.ipynb"
    stored = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    said = ["".join(text for output in cell.pop("outputs") for text in output["text"]) for cell in code]
    made = json.loads(tutorials["notebook"](parts, [""] * len(parts)))
    for cell in made["cells"]:
        cell.pop("outputs", None)
    assert stored == made
    assert len(code) == 6
    assert [bool(text) for text in said] == [True, True, False, True, True, True]
    assert "written: pixels/diagnosis.json" in said[1]
    assert path.stat().st_size < 200_000


def test_what_a_page_prints_is_replaced_not_repeated(tmp_path):
    tutorials = runpy.run_path(str(REPOSITORY / "examples" / "tutorials.py"))
    text = "# A\n\n```python\nx = 3\nprint(x)\n```\n\nNow\n\n```console\n$ echo one\n$ echo two\n```\n\n## End\n"
    for _ in range(2):
        parts = tutorials["split"](text)
        text = tutorials["page"](parts, tutorials["run"](parts, tmp_path))
        assert text.count("```text\n3\n```") == text.count("```text\none\ntwo\n```") == 1
    assert tutorials["page"](parts, [""] * len(parts)).count("```") == 4
    with pytest.raises(subprocess.CalledProcessError):
        tutorials["run"]([("console", "$ false")], tmp_path)


def test_the_middle_of_a_long_print_is_left_out():
    shortened = runpy.run_path(str(REPOSITORY / "examples" / "tutorials.py"))["shortened"]
    lines = [f"line {n}" for n in range(41)]
    assert shortened("\n".join(lines[:40])) == "\n".join(lines[:40])
    assert shortened("\n".join(lines)).splitlines() == [*lines[:10], " ... 21 lines more ...", *lines[-10:]]


def test_the_image_tutorial_stands_with_what_it_printed():
    text = (REPOSITORY / "docs" / "tutorial-cifar100.md").read_text(encoding="utf-8")
    assert len(re.findall(r"```\n\n```text\n", text)) == text.count("```console") == 5


def test_the_commands_of_the_image_tutorial_are_ones_that_exist():
    text = (REPOSITORY / "docs" / "tutorial-cifar100.md").read_text(encoding="utf-8")
    verbs = get_command(cli.app).commands
    lines = re.findall(r"^\$ tailscope (.*)$", text, flags=re.MULTILINE)
    assert len(lines) == 7
    for line in lines:
        verb, *options = shlex.split(line)
        verbs[verb].make_context(verb, options)  # an unknown option or a wrong value ends here


def test_the_tutorial_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "build", functools.partial(report.build, figures=False))
    space = {}
    blocks = re.findall(r"```(python|console)\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert [kind for kind, _ in blocks].count("console") == 3
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, TUTORIAL.name, "exec"), space)
        for line in text.splitlines() if kind == "console" else []:
            monkeypatch.setattr(sys, "argv", [*shlex.split(line.removeprefix("$ ")), "--permutations", "99"])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert ended.value.code == 0, capsys.readouterr().err
    assert {path.parent.name for path in tmp_path.glob("*/report.html")} == {"pixels", "network", "compared"}
    found = json.loads((tmp_path / "network" / "diagnosis.json").read_text())
    assert found["dataset"]["class_names"][9] == "digit 9"
    assert "localises" in (tmp_path / "compared" / "tables" / "diagnosis-comparison.csv").read_text()


def test_a_withheld_verdict_is_a_short_headline_and_its_reason_the_first_caveat():
    (train, labels), (unseen, truth) = separable()
    result = tailscope.diagnose(table(train, labels), table(unseen, CLASSES - 1 - truth), **FEW)
    headline = diagnosis.headline(result)
    assert headline.startswith("No verdict: the labels of ")
    assert headline.endswith("seem to mean different classes")
    assert diagnosis.caveats(result)[0] == f"No verdict: {result['verdict']['reason']}."


def test_a_measure_that_a_result_does_not_hold_is_undefined():
    result = tailscope.diagnose(*(table(*part) for part in separable()), verdict=False, **FEW)
    for entry in result["classes"]:
        del entry["nearest_center_true_deg"]
    assert {row["nearest_center_true_deg"] for row in diagnosis_charts.data(result)["by_count"]} == {None}
    assert diagnosis_charts.figures(result)


OLD_WORDS = (
    "farther out",
    "chance explains",
    "lower limit",
    "unlike unseen",
    "item:",
    "gaps' difference",
    "classifier bound is known",
    "within-sample",
)


def sentences(found):
    """Everything that a diagnosis says in words, but for its advice."""
    verdict = found["verdict"]
    parts = [verdict, *filter(None, verdict["groups"].values()), *verdict["classes"]]
    said = [part["reason"] for part in parts] + [verdict["intervals"], *verdict["caveats"], *found["warnings"]]
    said += found["accuracy"]["classifier_bound"]["notes"]
    return [diagnosis.headline(found), *diagnosis.findings(found), *diagnosis.caveats(found), *said]


@pytest.mark.parametrize("case", ["separable", "scattered", "noise", "weak"])
def test_a_stranger_understands_what_is_said(case):
    sides = {"separable": separable, "scattered": scattered, "noise": noise, "weak": weak}[case]()
    given = {"classifier": head_biased()} if case == "separable" else {}
    found = tailscope.diagnose(*(table(*one) for one in sides), **FEW, **given)
    said = sentences(found)
    assert not [text for text in said for words in OLD_WORDS if words in text]
    expected = {
        "separable": r"The classifier is the bottleneck: on these features a better linear classifier would reach "
        r"about \d+(\.\d)? % \[[^]]+\]; the one in use reaches \d+(\.\d)? %",
        "scattered": r"The representation is the bottleneck: on these features even the best linear classifier would "
        r"reach only about \d+ % \[\d+, \d+\]; the one in use reaches \d+ %",
        "noise": "Not decided: no classifier does better than guessing on these features",
        "weak": r"The representation is the bottleneck: on these features even the best linear classifier would reach "
        r"only about \d+ % \[\d+, \d+\]; the one in use reaches \d+ %",
    }[case]
    assert re.fullmatch(expected, said[0])
    if case == "scattered":
        assert found["verdict"]["caveats"][0].startswith("This takes for granted that 100 % can be right.")
        assert "The encoder has memorised its training samples." in said[1]
        assert any(text.startswith("Memorised training samples: in 6 of 9 tested classes held-out ") for text in said)
    if case == "weak":
        head = next(text for text in said if text.startswith("Head classes"))
        assert "The classifier in use favours them: one that treats all classes alike would get " in head


def test_an_undecided_verdict_says_what_would_decide(monkeypatch):
    found = tailscope.diagnose(*(table(*one) for one in weak()), permutations=0, ceiling=0.55)
    assert found["verdict"]["bottleneck"] == "undecided"
    assert re.fullmatch(
        r"Not decided: classifier and features may cost equally much; (about \d+(\.\d)? times as many held-out samples "
        r"of every class would decide|more held-out samples are unlikely to decide)",
        diagnosis.headline(found),
    )


def test_the_terminal_ends_with_verdict_caveat_and_what_to_do(tmp_path, monkeypatch, capsys):
    for name, (features, labels) in zip(("train", "unseen"), weak(), strict=True):
        np.savez(tmp_path / f"{name}.npz", features=features, labels=labels)
    monkeypatch.chdir(tmp_path)
    given = ["--train", "train.npz", "--unseen", "unseen.npz", "--permutations", "19"]
    monkeypatch.setattr(sys, "argv", ["tailscope", "diagnose", *given])
    with pytest.raises(SystemExit):
        cli.main()
    *_, verdict, caveat, advice, written, classifier, page = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert verdict == f"{diagnosis.headline(found)}."
    assert caveat == f"Keep in mind: {found['verdict']['caveats'][0]}"
    assert advice == f"What to do: {found['advice'][0]['text']}"
    assert written.startswith(f"written: {Path('out') / 'diagnosis.json'} (with 3 other caveats")
    assert classifier.startswith(f"classifier: {Path('out') / 'rebalanced.npz'}")
    assert page == f"report: {Path('out') / 'report.html'}"


def test_the_first_screen_has_verdict_caveat_and_advice_and_a_fold(page, result):
    text = page.read_text(encoding="utf-8").split("</header>")[0].split("<header")[1].replace("\u00a0", " ")
    limits = diagnosis.caveats(result)
    assert f"<strong>Keep in mind:</strong> {limits[0]}" in text
    assert "<strong>What to do:</strong> Replace the classifier" in text
    fold = text.split("<details")[1]
    assert f"{len(limits) - 1} other caveat" in fold
    assert all(html.escape(limit, quote=False) in fold for limit in limits[1:])


def test_the_picture_of_the_rules_has_every_verdict():
    picture = (REPOSITORY / "docs" / "images" / "verdict.svg").read_text(encoding="utf-8")
    shown = set(re.findall(r'<text class="n"[^>]*>([^<?]+)</text>', picture))
    given = [((-0.3, -0.1), True), ((-0.3, -0.1), False), ((0.1, 0.3), None), ((-0.1, 0.3), None)]
    found = [decide(Interval(sum(ends) / 2, ends, None, "item"), memorised) for ends, memorised in given]
    assert shown == {f"{bottleneck}: {kind}" if kind else bottleneck for bottleneck, kind, _ in found}
    assert "images/verdict.svg" in (REPOSITORY / "docs" / "diagnose.md").read_text(encoding="utf-8")
