"""tailscope: is the classifier or the representation the bottleneck of a long-tailed data set?

>>> import tailscope
>>> [name for name in ("diagnose", "swap") if name in dir(tailscope)]
['diagnose', 'swap']
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tailscope.errors import UserError

if TYPE_CHECKING:
    from tailscope import classifiers
    from tailscope.integrations.monitor import Monitor
    from tailscope.tables.table import FeatureTable
    from tailscope.verbs import compare, diagnose, features, geometry, ladder, load, rebalance, swap

__version__ = "0.1.0"
__all__ = [
    "FeatureTable", "Monitor", "UserError", "classifiers",
    "compare", "diagnose", "features", "geometry", "ladder", "load", "rebalance", "swap",
]  # fmt: skip
_LAZY = {
    **dict.fromkeys(__all__[4:], "tailscope.verbs"),
    "FeatureTable": "tailscope.tables.table",
    "Monitor": "tailscope.integrations.monitor",
}


def __getattr__(name: str) -> Any:
    """Return what is imported on first use, for `import tailscope` is instant; `tailscope.api` is all the verbs."""
    if name in ("api", "classifiers"):
        return import_module("tailscope.verbs" if name == "api" else "tailscope.classifiers")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tailscope' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
