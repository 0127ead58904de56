"""Classifiers on features with scikit-learn's interface: `fit(X, y)`, `predict`, `predict_proba`.

`CLASSIFIERS` names them all: `CLASSIFIERS.make("tau_norm(tau=0.7)")`.
"""

from tailscope.classifiers.base import CLASSIFIERS, FeatureClassifier, LinearClassifier
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
