"""Classifiers on features with scikit-learn's interface: `fit(X, y)`, `predict`, `predict_proba`.

`CLASSIFIERS` names them all: `CLASSIFIERS.make("tau_norm(tau=0.7)")`. They are imported when one is asked for, for
scikit-learn and PyTorch take seconds, which a list need not wait for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tailscope.registry import Registry

if TYPE_CHECKING:
    from tailscope.classifiers.base import FeatureClassifier, LinearClassifier
    from tailscope.classifiers.estimators import (
        CRT,
        LWS,
        DisAlign,
        LabelAwareSmoothing,
        LogitAdjustedSoftmax,
        LogitAdjustment,
        NearestClassMean,
        SoftmaxRegression,
        TauNorm,
    )
    from tailscope.classifiers.features import OLTR, CosineClassifier, FeatureClouds, MiSLAS

__all__ = [
    "CLASSIFIERS",
    "CRT",
    "CosineClassifier",
    "DisAlign",
    "FeatureClassifier",
    "FeatureClouds",
    "LWS",
    "LabelAwareSmoothing",
    "LinearClassifier",
    "LogitAdjustedSoftmax",
    "LogitAdjustment",
    "MiSLAS",
    "NearestClassMean",
    "OLTR",
    "SoftmaxRegression",
    "TauNorm",
]
CLASSIFIERS: Registry["FeatureClassifier"] = Registry(
    "classifier", "tailscope.classifiers.estimators:CLASSIFIERS", "tailscope.classifiers.features:CLASSIFIERS"
)
_OF_FEATURES = ("CosineClassifier", "FeatureClouds", "MiSLAS", "OLTR")


def __getattr__(name: str) -> Any:
    """Return what is imported on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'features' if name in _OF_FEATURES else 'estimators'}"), name)


def __dir__() -> list[str]:
    return __all__
