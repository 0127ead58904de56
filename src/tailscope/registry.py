"""Named plug-ins and call-strings such as `"ldam(max_margin=0.5)"`.

A call-string is at once a command-line value, a spec field, an input to the store's hash and a table label.
A factory's positional-only parameters are its context, supplied by the program (class counts, say); all others
are hyperparameters with defaults, which a call-string may set.

A registry that names the modules of its factories reads names, defaults and summaries from their source, and imports a
module when it makes something: PyTorch takes seconds, which a list or a mistyped name need not wait for. A factory may
be a dataclass, whose fields with their defaults are its hyperparameters.
"""

import ast
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

from tailscope.errors import UserError, unknown
from tailscope.plugins import Plugin, load_installed, plugin_of

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered factory: its hyperparameters' defaults, the first line of its docstring, and what it asks for.

    `plugin` is the code from outside the package that registered it, if it is not the package's own.
    """

    name: str
    factory: Callable[..., T]
    defaults: dict[str, Any]
    summary: str
    needs: tuple[str, ...] = ()
    plugin: Plugin | None = None


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

    def __init__(self, kind: str, *sources: str, offers: tuple[str, ...] = ()) -> None:
        """Make a registry of a `kind` of things, with `module:variable` of modules that register functions here.

        `offers`: what a thing may need beyond what every one is given, as the registry's users say.
        """
        self.kind, self._offers = kind, offers
        self._sources = dict(source.split(":") for source in sources)
        self._registered: dict[str, Entry[T]] = {}

    def register(self, name: str, *, needs: tuple[str, ...] = ()) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Return a decorator that registers a factory under `name`; every hyperparameter needs a default.

        Of code from outside the package the source is digested here (see `plugins`). What runs as a program or a
        notebook, `__main__`, may register a name again.

        Raises:
            UserError: the name is taken, or no name; or a hyperparameter has no default.
        """
        if others := [need for need in needs if need not in self._offers]:
            raise UserError(f"{self.kind} {name!r}: {unknown('need', others[0], self._offers or ['none'])}")
        registering = sys._getframe(1).f_globals

        def add(factory: Callable[..., T]) -> Callable[..., T]:
            plugin = None if registering.get("__name__") in self._sources else plugin_of(registering, factory)
            self._require_free(name, plugin)
            parameters = inspect.signature(factory).parameters.values()
            hyper = [p for p in parameters if p.kind is not p.POSITIONAL_ONLY]
            if without := [p.name for p in hyper if p.default is p.empty]:
                raise UserError(f"{self.kind} {name!r}: hyperparameters without a default: {', '.join(without)}")
            summary = (inspect.getdoc(factory) or "").split("\n")[0]
            defaults = {p.name: p.default for p in hyper}
            self._registered[name] = Entry(name, factory, defaults, summary, needs, plugin)
            return factory

        return add

    def _require_free(self, name: str, plugin: Plugin | None) -> None:
        known = (self._registered if plugin is None else {**self._declared, **self._registered}).get(name)
        if not name.isidentifier():
            raise UserError(f"{self.kind} {name!r}: expected a name of letters, digits and underscores")
        if known is None:
            return
        by = [of.name if of else str(__package__) for of in (known.plugin, plugin)]
        if set(by) != {"__main__"}:
            both = " and ".join(dict.fromkeys(by))
            raise UserError(f"{self.kind} {name!r} is registered twice, by {both}; take another name")

    @cached_property
    def _declared(self) -> dict[str, Entry[T]]:
        """What the sources register."""
        return {entry.name: entry for source in self._sources.items() for entry in _declared_in(*source)}

    @property
    def _entries(self) -> dict[str, Entry[T]]:
        load_installed()
        return {**self._declared, **self._registered}

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())

    def plugin(self, call: str) -> Plugin | None:
        """Return the code from outside the package that a call-string names; None for the package's own."""
        return self.parse(call)[0].plugin

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

    def needs(self, call: str) -> tuple[str, ...]:
        """Return what the thing that a call-string names asks for, beyond what every one is given."""
        return self.parse(call)[0].needs

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


def plugins_named(calls: Iterable[tuple[Registry[Any], str]]) -> list[Plugin]:
    """Return the code from outside the package that call-strings of registries name, each once, by name."""
    found = {plugin.name: plugin for registry, call in calls if (plugin := registry.plugin(call)) is not None}
    return [found[name] for name in sorted(found)]


def _declared_in(module: str, variable: str) -> Iterator[Entry[Any]]:
    """Yield what a module registers by `@variable.register(name)` above its functions, without importing it."""
    source = _Source.of(module)
    for made in source.tree.body:
        for decorator in made.decorator_list if isinstance(made, ast.FunctionDef | ast.ClassDef) else ():
            match made, decorator:
                case (
                    ast.FunctionDef() | ast.ClassDef(),
                    ast.Call(ast.Attribute(ast.Name(id=by), "register"), [ast.Constant(str(name))], options),
                ) if by == variable:
                    defaults = _defaults(made) if isinstance(made, ast.FunctionDef) else source.fields(made)
                    summary = (ast.get_docstring(made) or "").split("\n")[0]
                    needs = {option.arg: ast.literal_eval(option.value) for option in options}.get("needs", ())
                    yield Entry(name, _imported_when_called(module, made.name), defaults, summary, needs)


@dataclass(frozen=True)
class _Source:
    """A module as it is written."""

    tree: ast.Module

    @classmethod
    def of(cls, module: str) -> "_Source":
        spec = find_spec(module)
        assert spec is not None
        return cls(ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8")))

    def fields(self, made: ast.ClassDef) -> dict[str, Any]:
        """Return the fields of a dataclass that have defaults, those of its bases in the package first."""
        found: dict[str, Any] = {}
        for base in reversed(made.bases):
            found |= self._fields_of(base.id) if isinstance(base, ast.Name) else {}
        for node in made.body:
            match node:
                case ast.AnnAssign(ast.Name(id=name), value=ast.expr() as value):
                    found[name] = self._value(value)
        return found

    def _fields_of(self, name: str) -> dict[str, Any]:
        """Return the fields of a class that the module defines, or imports from another of the package."""
        for node in self.tree.body:
            match node:
                case ast.ClassDef(name=defined) if defined == name:
                    return self.fields(node)
                case ast.ImportFrom(module=str(module), names=names) if name in {alias.name for alias in names}:
                    return _Source.of(module)._fields_of(name) if _ours(module) else {}
        return {}

    def _value(self, value: ast.expr) -> Any:
        """Return a literal, or the constant that a name stands for: of the module, or imported from another of ours."""
        for node in self.tree.body if isinstance(value, ast.Name) else ():
            match node:
                case ast.Assign([ast.Name(id=name)], constant) if name == ast.unparse(value):
                    return ast.literal_eval(constant)
                case ast.ImportFrom(module=str(module), names=names) if _ours(module) and ast.unparse(value) in {
                    alias.name for alias in names
                }:
                    return _Source.of(module)._value(value)
        return ast.literal_eval(value)


def _ours(module: str) -> bool:
    return module.partition(".")[0] == __package__


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
