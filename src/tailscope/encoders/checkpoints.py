"""Find a network's weights in a checkpoint of any codebase: its backbone, and a linear classifier.

A checkpoint is a tree of dictionaries. The network lies where all of its backbone's names are found under one prefix:
`model.` (Lightning), `module.` (DataParallel, averaged models), `net`/`backbone.`, `ema`, `module.encoder_q.` (MoCo),
`feat_model` (classifier-balancing), `state_dict_model` (MiSLAS) and whatever else people choose. What lies beside it, a
criterion, a queue, a projection, is left out and said.
"""

import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tailscope.encoders.unpickling import content
from tailscope.errors import UserError, first_few
from tailscope.tables.checks import listed, names_in
from tailscope.tables.table import LinearLayer

State = dict[str, Tensor]

_DEEPEST = 8
_MOST_CONTAINERS = 10_000


class Container(NamedTuple):
    """A dictionary of tensors in a checkpoint, and the keys that lead to it."""

    where: tuple[str, ...]
    state: State


class Layer(NamedTuple):
    """Where a checkpoint has a linear classifier: in the dictionary at `where`, its names there; it may lack a bias."""

    where: tuple[str, ...]
    weight: str
    bias: str | None


def _walk(content: Mapping[Any, Any]) -> Iterator[Container]:
    """Yield every dictionary that holds tensors, level by level: of any depth that people nest, and no deeper."""
    queue: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    seen = 0
    while queue and seen < _MOST_CONTAINERS:
        where, node = queue.popleft()
        seen += 1
        items = list(node.items() if isinstance(node, Mapping) else enumerate(node))
        state = {str(key): value for key, value in items if isinstance(value, Tensor)}
        if state and isinstance(node, Mapping):
            yield Container(where, state)
        if len(where) < _DEEPEST:
            queue.extend(((*where, str(k)), v) for k, v in items if isinstance(v, Mapping | list | tuple))


_CLASSIFIER_NAMES = ("classifier", "linear", "fc", "head")
_BOOKKEEPING = ("num_batches_tracked", "total_ops", "total_params")
_PREFERRED = ("best", "ema", "swa", "averaged", "teacher", "encoder_q", "online")
"""Which of several networks that fit is taken: averaged weights first, as timm and DINO evaluate, and MoCo's query."""

_PROJECTING = re.compile(r"(^|\.)encoder_[qk]\.$")
"""Prefixes of networks whose last layer is a projection and no classifier."""


class Checkpoint(NamedTuple):
    """What a file holds: its dictionaries of tensors, the outermost first, and the names of its classes, if any."""

    path: Path
    containers: tuple[Container, ...]
    class_names: tuple[str, ...] | None = None

    def at(self, *where: str) -> State:
        """Return the tensors of the dictionary at `where`, empty where there is none."""
        return next((found.state for found in self.containers if found.where == where), {})


@dataclass(frozen=True)
class Place:
    """Where in a checkpoint a network may lie."""

    container: Container
    prefix: str

    @property
    def name(self) -> str:
        """What messages and `--checkpoint-key` call it; empty at the top."""
        return ".".join([*self.container.where, *self.prefix.split(".")]).strip(".")

    def state(self) -> State:
        """Return the tensors below, by their names there."""
        return {k.removeprefix(self.prefix): t for k, t in self.container.state.items() if k.startswith(self.prefix)}


def read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        UserError: the file is missing, damaged or something else, holds more than tensors and plain values, or no
            tensors.
    """
    held = content(path)
    if not isinstance(held, Mapping):
        raise UserError(f"{path}: holds a {type(held).__name__}; save the model's state_dict")
    if "state_dict_model" in held and "state_dict_block" in held:
        raise UserError(f"{path}: MiSLAS's extra block (Places-LT) is not supported; wrap it as module:factory")
    found = tuple(_walk(held))
    if not found:
        keys = listed([str(key) for key in held]) or "nothing"
        raise UserError(f"{path}: holds no tensors; at the top it has {keys}")
    return Checkpoint(path, found, names_in(held))


def places(checkpoint: Checkpoint, names: Iterable[str]) -> list[Place]:
    """Return where all of a backbone's `names` are found under one prefix."""
    wanted = set(_counted(names))
    if not wanted:
        return [Place(checkpoint.containers[0], "")]
    return [place for place, found in _partly(checkpoint, wanted) if found == len(wanted)]


