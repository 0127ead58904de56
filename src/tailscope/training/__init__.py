"""One training loop, two stages, and the recipes they follow as data."""

from tailscope.registry import Registry

__all__ = ["SCHEDULES"]

SCHEDULES: Registry[list[float]] = Registry("schedule", "tailscope.training.recipes:SCHEDULES")
