"""Results with anything in them: the report refuses a file in one line that names it, or says what it holds.

The number of fuzzed cases is `TAILSCOPE_FUZZ`, 40 without it.
"""

import copy
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import result_factory as factory
import tailscope
from diagnosis_cases import head_biased, scattered, separable, table
from tailscope import report
from tailscope.errors import UserError
from tailscope.report import charts, diagnosis, diagnosis_charts, rows, story, text
from tailscope.report.marks import panel_specs
from tailscope.report.reading import read
from tailscope.report.rows import load

VERBS = ("swap", "ladder", "geometry", "claims", "diagnosis")
CASES = int(os.environ.get("TAILSCOPE_FUZZ", "40"))
BUILT = max(3, CASES // 40)
"""Of those, how many are built in full: 50 of 2,000."""
FUZZ = settings(max_examples=CASES, suppress_health_check=list(HealthCheck))

MARKUP = "<script>alert(1)</script>\x1b[2J\u202e{{ 7 * 7 }}]]>&\"'"
HOSTILE = st.one_of(
    st.sampled_from(
        [
            None, True, False, 0, 1, -1, 2, 10**6, -(10**6), 10**15, 10**400, -(10**19), 0.0, -0.0, 0.5, 1e-320, 1e99,
            1e300, -1e300, "NaN", "Infinity", "", "0.5", "a", "lt->lt", "head", MARKUP, "\ud800", "x" * 5000, [], {},
            [None], [[]], [1, 2], [0.1, 0.2], [0.1, 0.2, 0.3], {"a": 1}, {"points": 1}, {"class": {}},
            "__import__('os').system('false')", "module:factory", "$(false)",
        ]
    ),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
        max_leaves=6,
    ),
)  # fmt: skip


def some(*how: str) -> st.SearchStrategy:
    """Return one to three changes: where, how, and what may be put there."""
    return st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(how), HOSTILE), min_size=1, max_size=3)


CHANGES = some("set", "set", "delete", "double", "cut", "mild")


def mild(node: Any) -> Any:
    """Return another value of the same type, which may well be accepted."""
    if isinstance(node, bool):
        return not node
    if isinstance(node, str):
        return MARKUP
    if isinstance(node, int):
        return 10**6
    return 1 - node if isinstance(node, float) else node


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all nodes of a JSON value."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


def changed(result: Any, changes: list[tuple[float, str, Any]]) -> Any:
    """Return a copy with some nodes replaced, left out, doubled or cut; near the top as often as deep down."""
    result = copy.deepcopy(result)
    for where, how, value in changes:
        found = [path for path in places(result) if path]
        if not found:
            break
        by_depth: dict[int, list[tuple[Any, ...]]] = {}
        for path in found:
            by_depth.setdefault(len(path), []).append(path)
        depth = sorted(by_depth)[int(where * len(by_depth))]
        paths = by_depth[depth]
        path = paths[int(where * len(by_depth) * len(paths)) % len(paths)]
        parent = result
        for key in path[:-1]:
            parent = parent[key]
        node = parent[path[-1]]
        if how == "delete":
            del parent[path[-1]]
        elif how == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(node))
        elif how == "cut" and isinstance(node, list | str):
            parent[path[-1]] = node[: len(node) // 2]
        elif how == "mild":
            parent[path[-1]] = mild(node)
        else:
            parent[path[-1]] = copy.deepcopy(value)
    return result


@cache
def valid() -> dict[str, Any]:
    """Return a result of every kind, as JSON keeps it."""
    planted, other, few = separable(), scattered(), {"permutations": 19}
    train, unseen = ([table(*pair[k]) for pair in (planted, other)] for k in (0, 1))
    diagnosis = tailscope.diagnose(train, unseen, classifier=[head_biased()] * 2, **few)
    return json.loads(
        json.dumps(
            {
                "swap": factory.swap(4, 2, per_class=5, matched=True),
                "ladder": factory.ladder(4, 2, per_class=5),
                "geometry": factory.geometry(4, 2),
                "claims": factory.claims(),
                "diagnosis": diagnosis,
            }
        )
    )


def written(folder: Path, verb: str, result: Any) -> Path:
    """Write a changed result, beside the others that a page needs."""
    folder.mkdir(parents=True, exist_ok=True)
    if verb == "claims":
        factory.write(folder, swap=valid()["swap"])
    path = folder / f"{verb}.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def say(folder: Path, verb: str, *, charted: bool = True) -> None:
    """Put everything that a file says into rows, charts, tables and sentences, without drawing."""
    if verb == "diagnosis":
        result = read(folder / "diagnosis.json", "diagnosis")
        figures, found = diagnosis_charts.figures, diagnosis.tables(result)
        said = [diagnosis_charts.data(result), diagnosis.headline(result), diagnosis.findings(result)]
        said += [diagnosis.caveats(result), diagnosis.accuracy_rows(result)]
    else:
        result = load(folder)
        figures, found = charts.figures, rows.tables(result)
        said = [charts.data(result), story.findings(result), story.caveats(result)]
        said += [story.summary_rows(result), rows.warnings(result)]
    for figure in figures(result) if charted else ():
        panel_specs(figure)
    json.dumps(said, allow_nan=False)
    for one in found:
        for writer in (text.to_csv, text.to_markdown, text.to_latex):
            assert writer(one)


def refused_or(action, path: Path) -> bool:
    """Do something with a file; return whether it was refused, in one line that names it."""
    try:
        action()
    except UserError as error:
        line = str(error)
    else:
        return False
    assert str(path) in line
    assert "\n" not in line
    return True


@pytest.mark.parametrize("verb", VERBS)
def test_a_changed_result_is_refused_in_one_line_or_told(verb, tmp_path_factory):
    folder = tmp_path_factory.mktemp(verb)
    written(folder, verb, valid()[verb])
    say(folder, verb)  # which imports the libraries that draw
    modules, outcomes = set(sys.modules), []

    @FUZZ
    @given(changes=CHANGES)
    def check(changes):
        path = written(folder, verb, changed(valid()[verb], changes))
        charted = len(outcomes) % 10 == 0  # specifications of charts take a second
        outcomes.append(refused_or(lambda: say(folder, verb, charted=charted), path))

    check()
    assert set(outcomes) == {True, False}  # neither everything is refused nor nothing
    assert {name for name in set(sys.modules) - modules if not name.startswith("hypothesis.")} == set()


@pytest.mark.slow
def test_accepted_results_are_built_in_full(tmp_path_factory):
    built = 0

    @settings(max_examples=20 * BUILT, suppress_health_check=list(HealthCheck))
    @given(
        verb=st.sampled_from(["swap", "ladder", "geometry", "claims", "diagnosis"]),
        changes=some("mild", "mild", "mild", "set"),
    )
    def check(verb, changes):
        nonlocal built
        folder = tmp_path_factory.mktemp(verb)
        path = written(folder, verb, changed(valid()[verb], changes))
        if built >= BUILT or refused_or(lambda: read(path, verb), path):
            return
        text = report.build(folder, figures=built % 5 == 0).read_text(encoding="utf-8")
        built += 1
        assert "<script>alert" not in text
        assert "\x1b" not in text

    check()
    assert built == BUILT


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder"])
@pytest.mark.parametrize("verb", ["swap", "diagnosis"])
def test_what_is_no_file_is_refused_before_it_is_opened(verb, kind, tailscope_, tmp_path):
    path = tmp_path / f"{verb}.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.mkdir()
    ended = tailscope_("report", tmp_path)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert kind == "loop" or str(path) in ended.err
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
