"""Riemannian geometry of the trains of fixed ranks: projection, derivatives, retraction, optimizers."""

from tensortrain.manifold.autodiff import hvp, riemannian_grad
from tensortrain.manifold.optim import RiemannianAdam, RiemannianSGD
from tensortrain.manifold.parameter import TTParameter
from tensortrain.manifold.point import Point
from tensortrain.manifold.projection import project, transport
from tensortrain.manifold.retraction import LineSearch, armijo, retract
from tensortrain.manifold.tangent import TangentVector

__all__ = [
    "LineSearch",
    "Point",
    "RiemannianAdam",
    "RiemannianSGD",
    "TTParameter",
    "TangentVector",
    "armijo",
    "hvp",
    "project",
    "retract",
    "riemannian_grad",
    "transport",
]