def require_fit(
    checkpoint: Checkpoint, own: Mapping[str, Tensor], model_name: str, classifiers: Sequence[str]
) -> list[Place]:
    """Return the places whose names and shapes are those of the backbone's own tensors.

    Raises:
        UserError: there is none; says how the nearest differs.
    """
    fitting = [place for place in places(checkpoint, own) if not _misfits(place.state(), own, classifiers)]
    if not fitting:
        raise UserError(f"{checkpoint.path}: does not fit {model_name}: {_nearest(checkpoint, own, classifiers)}")
    return fitting


def fit(
    checkpoint: Checkpoint, model: nn.Module, model_name: str, classifiers: Sequence[str], key: str | None = None
) -> tuple[LinearLayer | None, Layer | None, list[str]]:
    """Load the weights into the model, whose classifier layers are replaced by some of the checkpoint's size.

    Return the checkpoint's classifier, if it is linear; where it is, if it is one layer there; and what the user should
    know.

    Raises:
        UserError: as `require_fit`; several fit, and `key` is no part of a single one's name; or the weights are
            quantised, not finite, or no values at all.
    """
    own = backbone_of(model, classifiers)
    fitting = require_fit(checkpoint, own, model_name, classifiers)
    place, notes = _choose(checkpoint.path, fitting, own, model_name, key)
    others = [] if key else _other_classifiers(checkpoint, fitting, place, model, classifiers)
    undecided = [other for other in others if _rank(other) == _rank(place)]
    if undecided:
        same = f"{_names([place, *undecided])} have one backbone and different classifiers"
        notes.append(f"{same}; no classifier file; say whose with --checkpoint-key")
    elif others:
        taken = f"took the classifier of {_names([place])}, not of {_names(others)}, which has the same backbone"
        notes.append(f"{taken}; --checkpoint-key takes another")
    state = place.state()
    _require_values(checkpoint.path, state, own)
    sought = {name: _find_classifier(checkpoint, place, model, name) for name in classifiers}
    strange = [each.what for each in sought.values() if each and each.pair is None]
    linear = {name: each.pair for name, each in sought.items() if each and each.pair and not undecided}
    for name, (weight, bias) in linear.items():
        layer = nn.Linear(weight.shape[1], len(weight))
        layer.load_state_dict({"weight": weight, "bias": bias})
        model.set_submodule(name, layer)
    model.load_state_dict({name: t for name, t in state.items() if name in own}, strict=False)
    if strange:
        notes.append(f"its classifier ({'; '.join(strange)}) is not known to be one linear layer; no classifier file")
    if left_out := _left_out(place, own, {key for each in sought.values() if each for key in each.keys}):
        notes.append(f"left out what is no part of {model_name}: {left_out}")
    notes = [f"{checkpoint.path.name}: {note}" for note in notes]
    if len(linear) != 1:
        return None, None, notes
    [pair] = linear.values()
    at = next(each.layer for each in sought.values() if each and each.pair is pair)
    return LinearLayer.from_arrays(*pair, source=str(checkpoint.path)), at, notes


