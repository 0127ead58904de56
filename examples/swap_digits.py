"""Is the classifier or the representation the bottleneck on long-tailed digits? About half a minute on two cores.

python examples/swap_digits.py
"""

import tailscope

data = tailscope.load("digits")
result = tailscope.swap(data, profile="exp:100", recipe="demo", seeds=3)

attribution = result["attribution"]
print(f"gap: {attribution['gap']:.1%}")
for part in ("representation", "classifier"):
    low, high = attribution[part]["ci95"]
    print(f"{part}: {attribution[part]['points']:.1%} [{low:.1%}, {high:.1%}]")
