"""The public name of ``tensortrain.numerics.manifold``."""

from tensortrain.numerics.manifold import *  # noqa: F403
from tensortrain.numerics.manifold import __all__ as __all__
