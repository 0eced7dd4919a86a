"""What can be done to a model, one stage a file: factorize, heal, and what follows."""

from tensortrain.compression.stages.base import Work, stage
from tensortrain.compression.stages.factorize import Factorize
from tensortrain.compression.stages.heal import Heal

__all__ = ["Factorize", "Heal", "Work", "stage"]
