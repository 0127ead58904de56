"""The measurements of a class: every field of a result with its one-line definition.

S are the class's n training samples, U its m unseen ones, T both together; mu_S, mu_U and mu_T their means, Sigma_S,
Sigma_U and Sigma_T their sample covariances. Angles are in degrees between raw vectors. A field is None where it is
undefined. "By chance" means: on average over splits of T into n training and m unseen samples at random.
"""

from typing import Any

Entry = dict[str, Any]

MOST = 1e100
"""No measure is beyond: what is computed or drawn from one does not overflow."""

FIELDS: dict[str, str] = {
    "index": "number of the class",
    "name": "name of the class",
    "group": "head, body or tail by training count; None for fewer than 3 classes",
    "train_count": "n, training samples measured",
    "unseen_count": "m, unseen samples measured",
    "variance": "trace of Sigma_T",
    "covariance_norm": "Frobenius norm of Sigma_T",
    "covariance_norm_unbiased": "root of the unbiased estimate of the squared Frobenius norm of Sigma_T",
    "first_pc_share": "largest eigenvalue of Sigma_T over its trace",
    "first_pc_share_low": "the same along a direction found on one half of T and measured on the other: errs low",
    "first_pc_share_high": "the raw share again, which errs high: the upper end of the bracket",
    "first_pc_share_noise_reduced": "the share after taking off the mean of the other eigenvalues",
    "effective_rank": "squared trace of Sigma_T over its squared Frobenius norm, both unbiased",
    "variance_unseen": "trace of Sigma_U",
    "variance_ratio": "trace of Sigma_S over trace of Sigma_U",
    "variance_ratio_null": "the same by chance (geometric mean)",
    "between_share": "share of T's squared deviations that lies between mu_S and mu_U",
    "between_share_null": "the same by chance, 1 / (n + m - 1)",
    "norm_ratio": "mean length of S over mean length of U",
    "spread_train_deg": "mean angle of S to mu_S",
    "spread_train_null_deg": "the same by chance",
    "spread_train_excess_deg": "spread_train_deg minus its value by chance",
    "spread_true_deg": "mean angle of T to mu_T",
    "angular_width_deg": "largest angle of S to mu_S",
    "angles_train_quantiles_deg": "quantiles .05 .25 .5 .75 .95 of the angles of S to mu_S",
    "angles_true_quantiles_deg": "quantiles .05 .25 .5 .75 .95 of the angles of T to mu_S",
    "spread_gap_deg": "mean angle of U minus that of S, each to the mean of S without one sample; 0 by chance",
    "spread_gap_null_deg": "the permutation test's own form of the gap (no sample left out for U) by chance",
    "spread_gap_trimmed_deg": "the gap without the furthest tenth of S and of U",
    "spread_gap_p": "one-sided permutation p-value of the gap",
    "spread_gap_q": "the same after Benjamini-Hochberg over the classes",
    "spread_gap_permutations": "number of permutations behind the p-value",
    "spread_gap_flagged": "whether this q is at most alpha",
    "spread_gap_material": "whether the gap is at least 2 degrees or escape_rank at least 0.6 (conventions)",
    "spread_gap_unit_p": "p-value of the gap when centres are means of unit vectors",
    "escape_rate": "share of U further from mu_S than all of S",
    "escape_rate_null": "the same by chance",
    "escape_rate_excess": "escape_rate minus its value by chance",
    "escape_conformal": "how often an unseen sample, joined to S, is the furthest from the common mean",
    "escape_conformal_null": "the same by chance, 1 / (n + 1)",
    "escape_rank": "share of S nearer to that common mean than the unseen sample; 1/2 by chance",
    "center_shift_deg": "angle between mu_S and mu_T",
    "center_shift_null_deg": "the same by chance",
    "center_shift_excess_deg": "center_shift_deg minus its value by chance",
    "center_shift_p": "two-sided permutation p-value of the shift",
    "center_shift_q": "the same after Benjamini-Hochberg over the classes",
    "center_shift_permutations": "number of permutations behind the p-value",
    "center_shift_flagged": "whether this q is at most alpha",
    "center_shift_unit_p": "p-value of the shift when centres are means of unit vectors",
    "center_shift_unseen_deg": "angle between mu_S and mu_U",
    "displacement": "distance of mu_S and mu_U without its noise, over the root of the trace of Sigma_U; 0 by chance",
    "nearest_center_train_deg": "angle from mu_S to the nearest other class's mu_S",
    "nearest_center_train_class": "that class",
    "nearest_center_train_null_deg": "the same angle when every class's centre is a mean of n unseen samples",
    "nearest_center_train_excess_deg": "nearest_center_train_deg minus its value by chance",
    "nearest_center_true_deg": "angle from mu_T to the nearest other class's mu_T",
    "nearest_center_true_class": "that class",
    "nearest_center_sample_train_deg": "mean over S of the angle to the nearest other class's mu_S",
    "nearest_center_sample_true_deg": "mean over T of the angle to the nearest other class's mu_T",
}


def empty_entry() -> Entry:
    """Return an entry with every field undefined."""
    return dict.fromkeys(FIELDS)
