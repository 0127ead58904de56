"""Results as Python holds them: a dict that shows, tabulates and draws itself."""

import csv
import io
import json
import subprocess
import sys

import pytest

import result_factory
import tailscope
from diagnosis_cases import FEW, separable
from tailscope.errors import UserError
from tailscope.report.objects import Diagnosis, Result
from tailscope.report.reading import read


@pytest.fixture(scope="module")
def diagnosis():
    train, unseen = separable()
    return tailscope.diagnose(train, unseen, **FEW)


@pytest.fixture(scope="module")
def swap():
    return Result(result_factory.swap(classes=10, seeds=3))


@pytest.fixture(params=["diagnosis", "swap"])
def result(request):
    return request.getfixturevalue(request.param)


def test_a_result_is_todays_json(result):
    assert result.to_dict() == result
    assert type(result.to_dict()) is dict
    assert json.loads(json.dumps(result)) == json.loads(json.dumps(result.to_dict()))


def test_repr_is_short_and_says_what_was_found(result):
    text = repr(result)
    assert len(text) <= 600
    assert result.headline[:100] in text
    assert ".to_frame()" in text


def test_repr_of_a_hostile_name_is_one_line_of_text(diagnosis):
    named = Diagnosis(diagnosis | {"dataset": diagnosis["dataset"] | {"name": "a\n\x1b[31m" + "b" * 5000}})
    assert len(repr(named)) <= 600
    assert "\x1b" not in repr(named)
    assert repr(named).count("\n") == 1


def test_a_notebook_shows_verdict_table_and_chart_without_script(result):
    page = result._repr_html_()
    assert "<table" in page
    assert "<svg" in page
    assert "<script" not in page
    assert result.headline.split(":")[0] in page


def test_names_of_classes_are_escaped_in_a_notebook(diagnosis):
    said = {**diagnosis["accuracy"]["current"], "classifier": "<script>alert(1)</script>"}
    hostile = Diagnosis(diagnosis | {"accuracy": diagnosis["accuracy"] | {"current": said}})
    assert "<script" not in hostile._repr_html_()


def test_summary_starts_with_the_verdict(diagnosis, swap):
    assert diagnosis.summary().startswith(diagnosis.headline)
    assert all(piece["text"] in diagnosis.summary() for piece in diagnosis["advice"])
    assert swap.summary().startswith(swap.headline)


@pytest.mark.parametrize("kind", ["diagnosis", "swap"])
def test_frames_hold_the_numbers_of_the_csv_tables(kind, request):
    result = request.getfixturevalue(kind)
    pandas = pytest.importorskip("pandas")
    for name in result.tables:
        frame, rows = result.to_frame(name), list(csv.DictReader(io.StringIO(result.to_csv(name))))
        assert list(frame.columns) == (list(rows[0]) if rows else list(frame.columns))
        assert len(frame) == len(rows)
        for row, (_, line) in zip(rows, frame.iterrows(), strict=True):
            for field, text in row.items():
                if isinstance(line[field], float) and not pandas.isna(line[field]):
                    assert float(text) == line[field]


def test_frame_of_classes_has_their_recalls(diagnosis):
    pytest.importorskip("pandas")
    frame = diagnosis.to_frame().set_index("name")
    for name, recall in zip(
        diagnosis["dataset"]["class_names"], diagnosis["accuracy"]["current"]["per_class"], strict=True
    ):
        assert frame.loc[name, "recall_current"] == recall


def test_every_plot_draws_with_its_rows_inside(result, tmp_path):
    assert result.plots
    for name in result.plots:
        spec = result.plot(name).to_dict()
        assert spec["datasets"]
        assert all(rows for rows in spec["datasets"].values())
    result.plot(result.plots[0]).save(str(tmp_path / "chart.svg"))
    assert "<svg" in (tmp_path / "chart.svg").read_text()


def test_the_shift_of_every_class_is_drawn(diagnosis):
    rows = diagnosis.plot("shift").to_dict()["datasets"]["by_count"]
    drawn = {row["name"]: row["center_shift_excess_deg"] for row in rows}
    assert drawn == {entry["name"]: entry["center_shift_excess_deg"] for entry in diagnosis["classes"]}


def test_a_mistyped_plot_or_table_says_what_there_is(diagnosis):
    with pytest.raises(
        ValueError, match=r"unknown plot of a diagnosis 'shfit'; did you mean 'shift'\? known: waterfall"
    ):
        diagnosis.plot("shfit")
    with pytest.raises(UserError, match="unknown table of a diagnosis 'klasses'; did you mean 'classes'"):
        diagnosis.to_csv("klasses")


def test_report_as_a_page_alone_or_as_a_folder(diagnosis, tmp_path):
    page = diagnosis.report(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == [page]
    assert "figures/" not in page.read_text()
    whole = diagnosis.report(tmp_path / "folder")
    assert whole == tmp_path / "folder" / "report.html"
    assert read(tmp_path / "folder" / "diagnosis.json", "diagnosis") == diagnosis
    assert (tmp_path / "folder" / "figures" / "waterfall.svg").exists()


def test_what_the_package_offers_is_listed_and_there():
    assert set(tailscope.__all__) <= set(dir(tailscope))
    for name in tailscope.__all__:
        assert getattr(tailscope, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tailscope.nothing  # noqa: B018


def test_importing_the_package_imports_no_torch():
    code = "import sys, tailscope; dir(tailscope); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_plan_shows_what_it_holds_and_writes_nothing(tmp_path):
    plan = tailscope.swap("digits", recipe="demo", seeds=1, plan=True, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert repr(plan) == repr(plan.to_dict())
    assert plan._repr_html_() is None
