"""Benchmarks: `python -m benchmarks [--quick] [--only train,swap]`, tables with `python -m benchmarks table`.

Each benchmark compares arms (ours, rivals, limits). An arm runs in a process of its own, because allocator settings act
on a whole process, and works in slices that the parent hands out in turn (ABAB): whatever else the machine does hits
all arms alike. A ratio is computed within each round; reported are the median round and the lowest and highest.
"""
