"""The catalogue stage: the canonical dataset, the simulated store, splits and their audit."""
