"""A kernel of our own for what the libraries leave slow on a CPU: what lies between two convolutions."""
