"""Baselines that every policy is measured beside, in the same harness: popularity, item-kNN, SASRec."""
