"""sagerec: preference alignment of generative recommenders."""

__version__ = "0.1.0"
