"""The training stages, their checkpoints and their records."""
