"""tailscope: is the classifier or the representation the bottleneck of a long-tailed data set?"""

__version__ = "0.1.0"
