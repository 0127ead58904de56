"""Results as Python holds them: what a verb returns is today's JSON, and can show, tabulate and draw itself.

A result is a `dict`, so `result["verdict"]` and `json.dumps(result)` work; beside that it has a short `repr`, a page
for notebooks, `summary`, `to_frame`, `plot` and `report`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from tailscope.errors import UserError, first_few, one_line, unknown
from tailscope.report import comparison, diagnosis, memorization, rows, story
from tailscope.report.diagnosis_schema import Diagnosis as StoredDiagnosis
from tailscope.report.rows import Row
from tailscope.report.schema import Comparison as StoredComparison
from tailscope.report.schema import Memorization as StoredMemorization
from tailscope.report.schema import Results, Verb
from tailscope.report.text import Table, to_csv, to_html
from tailscope.results import write
from tailscope.tables.table import LinearLayer

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd
    from numpy.typing import NDArray

    from tailscope.classifiers import LinearClassifier
    from tailscope.report.marks import Figure
    from tailscope.report.page import Page
    from tailscope.report.thumbnails import Thumbnails

Thing = TypeVar("Thing")
SHORT = 280  # characters of each line of a `repr`


class Result(dict[str, Any]):
    """The result of an experiment: `swap`, `ladder` or `geometry`, as its JSON file has it.

    >>> result = Result({"schema": "tailscope.swap/1"})
    >>> result.verb, result["schema"]
    ('swap', 'tailscope.swap/1')
    """

    @property
    def verb(self) -> str:
        """The verb that it comes from, which also names its file."""
        schema: str = self["schema"]
        return schema.removeprefix("tailscope.").partition("/")[0]

    @property
    def headline(self) -> str:
        """What was found, in one sentence."""
        return story.headline(self._results())

    @property
    def plots(self) -> list[str]:
        """What `plot` draws."""
        return list(self._figures())

    @property
    def tables(self) -> list[str]:
        """What `to_frame` and `to_csv` return."""
        return list(self._tables())

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict: what the JSON file holds."""
        return dict(self)

    def summary(self) -> str:
        """Return what was found, the main caveat, and numbers, as the command line prints them: about ten lines."""
        lines, results = story.summary_rows(self._results()), self._results()
        width = max(len(name) for name, _ in lines)
        limits = [f"Keep in mind: {text}" for text in story.caveats(results)[:1]]
        rows = (f"{name:<{width}}  {one_line(text)}" for name, text in lines)
        return "\n".join([*map(one_line, [story.conclusion(results), *limits]), *rows])

    def to_frame(self, table: str = "classes") -> "pd.DataFrame":
        """Return one of `tables` as a DataFrame of raw numbers: accuracies as fractions, intervals as two columns.

        Raises:
            UserError: there is no such table, or pandas is not installed.
        """
        chosen = self._one_of("table", self._tables(), table)
        try:
            import pandas as pd  # here because it is an extra
        except ImportError:
            raise UserError("to_frame needs pandas; pip install 'tailscope[pandas]', or take to_csv") from None
        return pd.DataFrame([[row.get(name) for name in chosen.fields] for row in chosen.rows], columns=chosen.fields)

    def to_csv(self, table: str = "classes") -> str:
        """Return one of `tables` as CSV, as the report's folder has it; `UserError` where there is none such."""
        return to_csv(self._one_of("table", self._tables(), table))

    def plot(self, name: str) -> "alt.TopLevelMixin":
        """Draw one of `plots` as an Altair chart, which a notebook shows and `.save("chart.svg")` writes.

        Raises:
            UserError: there is no such plot.
        """
        import altair as alt  # here because it takes a second

        return cast("alt.TopLevelMixin", alt.Chart.from_dict(self._spec(self._one_of("plot", self._figures(), name))))

    def report(self, path: Path | str) -> Path:
        """Write the report and return its page: into a folder, with tables, figures and JSON, or as PAGE.html alone.

        Raises:
            UserError: the path cannot be written.
        """
        from tailscope.report import page
        from tailscope.store import make_folder

        path = Path(path)
        if path.suffix.lower() == ".html":
            return page.write_alone(path, self._page())
        self.save(make_folder(path, "report"))
        return page.build(path)

    def save(self, folder: Path) -> Path:
        """Write VERB.json into a folder, and return its path; `report` also writes what people read."""
        return write(folder, self.verb, self.to_dict())

    def __repr__(self) -> str:
        if "dataset" not in self:  # a plan: what would be trained, and no result yet
            return repr(self.to_dict())
        named = f"{type(self).__name__} of {self['dataset']['name']}: {self.headline}"
        lines = map(one_line, (named, self._offers()))
        return "\n".join(line if len(line) <= SHORT else f"{line[: SHORT - 1]}…" for line in lines)

    def _repr_html_(self) -> str | None:
        """Return what a notebook shows: what was found, the first table and chart; no script. None for a plan."""
        if "dataset" not in self:
            return None
        import vl_convert  # here because it takes time to import

        table = to_html(next(iter(self._tables().values())))
        chart = vl_convert.vegalite_to_svg(self._spec(next(iter(self._figures().values()))))
        return f"<p><b>{escape(self.headline)}</b></p>{table}{chart}<p>{escape(self._offers())}</p>"

    def _offers(self) -> str:
        return f".summary(), .to_frame(), .plot({first_few([repr(name) for name in self.plots], 4)}), .report(path)"

    def _spec(self, figure: "Figure") -> dict[str, Any]:
        from tailscope.report import marks

        return marks.file_spec(figure, marks.panel_specs(figure), self._data())

    def _one_of(self, kind: str, known: Mapping[str, Thing], name: str) -> Thing:
        if name in known:
            return known[name]
        raise unknown(f"{kind} of a {self.verb}", name, known)

    # What differs between experiments and a diagnosis; Altair takes a second to import.

    def _results(self) -> Results:
        return cast(Results, {cast(Verb, self.verb): self})

    def _tables(self) -> dict[str, Table]:
        return {table.name: table for table in rows.tables(self._results())}

    def _figures(self) -> "dict[str, Figure]":
        from tailscope.report import charts

        return {figure.name: figure for figure in charts.figures(self._results())}

    def _data(self) -> Mapping[str, Sequence[Row]]:
        from tailscope.report import charts

        return charts.data(self._results())

    def _page(self) -> "Page":
        from tailscope.report import page

        return page.of_experiments(self._results())


