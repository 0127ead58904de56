"""Experiments: each is a plan of runs that ends in a table. They read test accuracy; training never does."""