def _choose(
    path: Path, fitting: list[Place], own: Mapping[str, Tensor], model_name: str, key: str | None
) -> tuple[Place, list[str]]:
    """Return where the network's weights are taken from, and a note where others would fit too."""
    if key is not None:
        exact = [place for place in fitting if place.name == key]
        found = exact or [place for place in fitting if f".{key.strip('.')}." in f".{place.name}."]
        if len(found) == 1:
            return found[0], []
        what = f"fits {_names(found)}; give more of the name" if found else f"not there; what fits is {_names(fitting)}"
        raise UserError(f"{path}: --checkpoint-key {key}: {what}")
    chosen = min(fitting, key=_rank)
    others = [place for place in fitting if place is not chosen and not _equal(place, chosen, own)]
    if any(_rank(place) == _rank(chosen) for place in others):
        several = f"holds several networks that fit {model_name}: {_names([chosen, *others])}"
        raise UserError(f"{path}: {several}; say which with --checkpoint-key")
    taken = f"took the weights of {_names([chosen])}, not of {_names(others)}; --checkpoint-key takes another"
    return chosen, [taken] if others else []


def _other_classifiers(
    checkpoint: Checkpoint, fitting: list[Place], chosen: Place, model: nn.Module, classifiers: Sequence[str]
) -> list[Place]:
    """Return the places with the chosen one's backbone and another classifier, as decoupled trainings leave them."""
    own = backbone_of(model, classifiers)
    twins = [place for place in fitting if place is not chosen and _equal(place, chosen, own)]

    def differs(place: Place, name: str) -> bool:
        found, taken = (_find_classifier(checkpoint, each, model, name) for each in (place, chosen))
        if found is None or taken is None:
            return False
        if found.pair is None or taken.pair is None:
            return found.pair is not taken.pair
        return not all(map(torch.equal, found.pair, taken.pair))

    return [place for place in twins if any(differs(place, name) for name in classifiers)]


def backbone_of(model: nn.Module, classifiers: Sequence[str]) -> State:
    """Return all tensors of the model but its classifiers'."""
    return {k: t for k, t in model.state_dict().items() if k.rpartition(".")[0] not in classifiers}


def _counted(names: Iterable[str]) -> list[str]:
    """Return the names that a checkpoint must have: older ones do not count batches, for instance."""
    return [name for name in names if not name.endswith(_BOOKKEEPING)]


def _partly(checkpoint: Checkpoint, names: set[str]) -> list[tuple[Place, int]]:
    """Return every prefix under which some of the names are, and how many."""
    found: list[tuple[Place, int]] = []
    for container in checkpoint.containers:
        prefixes: Counter[str] = Counter()
        for key in container.state:
            starts = [0, *(match.end() for match in re.finditer(r"\.", key))]
            prefixes.update(key[:start] for start in starts if key[start:] in names)
        found += [(Place(container, prefix), count) for prefix, count in prefixes.items()]
    return found


def _misfits(state: State, own: Mapping[str, Tensor], classifiers: Sequence[str]) -> list[str]:
    """Return how the tensors under a prefix differ from the backbone's: missing, of another shape, or more of them.

    More of them counts within the backbone's own parts: ResNet-34 has all names of ResNet-18, and more blocks.
    """
    missing = [name for name in _counted(own) if name not in state]
    reshaped = [name for name in own if name in state and own[name].shape != state[name].shape]
    inside = {name.partition(".")[0] for name in own if "." in name}
    more = [name for name in _counted(state) if name not in own and name.partition(".")[0] in inside]
    surplus = [name for name in more if not _is_of_classifier(name, own, classifiers)]
    parts = [f"{len(k)} {kind} ({listed(k, 3)})" for kind, k in [("missing", missing), ("surplus", surplus)] if k]
    if reshaped:
        name = reshaped[0]
        shapes = f"{name!r} is {list(state[name].shape)}, not {list(own[name].shape)}"
        parts.append(f"{len(reshaped)} of another shape ({shapes})")
    return parts


