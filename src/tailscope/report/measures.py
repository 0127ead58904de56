"""The measures by their field names in result files: label, unit and one line of explanation each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """How a measure is shown.

    Attributes:
        field: its name in `geometry.json`.
        label: its name for readers.
        kind: "degrees", "share" (a fraction shown in per cent), "p", "count" or "plain".
        meaning: one line for a reader who never saw the paper.
    """

    field: str
    label: str
    kind: str
    meaning: str


PAPER = (
    Measure(
        "variance",
        "variance",
        "plain",
        "How widely the class's features scatter: the trace of their covariance over seen and unseen samples.",
    ),
    Measure(
        "covariance_norm",
        "covariance norm",
        "plain",
        "Size of the whole covariance matrix (Frobenius norm): scatter, counting directions that vary together.",
    ),
    Measure(
        "first_pc_share",
        "first PC share",
        "share",
        "Part of the scatter that lies along one direction. High: the class is a needle rather than a ball.",
    ),
    Measure(
        "spread_train_deg",
        "spread, training samples",
        "degrees",
        "Mean angle between a class's training samples and their centre: how compact it looked in training.",
    ),
    Measure(
        "spread_true_deg",
        "spread, with unseen samples",
        "degrees",
        "The same once unseen samples of the class are added: how compact it really is.",
    ),
    Measure(
        "angular_width_deg",
        "angular width",
        "degrees",
        "Largest angle of any training sample to its centre: the edge of the class as training saw it.",
    ),
    Measure(
        "escape_rate",
        "escape rate",
        "share",
        "Share of unseen samples beyond that edge. For few training samples most of it is chance.",
    ),
    Measure(
        "nearest_center_train_deg",
        "nearest wrong centre, training",
        "degrees",
        "Angle from the class's centre to the closest other centre, both from training samples.",
    ),
    Measure(
        "nearest_center_true_deg",
        "nearest wrong centre, with unseen",
        "degrees",
        "The same with centres that include unseen samples. Smaller: classes are closer than training suggested.",
    ),
    Measure(
        "nearest_center_sample_train_deg",
        "sample to wrong centre, training",
        "degrees",
        "Mean angle from a sample to the closest centre of another class, centres from training samples.",
    ),
    Measure(
        "nearest_center_sample_true_deg",
        "sample to wrong centre, with unseen",
        "degrees",
        "The same with samples and centres that include unseen ones.",
    ),
    Measure(
        "center_shift_deg",
        "centre shift",
        "degrees",
        "How far the class's centre turns when unseen samples join. Few training samples shift it by chance alone.",
    ),
)

CALIBRATED = (
    Measure(
        "spread_gap_deg",
        "spread gap",
        "degrees",
        "How much farther unseen samples lie from the class's centre than training samples left out in turn. "
        "0 without memorisation, whatever the class's size.",
    ),
    Measure(
        "spread_gap_q",
        "q of the spread gap",
        "p",
        "Evidence against chance, adjusted for testing every class (Benjamini-Hochberg); mean over seeds.",
    ),
    Measure(
        "center_shift_null_deg",
        "centre shift by chance",
        "degrees",
        "The shift expected if training samples were a random draw from the same cloud.",
    ),
    Measure(
        "center_shift_excess_deg",
        "centre shift beyond chance",
        "degrees",
        "The observed shift minus that expectation. 0: no more than so few samples explain.",
    ),
    Measure(
        "center_shift_q",
        "q of the centre shift",
        "p",
        "Evidence against chance, both directions, adjusted. Mean over seeds.",
    ),
    Measure(
        "escape_rank",
        "escape rank",
        "plain",
        "Share of training samples that lie nearer to the centre than an unseen one does. One half is no difference.",
    ),
    Measure(
        "escape_conformal",
        "conformal escape",
        "share",
        "How often an unseen sample, once it has joined the class, is its farthest. 1/(n+1) is no difference.",
    ),
    Measure(
        "displacement",
        "displacement",
        "plain",
        "Distance between seen and unseen centres in units of the cloud's radius, sampling noise removed; 0 is none.",
    ),
    Measure(
        "variance_ratio",
        "variance ratio",
        "plain",
        "Scatter of training samples over scatter of unseen ones. Below 1: training samples were pulled together.",
    ),
    Measure(
        "effective_rank",
        "effective rank",
        "plain",
        "About how many directions the class's features use, corrected for the number of samples.",
    ),
    Measure(
        "covariance_norm_unbiased",
        "covariance norm, unbiased",
        "plain",
        "Covariance norm without the inflation that few samples cause.",
    ),
    Measure(
        "first_pc_share_low", "first PC share, low", "share", "Lower bracket of the first PC share (cross-validated)."
    ),
    Measure("first_pc_share_high", "first PC share, high", "share", "Upper bracket (the raw, inflated value)."),
)

BY_FIELD = {measure.field: measure for measure in (*PAPER, *CALIBRATED)}

TERMS = (
    ("lt", "The long-tailed training set: few classes have many images, many classes have few."),
    ("true", "The full training set that the long-tailed one was drawn from; balanced, or nearly so."),
    ("matched", "A class-balanced set with as many images as lt: it separates imbalance from the number of images."),
    ("backbone", "The network up to its features: the representation. Stage 1 trains it, then it is frozen."),
    ("classifier", "The last, linear layer. Stage 2 trains a fresh one on the frozen features."),
    ("a → b", "Backbone trained on a, classifier trained on b. Four such pairs say what each part costs."),
    ("gap", "Accuracy of true → true minus that of lt → lt, on the same balanced test images."),
    (
        "share",
        "A part's mean gain from being replaced first and second (Shapley value), divided by the gap. Printed only "
        "where the gap is clearly not 0.",
    ),
    ("interaction", "What replacing both parts gains beyond the sum of replacing each alone."),
    (
        "[a, b]",
        "95 % confidence interval for new trainings and new test images (MOVER). With one seed it covers new test "
        "images only; with two seeds there is none.",
    ),
    ("point", "One percentage point of accuracy."),
)
