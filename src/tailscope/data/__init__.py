"""Images as tensors you may index: sources, long-tailed profiles, and the subsets drawn by them."""
