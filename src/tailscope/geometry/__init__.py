"""Geometry of features: pure functions of (features, labels), with what chance alone would give beside each value."""

from tailscope.geometry.describe import GeometryResult, describe
from tailscope.geometry.fields import FIELDS

__all__ = ["FIELDS", "GeometryResult", "describe"]
