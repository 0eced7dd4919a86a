"""In which order the sites of a train should stand: neighbours that know much of each other make ranks small."""

from tensortrain.numerics.ordering.information import mutual_information
from tensortrain.numerics.ordering.order import order_sites

__all__ = ["mutual_information", "order_sites"]
