"""Faults at random: kills, races, failing files, flipped bits. `make test-faults`, or a small round by `pytest`."""
