"""Named plug-ins and call-strings such as `"ldam(max_margin=0.5)"`.

A call-string is at once a command-line value, a spec field, an input to the store's hash and a table label.
A factory's positional-only parameters are its context, supplied by the program (class counts, say); all others
are hyperparameters with defaults, which a call-string may set.

A registry that names the modules of its factories reads names, defaults and summaries from their source, and imports a
module when it makes something: PyTorch takes seconds, which a list or a mistyped name need not wait for.
"""

import ast
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

from tailscope.errors import UserError, unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered factory with its hyperparameters' defaults and the first line of its docstring."""

    name: str
    factory: Callable[..., T]
    defaults: dict[str, Any]
    summary: str


class Registry(Generic[T]):
    """The factories of one kind of thing, by name.

    >>> losses = Registry("loss")
    >>> @losses.register("focal")
    ... def focal(counts, /, gamma=2.0):
    ...     "Focal loss."
    ...     return (counts, gamma)
    >>> losses.make("focal(gamma=1)", [5, 1])
    ([5, 1], 1.0)
    >>> losses.canonical("focal")
    'focal(gamma=2.0)'
    """

    def __init__(self, kind: str, *sources: str) -> None:
        """Make a registry of a `kind` of things, with `module:variable` of modules that register functions here."""
        self.kind = kind
        self._sources = dict(source.split(":") for source in sources)
        self._registered: dict[str, Entry[T]] = {}

    def register(self, name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Return a decorator that registers a factory under `name`; every hyperparameter needs a default."""

        def add(factory: Callable[..., T]) -> Callable[..., T]:
            known = self._registered if factory.__module__ in self._sources else self._entries
            if name in known:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            parameters = inspect.signature(factory).parameters.values()
            hyper = [p for p in parameters if p.kind is not p.POSITIONAL_ONLY]
            if without := [p.name for p in hyper if p.default is p.empty]:
                raise ValueError(f"{self.kind} {name!r}: hyperparameters without a default: {without}")
            summary = (inspect.getdoc(factory) or "").split("\n")[0]
            self._registered[name] = Entry(name, factory, {p.name: p.default for p in hyper}, summary)
            return factory

        return add

    @cached_property
    def _declared(self) -> dict[str, Entry[T]]:
        """What the sources register."""
        return {entry.name: entry for source in self._sources.items() for entry in _declared_in(*source)}

    @property
    def _entries(self) -> dict[str, Entry[T]]:
        return {**self._declared, **self._registered}

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())

    def parse(self, call: str) -> tuple[Entry[T], dict[str, Any]]:
        """Split a call-string into its entry and all hyperparameters, defaults filled in.

        Raises:
            UserError: the string is malformed, names an unknown entry or hyperparameter (the known are listed), or a
                value is of another type than its default.
        """
        name, args, kwargs = split_call(call, self.kind)
        entries = self._entries
        if name not in entries:
            raise unknown(self.kind, name, sorted(entries))
        entry = entries[name]
        if len(args) > len(entry.defaults):
            raise UserError(f"{self.kind} {call!r}: takes at most {len(entry.defaults)} arguments")
        positional = dict(zip(entry.defaults, args, strict=False))
        if others := [k for k in kwargs if k not in entry.defaults]:
            raise UserError(f"{self.kind} {call!r}: {unknown('argument', others[0], entry.defaults or ['none'])}")
        if twice := [k for k in kwargs if k in positional]:
            raise UserError(f"{self.kind} {call!r}: argument {twice[0]!r} is given twice")
        where = f"{self.kind} {call!r}: "
        given = {k: _like(entry.defaults[k], v, where + k) for k, v in {**positional, **kwargs}.items()}
        return entry, {**entry.defaults, **given}

    def canonical(self, call: str) -> str:
        """Return the call-string with every hyperparameter written out: equal meaning, equal text, equal hash."""
        entry, values = self.parse(call)
        if not values:
            return entry.name
        return f"{entry.name}({', '.join(f'{k}={v!r}' for k, v in values.items())})"

    def make(self, call: str, *context: Any) -> T:
        """Build what the call-string names, with the program's `context` as positional arguments."""
        entry, values = self.parse(call)
        return entry.factory(*context, **values)


def _declared_in(module: str, variable: str) -> Iterator[Entry[Any]]:
    """Yield what a module registers by `@variable.register(name)` above its functions, without importing it."""
    spec = find_spec(module)
    assert spec is not None
    tree = ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8"))
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for decorator in function.decorator_list:
            match decorator:
                case ast.Call(ast.Attribute(ast.Name(id=by), "register"), [ast.Constant(str(name))]) if by == variable:
                    summary = (ast.get_docstring(function) or "").split("\n")[0]
                    yield Entry(name, _imported_when_called(module, function.name), _defaults(function), summary)


def _defaults(function: ast.FunctionDef) -> dict[str, Any]:
    """Return the hyperparameters of a function and their defaults."""
    arguments = function.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]
    given = dict(zip(reversed(names), reversed(arguments.defaults), strict=False))
    positional = {argument.arg: given.get(argument.arg) for argument in arguments.args}
    keywords = zip((argument.arg for argument in arguments.kwonlyargs), arguments.kw_defaults, strict=True)
    return {name: ast.literal_eval(value) for name, value in {**positional, **dict(keywords)}.items() if value}


def _imported_when_called(module: str, function: str) -> Callable[..., Any]:
    def factory(*context: Any, **values: Any) -> Any:
        return getattr(import_module(module), function)(*context, **values)

    factory.__module__ = module
    return factory


def _like(default: Any, value: Any, where: str) -> Any:
    """Return the value in its default's type: 1 and 1.0, or a list and a tuple, mean the same and spell the same."""
    if isinstance(default, float) and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if isinstance(default, tuple) and isinstance(value, list):
        value = tuple(value)
    if isinstance(value, tuple) and default:
        value = tuple(_like(default[0], element, where) for element in value)
    if default is not None and type(value) is not type(default):
        raise UserError(f"{where}={value!r}: expected {type(default).__name__}, like {default!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}={value!r}: expected a finite number")
    return value


def split_call(call: str, kind: str = "method") -> tuple[str, list[Any], dict[str, Any]]:
    """Split `"name(1, b=2)"` into name, positional and keyword literals, without evaluating any code.

    >>> split_call("crop(4, mode='zero')")
    ('crop', [4], {'mode': 'zero'})

    Raises:
        UserError: the text is not a name or a call with literal arguments.
    """
    try:
        node = ast.parse(call.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, [], {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            args = [ast.literal_eval(a) for a in node.args]
            kwargs = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg is not None}
            if len(kwargs) == len(node.keywords):
                return node.func.id, args, kwargs
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        pass
    raise UserError(f"{kind} {call!r}: expected a name or a call with plain values, like 'name(0.5)'")
