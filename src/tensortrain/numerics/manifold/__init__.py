"""Riemannian geometry of the trains of fixed ranks: projection, derivatives, retraction, optimizers."""

from tensortrain.numerics.manifold.autodiff import hvp, riemannian_grad
from tensortrain.numerics.manifold.descent import descend
from tensortrain.numerics.manifold.optim import RiemannianAdam, RiemannianSGD
from tensortrain.numerics.manifold.parameter import TTParameter
from tensortrain.numerics.manifold.point import Point
from tensortrain.numerics.manifold.projection import project, transport
from tensortrain.numerics.manifold.retraction import LineSearch, armijo, retract
from tensortrain.numerics.manifold.tangent import TangentVector

__all__ = [
    "LineSearch",
    "Point",
    "RiemannianAdam",
    "RiemannianSGD",
    "TTParameter",
    "TangentVector",
    "armijo",
    "descend",
    "hvp",
    "project",
    "retract",
    "riemannian_grad",
    "transport",
]
