"""Classifiers on features with scikit-learn's interface: `fit(X, y)`, `predict`, `predict_proba`.

`CLASSIFIERS` names them all: `CLASSIFIERS.make("tau_norm(tau=0.7)")`.
"""

from tailscope.classifiers.base import CLASSIFIERS, FeatureClassifier, LinearClassifier
from tailscope.classifiers.calibrated import LWS, DisAlign
from tailscope.classifiers.nearest_mean import NearestClassMean
from tailscope.classifiers.post_hoc import LogitAdjustment, TauNorm
from tailscope.classifiers.softmax import CRT, LabelAwareSmoothing, LogitAdjustedSoftmax, SoftmaxRegression

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
