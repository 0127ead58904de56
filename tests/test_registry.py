"""Call-strings: one spelling for one meaning, no code is run, and mistakes name what is known."""

import importlib
import string
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailscope.errors import UserError
from tailscope.registry import Registry, split_call
from tailscope.verbs import REGISTRIES

things: Registry[dict] = Registry("thing")


@things.register("plain")
def plain(context, /):
    """Takes nothing."""
    return {"context": context}


@things.register("full")
def full(context, /, rate=0.5, steps=3, name="a", drops=(160, 180), names=(), flag=True, anything=None):
    """Takes one of each."""
    return locals()


FULL = "full(rate=0.5, steps=3, name='a', drops=(160, 180), names=(), flag=True, anything=None)"


def test_canonical_spells_out_every_hyperparameter():
    assert things.canonical("plain") == things.canonical(" plain() ") == "plain"
    assert things.canonical("full") == things.canonical("full()") == FULL


@pytest.mark.parametrize(
    "call",
    ["full(0.5)", "full( rate = .5 )", "full(5e-1, 3)", "full(steps=3)", 'full(name="a")', "full(drops=[160, 180])"],
)
def test_equal_meaning_is_equal_text(call):
    assert things.canonical(call) == FULL


def test_a_whole_number_means_the_same_float():
    assert things.canonical("full(rate=1)") == things.canonical("full(rate=1.0)")
    assert things.make("full(rate=1)", 7)["rate"] == 1.0
    assert type(things.make("full(rate=1)", 7)["rate"]) is float


def test_make_passes_context_and_hyperparameters():
    made = things.make("full(2, drops=(1,), anything=[None])", "here")
    assert made == {
        "context": "here",
        "rate": 2.0,
        "steps": 3,
        "name": "a",
        "drops": (1,),
        "names": (),
        "flag": True,
        "anything": [None],
    }


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("nothing", "known: full, plain"),
        ("nothing(1)", "known: full, plain"),
        ("full(colour=1)", "'colour'; known: rate, steps, name, drops, names, flag, anything"),
        ("plain(colour=1)", "known: none"),
        ("plain(1)", "at most 0"),
        ("full(0.5, rate=0.5)", "'rate' is given twice"),
        ("full(rate=1, rate=2)", "expected a name or a call"),
        ("full(rate='x')", "rate='x': expected float, like 0.5"),
        ("full(rate=True)", "expected float"),
        ("full(rate=None)", "expected float"),
        ("full(rate=1e999)", "expected a finite number"),
        ("full(rate=-1e999)", "expected a finite number"),
        (f"full(rate={10**400})", "expected float"),
        ("full(steps=3.0)", "expected int"),
        ("full(steps=True)", "expected int"),
        ("full(flag=1)", "expected bool"),
        ("full(name=b'a')", "expected str"),
        ("full(drops=160)", "expected tuple"),
        ("full(drops=('a',))", "expected int"),
        ("full(names='invert')", "expected tuple"),
    ],
)
def test_mistakes_are_one_line_that_names_the_mend(call, says):
    for method in (things.canonical, things.parse, things.make):
        with pytest.raises(UserError) as raised:
            method(call)
        assert says in str(raised.value)
        assert "\n" not in str(raised.value)
        assert "thing" in str(raised.value)


@pytest.mark.parametrize(
    "call",
    [
        "",
        " ",
        "1",
        "'full'",
        "full(",
        "full)",
        "a.b",
        "a.b()",
        "full(rate)",
        "full(__import__('os').system('true'))",
        "full(rate=open('/etc/passwd'))",
        "full(*[1])",
        "full(**{'rate': 1})",
        "full(f'{1}')",
        "full(lambda: 1)",
        "full()()",
        "full() or full()",
        "full\x00",
        "full; full",
        "full\nfull",
        "(" * 500 + ")" * 500,
        "full(" + "[" * 5000 + "]" * 5000 + ")",
        "full(" + "-" * 20_000 + "1)",
    ],
    ids=lambda text: repr(text)[:30],
)
def test_anything_but_a_plain_call_is_refused(call):
    with pytest.raises(UserError, match="expected a name or a call with plain values"):
        split_call(call)


