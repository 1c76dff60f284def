"""Semantic IDs, an action space: items -> vectors -> residual codes -> unique IDs."""
