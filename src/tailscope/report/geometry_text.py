"""How to read Figures 4 to 8, for someone who never saw the paper."""

TITLES = {
    "fig4": "Figure 4. How widely each class scatters",
    "fig5": "Figure 5. Is a class a ball or a needle?",
    "fig6": "Figure 6. Compactness: do unseen samples stay inside?",
    "fig7": "Figure 7. Separation: how near is the nearest wrong class?",
    "fig8": "Figure 8. Localisation: is the class where training put it?",
}
VARIANTS = {
    "calibrated": (
        "Calibrated",
        "Unseen samples are the test images, which no encoder trained on, and every measure is set against what chance "
        "alone gives a class with so few training samples. Read this one to decide whether an effect is real.",
    ),
    "paper": (
        "As in the paper",
        "Unseen samples are the training images that the long-tailed set left out (the encoder “true” trained on "
        "them), and values are raw: for small classes part of shift and escape is chance. Read this one to compare "
        "with published figures.",
    ),
}
HOW = {
    ("paper", "fig4"): (
        "Variance (left) and covariance norm (right) of each class's features over all its samples. A line that rises "
        "to the right means that rare classes are spread more widely."
    ),
    ("paper", "fig5"): (
        "Share of a class's scatter along its single most important direction. Higher: the class is stretched into a "
        "needle, which a linear classifier separates less easily."
    ),
    ("paper", "fig6"): (
        "Angles to the centre of the class's training samples: thin lines hold 90 % of the samples, thick ones half, "
        "points are medians. Escape rate: unseen samples farther out than every training sample."
    ),
    ("paper", "fig7"): (
        "Angle to the closest centre of another class, once with centres of training samples, once with unseen samples "
        "added. The drop between the two is separation that existed only in training."
    ),
    ("paper", "fig8"): (
        "How far each centre turns when unseen samples join, next to the mean angle of the class's samples. A shift as "
        "large as the spread means that the class lies somewhere else than training suggested."
    ),
    ("calibrated", "fig4"): (
        "Left: covariance norm, corrected for the number of samples. Right: scatter of training samples over that of "
        "unseen ones; below 1 (the line), training pulled them together."
    ),
    ("calibrated", "fig5"): (
        "Left: the first PC share lies between a cross-validated low and a raw high estimate. Right: about how many "
        "directions a class uses; fewer is more needle-like."
    ),
    ("calibrated", "fig6"): (
        "Left: how much farther out unseen samples lie than training samples that are left out of their own centre. "
        "Right: share of training samples nearer to the centre than an unseen one. Dark lines mean no difference; "
        "points are filled where q ≤ 0.05 in most seeds."
    ),
    ("calibrated", "fig7"): (
        "Angle to the closest centre of another class, once with centres of training samples, once with test images "
        "added. The drop between the two is separation that existed only in training."
    ),
    ("calibrated", "fig8"): (
        "Left: centre shift beyond what so few samples explain. Right: distance between seen and unseen centres in "
        "units of the cloud's radius, sampling noise removed. Dark lines mean no difference; points on the left are "
        "filled where q ≤ 0.05 in most seeds."
    ),
}
