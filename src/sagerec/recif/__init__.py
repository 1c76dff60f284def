"""RecIF-Bench (arXiv 2512.24762): files, metrics as published, runs and other people's predictions."""
