"""Tables of features: arrays in files of any kind, read and checked once."""