def _is_of_classifier(name: str, own: Mapping[str, Tensor], classifiers: Sequence[str]) -> bool:
    """Whether a name lies below a classifier of the model, or below one's usual name where the backbone has nothing."""
    parts = name.split(".")
    stems = [".".join(parts[: i + 1]) + "." for i, part in enumerate(parts) if part in _CLASSIFIER_NAMES]
    absent = [stem for stem in stems if not any(key.startswith(stem) for key in own)]
    return bool(absent) or name.startswith(tuple(f"{each}." for each in classifiers))


def _nearest(checkpoint: Checkpoint, own: Mapping[str, Tensor], classifiers: Sequence[str]) -> str:
    """Say how the place that has most of the names differs."""
    partly = _partly(checkpoint, set(_counted(own)))
    if not partly:
        keys, wanted = [name for container in checkpoint.containers for name in container.state], _counted(own)
        return f"keys: {len(wanted)} missing ({listed(wanted, 3)}), {len(keys)} surplus ({listed(keys, 3)})"
    place = max(partly, key=lambda each: each[1])[0]
    state = place.state()
    where = f" (under {place.name!r})" if place.name else ""
    # RIDE and SADE: layer3s.0, layer3s.1 ... for a layer3.
    stems = {name.partition(".")[0] + "s" for name in own if name not in state}
    experts = sorted({".".join(key.split(".")[:2]) for key in state if key.partition(".")[0] in stems})
    if experts:
        return f"it has several experts ({listed(experts, 6)}){where}; build one of them in a module:factory"
    return f"keys: {', '.join(_misfits(state, own, classifiers))}{where}"


def _names(them: Iterable[Place]) -> str:
    return ", ".join(place.name or "the top level" for place in them)


def _rank(place: Place) -> int:
    """Return the place's number in `_PREFERRED`, and more for all others."""
    words = {*re.split(r"[._]", place.name), *place.name.split(".")}
    return next((i for i, wanted in enumerate(_PREFERRED) if wanted in words), len(_PREFERRED))


def _equal(a: Place, b: Place, own: Mapping[str, Tensor]) -> bool:
    """Whether both places hold the same weights."""
    ours, theirs = a.state(), b.state()
    pairs = [(ours[name], theirs[name]) for name in _counted(own)]
    return all(_has_values(x) and _has_values(y) and x.dtype == y.dtype and bool((x == y).all()) for x, y in pairs)


def _has_values(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.layout == torch.strided


def _require_values(path: Path, state: State, own: Mapping[str, Tensor]) -> None:
    """Refuse weights that are no numbers, or not the ones that they stand for."""
    for name, tensor in ((name, state[name]) for name in own if name in state):
        if not _has_values(tensor):
            kind = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
            raise UserError(f"{path}: {name!r} is a {kind} tensor, without the values of weights")
        if own[name].is_floating_point() and not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path}: {name!r} is {dtype}; quantised weights are not supported")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise UserError(f"{path}: {name!r} holds NaN or infinity: the training diverged, or the file is damaged")


@dataclass(frozen=True)
class _Sought:
    """A classifier's keys in its container; weight [C, d] and bias [C] if it is linear, and what it is if not.

    `layer` is where it is, unless it is made of several parts.
    """

    keys: set[str]
    pair: tuple[Tensor, Tensor] | None
    what: str = ""
    layer: Layer | None = None


def _find_classifier(checkpoint: Checkpoint, place: Place, model: nn.Module, name: str) -> _Sought | None:
    """Look for the classifier under the model's name for it, a usual name, above the backbone, or stored apart."""
    layer = model.get_submodule(name)
    usual = [each for each in _CLASSIFIER_NAMES if not any(k.startswith(f"{each}.") for k in model.state_dict())]
    above = [place.prefix[: match.end()] for match in re.finditer(r"\.", place.prefix)][-2::-1]
    above += [""] if place.prefix else []
    beside = [f"{place.prefix}{each}." for each in (name, *usual)]
    for prefix in [*beside, *(f"{each}{usual}." for each in above for usual in _CLASSIFIER_NAMES)]:
        below = {k.removeprefix(prefix): t for k, t in place.container.state.items() if k.startswith(prefix)}
        if below:
            known = layer if prefix == beside[0] else None
            judged = _judge(prefix, below, layer, known, projecting=bool(_PROJECTING.search(place.prefix)))
            bias = f"{prefix}bias" if "bias" in below else None
            return replace(judged, layer=Layer(place.container.where, f"{prefix}weight", bias))
    return _stored_apart(checkpoint, place, layer)


