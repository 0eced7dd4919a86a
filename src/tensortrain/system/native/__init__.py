"""Contraction plans in C++, where they have been built: the same products without Python between them.

Small layers spend more time between their products than in them. ``build`` (``tensortrain build-kernels``) compiles
the sources in this folder once for a machine, with the C++ compiler that is there; later processes load what it made.
Without it everything runs in Python, which stays the reference: ``contract/execute.py`` does the same products in the
same order.
Kernels serve plain float tensors on the CPU. Tracing, transforms, modes, autocast and subclasses take Python's way.
"""

from __future__ import annotations

from tensortrain.system.native.build import build
from tensortrain.system.native.load import built_path, library, python_only

__all__ = ["build", "built_path", "library", "python_only"]
