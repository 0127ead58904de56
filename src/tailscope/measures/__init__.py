"""Geometry of features: pure functions of (features, labels), with what chance alone would give beside each value."""

from tailscope.measures.describe import GeometryResult, describe
from tailscope.measures.fields import FIELDS
from tailscope.measures.rows import ClassRows, group_rows, unseen_copies

__all__ = ["FIELDS", "ClassRows", "GeometryResult", "describe", "group_rows", "unseen_copies"]
