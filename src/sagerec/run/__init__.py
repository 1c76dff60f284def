"""A run: its folder, and the stages that fill it."""
