"""Evaluation: metrics with intervals over a split, and the baselines in the same harness."""
