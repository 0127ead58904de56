"""The paper itself: what it printed, what it claims, and how to put our results beside it.

It is "Where are the bottlenecks in long-tailed classification?", an anonymous conference submission without public
code. Its recipes stand with the others in `tailscope.training.recipes`.
"""
