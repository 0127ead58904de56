"""tailscope: is the classifier or the representation the bottleneck of a long-tailed data set?"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["diagnose", "ladder", "load", "swap"]


def __getattr__(name: str) -> Any:
    """Import the Python API on first use, so that `tailscope --help` need not wait for PyTorch."""
    if name == "diagnose":
        from tailscope.diagnosis import diagnose

        return diagnose
    if name in __all__:
        from tailscope import api

        return getattr(api, name)
    raise AttributeError(f"module 'tailscope' has no attribute {name!r}")
