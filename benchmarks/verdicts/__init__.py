"""The verdict's own test: diagnoses of features whose true distribution is at hand, judged by what is true there.

`python -m benchmarks --only verdicts` draws cases as a user has them (a long-tailed training set, some held-out samples
of each class, perhaps a test file), diagnoses each, and compares every promise with the truth, which is computed from
all of D* and from test samples that the diagnosis never saw. `sources` has the features, `truth` what is true of them,
`cases` the plan and one case's examination, `summary` the promises and the page, `run` does the work and goes on where
it was stopped.
"""
