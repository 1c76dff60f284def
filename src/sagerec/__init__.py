"""sagerec: preference alignment of generative recommenders."""

from sagerec.recommend import Recommender, load

__version__ = "0.1.0"
__all__ = ["Recommender", "__version__", "load"]
