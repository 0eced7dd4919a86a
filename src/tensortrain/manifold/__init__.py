"""The public name of ``tensortrain.numerics.manifold``."""

from tensortrain.numerics.manifold import (
    LineSearch,
    Point,
    RiemannianAdam,
    RiemannianSGD,
    TangentVector,
    TTParameter,
    armijo,
    hvp,
    project,
    retract,
    riemannian_grad,
    transport,
)

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
