"""One training loop, two stages, and the recipes they follow as data."""