class Comparison(Result):
    """The result of `compare`, as compare.json has it."""

    @property
    def headline(self) -> str:
        """Which method does best, in one sentence."""
        return comparison.headline(self._stored)

    def summary(self) -> str:
        """Return what was found, the main caveat and a line a method."""
        return _summary(comparison, self._stored)

    @property
    def _stored(self) -> StoredComparison:
        return cast(StoredComparison, self)

    def _tables(self) -> dict[str, Table]:
        return {table.name.removeprefix("compare-"): table for table in comparison.tables(self._stored)}

    def _figures(self) -> "dict[str, Figure]":
        from tailscope.report import comparison_charts

        return {figure.name: figure for figure in comparison_charts.figures(self._stored)}

    def _data(self) -> Mapping[str, Sequence[Row]]:
        from tailscope.report import comparison_charts

        return comparison_charts.data(self._stored)

    def _page(self) -> "Page":
        from tailscope.report import page

        return page.of_comparison(self._stored)


class Memorization(Result):
    """The result of `memorization`, as memorization.json has it."""

    @property
    def headline(self) -> str:
        """Whether the spread gap tells what is memorised, in one sentence."""
        return memorization.headline(self._stored)

    def summary(self) -> str:
        """Return what was found, the main caveat and a line a class, or where these are many a group."""
        return _summary(memorization, self._stored)

    @property
    def _stored(self) -> StoredMemorization:
        return cast(StoredMemorization, self)

    def _tables(self) -> dict[str, Table]:
        return {table.name.removeprefix("memorization-"): table for table in memorization.tables(self._stored)}

    def _figures(self) -> "dict[str, Figure]":
        from tailscope.report import memorization_charts

        return {figure.name: figure for figure in memorization_charts.figures(self._stored)}

    def _data(self) -> Mapping[str, Sequence[Row]]:
        from tailscope.report import memorization_charts

        return memorization_charts.data(self._stored)

    def _page(self) -> "Page":
        from tailscope.report import page

        return page.of_memorization(self._stored)


def _summary(words: Any, result: Any) -> str:
    """Return what the module `words` says of a result, and its lines in columns."""
    heading, lines = words.summary_rows(result)
    found = [
        *words.findings(result),
        *(f"Keep in mind: {one}" for one in words.caveats(result)[:1]),
        *(f"What to do: {one}" for one in words.advice(result)),
    ]
    widths = [max(map(len, column)) for column in zip(heading, *lines, strict=True)]
    rows = ("  ".join(f"{text:<{width}}" for text, width in zip(one, widths, strict=True)) for one in (heading, *lines))
    return "\n".join([*map(one_line, found), *(row.rstrip() for row in rows)])


