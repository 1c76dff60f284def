"""RecIF-Bench (arXiv 2512.24762): its files read, its metrics as published, runs and other people's predictions evaluated."""
