"""Classifiers on features as steps of scikit-learn's pipelines and grid searches."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tailscope.classifiers import CRT


def test_a_classifier_is_the_end_of_a_pipeline_and_its_penalty_is_searched():
    X, y = load_digits(return_X_y=True)
    train, held_out = np.arange(0, 600), np.arange(600, 1000)
    search = GridSearchCV(make_pipeline(StandardScaler(), CRT()), {"crt__l2": [1e-2, 1e3]}, cv=3)
    search.fit(X[train], y[train])
    assert search.best_params_ == {"crt__l2": 1e-2}  # a thousand leaves nothing of the weights
    by_hand = CRT(l2=1e-2).fit(StandardScaler().fit_transform(X[train]), y[train])
    scaled = StandardScaler().fit(X[train]).transform(X[held_out])
    assert (search.predict(X[held_out]) == by_hand.predict(scaled)).all()
    assert search.score(X[held_out], y[held_out]) > 0.85