def test_registering_is_strict():
    with pytest.raises(ValueError, match="registered twice"):
        things.register("plain")(plain)
    with pytest.raises(ValueError, match="without a default"):

        @things.register("broken")
        def broken(context, /, rate):
            return rate

    assert [entry.name for entry in things] == ["plain", "full"]


scalars = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False).map(lambda v: ("rate", v)),
    st.integers().map(lambda v: ("steps", v)),
    st.text(alphabet=string.printable + "é中\u2028", max_size=20).map(lambda v: ("name", v)),
    st.lists(st.integers(), max_size=4).map(lambda v: ("drops", v)),
    st.booleans().map(lambda v: ("flag", v)),
)


@given(st.lists(scalars, unique_by=lambda pair: pair[0]))
def test_the_canonical_spelling_is_a_fixed_point_that_keeps_the_values(pairs):
    call = f"full({', '.join(f'{k}={v!r}' for k, v in pairs)})"
    canonical = things.canonical(call)
    assert things.canonical(canonical) == canonical
    expected = {**things.parse("full")[1], **{k: tuple(v) if k == "drops" else v for k, v in pairs}}
    assert things.parse(canonical)[1] == expected


@given(st.text(max_size=40))
def test_no_text_does_worse_than_a_user_error(text):
    try:
        name, args, kwargs = split_call(text)
    except UserError as error:
        assert "expected a name or a call" in str(error)  # noqa: PT017 (not every text is refused)
    else:
        assert name.isidentifier()
        assert isinstance(args, list)
        assert isinstance(kwargs, dict)


@pytest.mark.parametrize("registry", REGISTRIES.values(), ids=REGISTRIES)
def test_what_the_source_declares_is_what_its_functions_take(registry):
    declared = {entry.name: (entry.defaults, entry.summary) for entry in registry._declared.values()}
    for module in registry._sources:
        importlib.import_module(module)
    inspected = {entry.name: (entry.defaults, entry.summary) for entry in registry._registered.values()}
    assert declared == (inspected if registry._sources else {})


LAZY = """
@THINGS.register("odd")
def made(context, /, a=-1.5, *, b=(1, "x")):
    '''Odd.

    More.
    '''
    return context, a, b

@OTHERS.register("other")
def other(): ...
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Return a function that writes a module and makes a registry of what it registers."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(f"import {name}_registry\nTHINGS = {name}_registry.THINGS\n{text}")
        (tmp_path / f"{name}_registry.py").write_text(
            f"from tailscope.registry import Registry\nTHINGS = Registry('thing', '{name}:THINGS')\n"
        )
        return importlib.import_module(f"{name}_registry").THINGS

    return write


def test_a_source_is_imported_when_something_is_made(source):
    found = source("lazy_things", f"OTHERS = lazy_things_registry.Registry('other'){LAZY}")
    described = [(entry.name, entry.defaults, entry.summary) for entry in found]
    assert described == [("odd", {"a": -1.5, "b": (1, "x")}, "Odd.")]
    assert found.canonical("odd") == "odd(a=-1.5, b=(1, 'x'))"
    assert "lazy_things" not in sys.modules
    assert found.make("odd(a=2)", 7) == (7, 2.0, (1, "x"))
    assert "lazy_things" in sys.modules
    with pytest.raises(ValueError, match="registered twice"):
        found.register("odd")(plain)
    found.register("more")(plain)
    assert [entry.name for entry in found] == ["odd", "more"]


def test_a_default_that_must_be_computed_is_refused(source):
    found = source("computed_things", "@THINGS.register('odd')\ndef made(a=1 + len('x')): ...\n")
    with pytest.raises(ValueError, match="malformed node"):
        list(found)


@pytest.mark.parametrize("registry", REGISTRIES.values(), ids=REGISTRIES)
def test_every_entry_of_the_package_has_a_stable_spelling_and_a_summary(registry):
    for entry in registry:
        canonical = registry.canonical(entry.name)
        assert registry.canonical(canonical) == canonical
        assert len(entry.summary) > 20
        with pytest.raises(UserError, match="known: "):
            registry.parse(f"no_{entry.name}")
