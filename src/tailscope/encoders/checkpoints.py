"""Read checkpoints of any codebase, and fit them to a model: backbone and classifier, or a list of what differs.

Files are safetensors or what `torch.save` writes, read with `weights_only=True`. Known layouts: a state_dict, one
inside a dict, wrappers' prefixes (`module.`), and those of LDAM-DRW (Cao et al. 2019), MiSLAS (Zhong et al. 2021) and
classifier-balancing (Kang et al. 2020).
"""

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailscope.array_files import message_of
from tailscope.errors import UserError
from tailscope.field_checks import listed
from tailscope.linear_layer import LinearLayer
from tailscope.store import load_tensors

State = dict[str, Tensor]

_INSIDE = ("state_dict_best", "state_dict", "model", "model_state_dict")
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_CLASSIFIER_NAMES = ("classifier", "linear", "fc", "head")
_DAMAGED = (OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError)

# Bookkeeping that training scripts put beside the weights: plain values, of which unpickling runs no code.
_SCALAR: Any = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_SCALAR, "numpy.core.multiarray.scalar"),  # NumPy 1's name
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8", "?")),
]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's weights under plain names.

    Attributes:
        path: the file.
        state: all tensors of the network, or of the backbone where the classifier is stored apart.
        classifier: weight [C, d] and bias [C] of a classifier that is stored apart, or None.
    """

    path: Path
    state: State
    classifier: tuple[Tensor, Tensor] | None

    def classifier_prefix(self, names: Sequence[str]) -> str | None:
        """Return the name under which `state` holds a classifier: one of the model's `names`, or a usual one."""
        for name in (*names, *_CLASSIFIER_NAMES):
            weight = self.state.get(f"{name}.weight")
            if weight is not None and weight.ndim == 2:
                return name
        return None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint and undo its layout.

    Raises:
        UserError: the file is missing or damaged, holds more than tensors and plain values, or holds no state_dict.
    """
    if not path.is_file():
        raise UserError(f"--checkpoint {path}: no such file")
    content: Any = load_tensors(path) if path.suffix == ".safetensors" else _unpickle(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}; save the model's state_dict")
    if "state_dict_model" in content:  # MiSLAS
        if "state_dict_block" in content:
            raise UserError(f"{path}: MiSLAS's extra block (Places-LT) is not supported; wrap it as module:factory")
        scale = _state(content.get("state_dict_lws_model", {})).get("learned_norm")
        apart = _apart(_state(content.get("state_dict_classifier", {})), scale)
        return _checked(path, _state(content["state_dict_model"]), apart)
    for key in _INSIDE:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if isinstance(content.get("feat_model"), Mapping):  # classifier-balancing
        classifier = _state(content.get("classifier", {}))
        return _checked(path, _state(content["feat_model"]), _apart(classifier, classifier.get("scales")))
    return _checked(path, _state(content), None)


def fit(checkpoint: Checkpoint, model: nn.Module, model_name: str, classifiers: Sequence[str]) -> LinearLayer | None:
    """Load the weights into the model, whose classifier layers are replaced by some of the checkpoint's size.

    Args:
        checkpoint: the weights.
        model: changed in place.
        model_name: what messages call it.
        classifiers: names of the model's classifier layers; all but the backbone's names may be absent.

    Returns:
        The checkpoint's classifier, or None where it has none, or several.

    Raises:
        UserError: keys are missing, surplus or of another shape; says how many and which are the first.
    """
    state = {k: v for k, v in checkpoint.state.items() if k != "rows"}  # of our own store: the training rows
    found = []
    for name in classifiers:
        pair = checkpoint.classifier or _take(state, model, name)
        if pair is not None:
            _replace(checkpoint.path, model, name, *pair)
            found.append(pair)
    own = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] not in classifiers}
    _require_equal(checkpoint.path, model_name, own, state)
    model.load_state_dict(state, strict=False)
    return LinearLayer.from_arrays(*found[0], source=str(checkpoint.path)) if len(found) == 1 else None


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle protocols; what cannot be read is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {culprit[1]}, and only tensors are unpickled" if culprit else "is no checkpoint"
        raise UserError(f"{path}: {what}; save the model's state_dict by itself") from None
    except _DAMAGED as error:
        raise UserError(f"{path}: not a readable checkpoint, or truncated ({message_of(error)[:80]})") from None


def _state(content: Mapping[str, Any]) -> State:
    """Return the tensors of a state_dict without the prefixes that wrappers put before every name."""
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    stripped = True
    while state and stripped:
        stripped = False
        for prefix in _WRAPPERS:
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): v for name, v in state.items()}
                stripped = True
    return state


def _checked(path: Path, state: State, classifier: tuple[Tensor, Tensor] | None) -> Checkpoint:
    if not state:
        raise UserError(f"{path}: holds no state_dict; looked at the top and under {', '.join(_INSIDE)}")
    return Checkpoint(path, state, classifier)


def _apart(state: State, scale: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return the linear layer `fc` of a classifier stored apart, its logits multiplied by LWS's learnt scales [C]."""
    if "fc.weight" not in state:
        return None
    weight = state["fc.weight"].float()
    bias = state["fc.bias"].float() if "fc.bias" in state else weight.new_zeros(len(weight))
    if scale is None:
        return weight, bias
    return weight * scale.reshape(-1, 1), bias * scale.reshape(-1)


def _take(state: State, model: nn.Module, name: str) -> tuple[Tensor, Tensor] | None:
    """Remove the classifier from the state, under the model's name for it or a usual one, and return it."""
    backbone = {key.rpartition(".")[0] for key in model.state_dict()} - {name}
    prefixes = [name, *(usual for usual in _CLASSIFIER_NAMES if usual not in backbone)]
    prefix = next((p for p in prefixes if state.get(f"{p}.weight", torch.empty(0)).ndim == 2), None)
    if prefix is None:
        return None
    weight, bias = state.pop(f"{prefix}.weight").float(), state.pop(f"{prefix}.bias", None)
    layer = model.get_submodule(name)
    width = layer.in_features if isinstance(layer, nn.Linear) else weight.shape[1]
    if bias is None and weight.shape[0] == width and (prefix == "linear" or weight.shape[1] != width):
        # LDAM's cosine classifier, stored [d, C]: its decisions are those of the normalised columns without a bias.
        weight = F.normalize(weight, dim=0).T.contiguous()
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.float()


def _replace(path: Path, model: nn.Module, name: str, weight: Tensor, bias: Tensor) -> None:
    layer = model.get_submodule(name)
    if isinstance(layer, nn.Linear) and layer.in_features != weight.shape[1]:
        raise UserError(
            f"{path}: its classifier takes {weight.shape[1]} features, but the model has {layer.in_features}"
        )
    linear = nn.Linear(weight.shape[1], len(weight))
    linear.load_state_dict({"weight": weight, "bias": bias})
    model.set_submodule(name, linear)


def _require_equal(path: Path, model_name: str, own: State, state: State) -> None:
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    surplus = [k for k in state if k not in own]
    reshaped = [k for k in own if k in state and own[k].shape != state[k].shape]
    parts = [
        f"{len(keys)} {kind} ({listed(keys, 3)})" for kind, keys in [("missing", missing), ("surplus", surplus)] if keys
    ]
    if reshaped:
        shapes = f"{reshaped[0]!r} is {list(state[reshaped[0]].shape)}, not {list(own[reshaped[0]].shape)}"
        parts.append(f"{len(reshaped)} of another shape ({shapes})")
    if parts:
        raise UserError(f"{path}: does not fit {model_name}: keys: {', '.join(parts)}")