@dataclass(frozen=True)
class Rebalanced:
    """The classifier that a diagnosis recommends.

    Attributes:
        layer: its weight [C, d], bias [C] and class names; `layer.save(path)` writes them.
        remedy: which it is, a call-string of `tailscope.classifiers`.
    """

    layer: LinearLayer
    remedy: str

    @property
    def weight(self) -> "NDArray[np.float32]":
        """[C, d]."""
        return self.layer.weight.numpy()

    @property
    def bias(self) -> "NDArray[np.float32]":
        """[C]."""
        return self.layer.bias.numpy()

    def estimator(self) -> "LinearClassifier":
        """Return it as a fitted scikit-learn classifier, whose labels are the class names."""
        from tailscope.classifiers import SoftmaxRegression  # here because scikit-learn takes seconds to import

        fitted = SoftmaxRegression()
        names = np.array(self.layer.class_names)
        order = np.argsort(names)  # scikit-learn sorts labels
        fitted.coef_, fitted.intercept_, fitted.classes_ = self.weight[order], self.bias[order], names[order]
        fitted.n_features_in_ = self.weight.shape[1]
        return fitted


class Diagnosis(Result):
    """The result of `diagnose`, as diagnosis.json has it."""

    def __init__(
        self, stored: Mapping[str, Any], layer: LinearLayer | None = None, thumbnails: "Thumbnails | None" = None
    ) -> None:
        """Hold a result, and the re-balanced classifier and the thumbnails of samples that came with it."""
        super().__init__(stored)
        self.layer, self.thumbnails = layer, thumbnails

    def save(self, folder: Path) -> Path:
        """Write diagnosis.json into a folder, and beside it thumbnails.npz where images were given."""
        if self.thumbnails is not None:
            self.thumbnails.save(folder)
        return super().save(folder)

    def rebalanced(self) -> Rebalanced:
        """Return the classifier that the diagnosis recommends; `tailscope.rebalance` puts it into a checkpoint.

        Raises:
            UserError: there is none, or the diagnosis was read from a file: its folder has rebalanced.npz.
        """
        if self.layer is None:
            raise UserError(
                "this diagnosis recommends no classifier, or was read from a file; see rebalanced.npz there"
            )
        return Rebalanced(self.layer, self.layer.source)

    @property
    def headline(self) -> str:
        """The verdict in one sentence."""
        return diagnosis.headline(self._stored)

    def scalars(self) -> dict[str, float]:
        """Return the main numbers under names that stay, as loggers take them: fractions, with 95 % intervals.

        `accuracy` is the classifier's in use, beside that of each group, and `classifier_bound` the best linear one's;
        `classifier_gap` and `representation_gap`, with `_low` and `_high`, are what classifier and features cost. What
        is undefined is left out.
        """
        verdict: Mapping[str, Any] = self["verdict"] or {}
        found = {"accuracy": verdict.get("current"), "classifier_bound": verdict.get("classifier_bound")}
        for group, judged in (verdict.get("groups") or {}).items():
            found[f"accuracy_{group}"] = judged and judged["current"]
        for name in ("classifier_gap", "rebalancing_gap", "representation_gap"):
            gap: Mapping[str, Any] = verdict.get(name) or {}
            low, high = gap.get("ci95") or (None, None)
            found |= {name: gap.get("points"), f"{name}_low": low, f"{name}_high": high}
        return {name: float(value) for name, value in found.items() if value is not None}

    def summary(self) -> str:
        """Return the verdict, the main caveat, what to do, and what was found, as the command line prints them."""
        advised = [f"- {piece['text']}" for piece in self["advice"][1:]]
        found = [f"- {text}" for text in diagnosis.findings(self._stored)]
        return "\n".join(map(one_line, [*diagnosis.closing(self._stored), *found, *advised]))

    @property
    def _stored(self) -> StoredDiagnosis:
        return cast(StoredDiagnosis, self)

    def _tables(self) -> dict[str, Table]:
        return {table.name.removeprefix("diagnosis-"): table for table in diagnosis.tables(self._stored)}

    def _figures(self) -> "dict[str, Figure]":
        from tailscope.report import diagnosis_charts

        return diagnosis_charts.plots(self._stored)

    def _data(self) -> Mapping[str, Sequence[Row]]:
        from tailscope.report import diagnosis_charts

        return diagnosis_charts.data(self._stored)

    def _page(self) -> "Page":
        from tailscope.report import page

        return page.of_diagnosis(self._stored, self.thumbnails)
