"""Pictures in the graphical notation of tensor networks, and plots of what stands on the bonds.

A dot is a core, a line is an index with its size on it; a line with a free end is a mode. Each kind of object becomes a
``Diagram`` of nodes and lines, which one function paints: a new kind needs no word of matplotlib.
"""

from tensortrain.viz.draw.curves import plot_entropy, plot_ranks, plot_spectrum
from tensortrain.viz.draw.door import draw

__all__ = ["draw", "plot_entropy", "plot_ranks", "plot_spectrum"]
