"""What can be done to a model, one stage a file: factorize, heal, and what follows."""

from tensortrain.compression.stages.base import Work, stage
from tensortrain.compression.stages.factorize import Factorize
from tensortrain.compression.stages.heal import Heal
from tensortrain.compression.stages.local import HealLocally
from tensortrain.compression.stages.refit import Refit

__all__ = ["Factorize", "Heal", "HealLocally", "Refit", "Work", "stage"]
