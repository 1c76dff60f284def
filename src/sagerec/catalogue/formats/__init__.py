"""Readers of the formats that people have, and the writer that makes a canonical dataset of what they read."""