def _stored_apart(checkpoint: Checkpoint, place: Place, layer: nn.Module) -> _Sought | None:
    """Return the classifier that MiSLAS or classifier-balancing keep beside the backbone, with LWS's scales in it."""
    *above, _ = place.container.where or ("",)
    state, scale = _plain(checkpoint.at(*above, "state_dict_classifier")), None
    if state:
        scale = _plain(checkpoint.at(*above, "state_dict_lws_model")).get("learned_norm")
    else:
        state = _plain(checkpoint.at(*above, "classifier"))
        scale = state.get("scales")
    below = {k.removeprefix("fc."): t for k, t in state.items() if k.startswith("fc.")}
    if not below:
        return None
    judged = _judge("fc.", below, layer, None, projecting=False)
    if judged.pair is None or scale is None:
        return _Sought(set(), judged.pair, judged.what)
    weight, bias = judged.pair
    return _Sought(set(), (weight * scale.reshape(-1, 1), bias * scale.reshape(-1)))


def _plain(state: State) -> State:
    """Return the tensors without the prefix of a wrapper that all names have."""
    for wrapper in ("module.", "_orig_mod."):
        if state and all(name.startswith(wrapper) for name in state):
            return _plain({name.removeprefix(wrapper): t for name, t in state.items()})
    return state


def _judge(prefix: str, below: State, layer: nn.Module, known: nn.Module | None, *, projecting: bool) -> _Sought:
    """Say whether the tensors below a prefix are a linear layer on the features.

    Without a bias that is only known where the model itself has such a layer there: cosine classifiers (LDAM's
    `NormedLinear` [d, C] and others) are stored like one, and are none.
    """
    keys = {prefix + name for name in below}
    shapes = ", ".join(f"{prefix}{name} {list(t.shape)}" for name, t in below.items())
    weight, bias = below.get("weight"), below.get("bias")
    if projecting:
        return _Sought(keys, None, f"{shapes}, a projection")
    width = layer.in_features if isinstance(layer, nn.Linear) else None
    if weight is None or weight.ndim != 2 or not set(below) <= {"weight", "bias"}:
        return _Sought(keys, None, shapes)
    if bias is None:
        if not (isinstance(known, nn.Linear) and known.bias is None and weight.shape[1] == width):
            return _Sought(keys, None, f"{shapes} without a bias, as cosine classifiers are stored")
        bias = weight.new_zeros(len(weight))
    if bias.shape != weight.shape[:1] or width not in (None, weight.shape[1]):
        return _Sought(keys, None, f"{shapes}, for features of width {width}")
    return _Sought(keys, (weight.float(), bias.float()))


def _left_out(place: Place, own: Mapping[str, Tensor], used: set[str]) -> str:
    """Name the other tensors of the place's dictionary, a whole branch at a time."""
    branches: Counter[str] = Counter()
    taken = {f"{place.prefix}{name}" for name in own} | used | {"rows"}  # which our own store keeps beside the weights
    for key in _counted(place.container.state):
        if key not in taken:
            parts = key.split(".")
            prefix = enumerate(place.prefix.split("."))
            shared = next((i for i, part in prefix if parts[i : i + 1] != [part]), len(parts))
            branches[".".join([*parts[: shared + 1], *["*"] * (len(parts) > shared + 1)])] += 1
    named = [f"{name} ({count})" if count > 1 else name for name, count in branches.most_common()]
    return first_few(named, 4)
