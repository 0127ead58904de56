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

__all__ = [
    "CLASSIFIERS",
    "CRT",
    "DisAlign",
    "FeatureClassifier",
    "LWS",
    "LabelAwareSmoothing",
    "LinearClassifier",
    "LogitAdjustedSoftmax",
    "LogitAdjustment",
    "NearestClassMean",
    "SoftmaxRegression",
    "TauNorm",
]
