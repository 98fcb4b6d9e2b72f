"""Measurements, never timed tests: ``python -m tests.benchmarks``, and ``.gpu`` for an accelerator.

Every figure is compared with a peer in the same run, interleaved with it, and repeated. The spread
between the smallest and the largest repetition is printed beside each median: a difference
smaller than that is noise.
"""
