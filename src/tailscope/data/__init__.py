"""Images as tensors you may index: sources, long-tailed profiles, and the subsets drawn by them."""

PROFILES = "exp:IF, step:IF, balanced, balanced:N, full, counts:N,N,..., COUNTS.json"
"""The shapes of training counts that are known (`subsets.resolve`), in words."""
