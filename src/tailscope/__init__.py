"""tailscope: is the classifier or the representation the bottleneck of a long-tailed data set?"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["diagnose", "ladder", "load", "swap"]


def __getattr__(name: str) -> Any:
    """Return a verb, or all of them as `tailscope.api`; imported on first use, for `import tailscope` is instant."""
    if name == "api" or name in __all__:
        from tailscope import verbs

        return verbs if name == "api" else getattr(verbs, name)
    raise AttributeError(f"module 'tailscope' has no attribute {name!r}")
