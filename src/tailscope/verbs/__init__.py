"""The verbs in Python: what `tailscope VERB` does is the function of that name, and its parameters are the options.

Each returns what the command line prints with `--json`. Results are written where `out` names a folder. `console` shows
progress and notes; without one a verb is silent. PyTorch takes seconds to import, so it waits until a verb is called.
"""

from tailscope.training import REGISTRIES as REGISTRIES
from tailscope.verbs.measuring import REBALANCED as REBALANCED
from tailscope.verbs.measuring import diagnose, features, rebalance, report
from tailscope.verbs.training import (
    check,
    compare,
    demo,
    geometry,
    ladder,
    load,
    memorization,
    methods,
    subset,
    swap,
)

__all__ = [
    "check",
    "compare",
    "demo",
    "diagnose",
    "features",
    "geometry",
    "ladder",
    "load",
    "memorization",
    "methods",
    "rebalance",
    "report",
    "subset",
    "swap",
]
