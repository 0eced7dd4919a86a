"""The registered cases: inputs, the answer they are checked against, and the floor of their time.

The floor is ``max(bytes / bandwidth, flops / GEMM rate)`` with both rates measured in the same run. Bytes and
flops are those of the leanest algorithm known for the operation, written out in the ``_*_floor`` functions. They
count what cannot be left out, so no contender is expected to reach 1; a flop is one addition or multiplication
of the dtype at hand.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peers import Cores, Job
from torch import Tensor

__all__ = ["CASES", "Case", "Problem", "drawn_cases"]


@dataclass(frozen=True)
class Problem:
    """One set of inputs.

    Attributes:
        args: ``(kind, data)`` of each operand: "dense" a tensor, "train" and "matrix" lists of cores, "trains" a
            list of trains.
        job: What is asked.
        error: From the unloaded result to the relative error, a fraction.
        tol: Largest error that counts as agreement.
        floor: ``(bytes, flops)``.
        predicted: ``(bytes, flops)`` of large intermediates by name, to leave out what cannot end in time.
        dtype: Of the operands.
        shapes: For the record.
    """

    args: tuple[tuple[str, Any], ...]
    job: Job
    error: Callable[[Any], float]
    tol: float
    floor: tuple[int, int]
    dtype: torch.dtype
    shapes: dict[str, Any]
    predicted: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A registered case; ``make(quick)`` builds its inputs, smaller ones for a trial run."""

    name: str
    operation: str
    make: Callable[[bool], Problem]
    unit: bool = False  # x.clone() runs in the same rounds


def cases() -> dict[str, Case]:
    """All cases by name, in the order of the report."""
    found = [
        _dense_case("24^5 rank 12, eps 1e-8", (24,) * 5, (8,) * 5, 12, eps=1e-8, noise=1e-10),
        _dense_case("24^5 rank 12, eps 1e-5", (24,) * 5, (8,) * 5, 12, eps=1e-5, noise=1e-10),
        _dense_case("2^24 rank 6, eps 1e-8", (2,) * 24, (2,) * 14, 6, eps=1e-8, noise=1e-10),
        _dense_case("8^8 rank 50, eps 1e-8", (8,) * 8, (6,) * 5, 50, eps=1e-8, noise=1e-10),
        _dense_case("flat 16^5, eps 1e-8", (16,) * 5, (5,) * 5, None, eps=1e-8),
        _dense_case("flat 16^5, eps 0.3", (16,) * 5, (5,) * 5, None, eps=0.3),
        _dense_case("24^5 rank 12 float32, eps 1e-4", (24,) * 5, (8,) * 5, 12, eps=1e-4, dtype=torch.float32),
        _dense_case(
            "16^5 rank 12 complex128, eps 1e-8", (16,) * 5, (6,) * 5, 12, eps=1e-8, noise=1e-10, dtype=torch.complex128
        ),
        Case("round 80 -> 40, eps 1e-6", "round", functools.partial(_rounding, eps=1e-6)),
        Case("round 80 -> 40, fixed rank", "round", functools.partial(_rounding, eps=None)),
        Case("round 64 trains 16 -> 8, eps 1e-6", "round_batched", _batched_rounding),
        *(Case(f"dot, rank {rank}", "dot", functools.partial(_dot, rank)) for rank in (10, 50, 200)),
        *(Case(f"Hadamard, rank {rank}", "hadamard", functools.partial(_hadamard, rank)) for rank in (10, 50, 200)),
        *(Case(f"matvec, rank {rank}", "matvec", functools.partial(_matvec, rank)) for rank in (10, 50, 200)),
    ]
    return {case.name: case for case in found}


def drawn_cases(seed: int, n: int) -> dict[str, Case]:
    """Cases of sizes drawn at random, the operations in turn; more of them begin with the same ones."""
    source = random.Random(f"core {seed}")
    found = [_DRAWS[k % len(_DRAWS)](source) for k in range(n)]
    return {case.name: case for case in found}


def _draw_svd(source: random.Random) -> Case:
    d, rank = source.randint(3, 16), source.randint(2, 24)
    shape = _drawn_modes(source, d, numel=math.exp(source.uniform(math.log(2e5), math.log(8e6))))
    return _dense_case(f"TT-SVD {_brief(shape)} rank {rank}, eps 1e-8", shape, (4,) * 6, rank, eps=1e-8, noise=1e-10)


def _draw_rounding(source: random.Random) -> Case:
    shape, rank = _drawn_chain(source, most_flops=2e10, growth=20)
    name = f"round {_brief(shape)}, rank {2 * rank} -> {rank}, eps 1e-6"
    return Case(name, "round", functools.partial(_rounding, eps=1e-6, shape=shape, rank=rank))


def _draw_dot(source: random.Random) -> Case:
    shape, rank = _drawn_chain(source, most_flops=2e10, growth=4)
    return Case(f"dot {_brief(shape)}, rank {rank}", "dot", functools.partial(_dot, rank, shape=shape))


def _draw_hadamard(source: random.Random) -> Case:
    shape, rank = _drawn_chain(source, most_flops=2e9, growth=20, most_rank=16)
    return Case(f"Hadamard {_brief(shape)}, rank {rank}", "hadamard", functools.partial(_hadamard, rank, shape=shape))


def _draw_matvec(source: random.Random) -> Case:
    shape, rank = _drawn_chain(source, most_flops=2e9, growth=40, most_rank=32)
    shape = tuple(min(n, 16) for n in shape)
    return Case(f"matvec {_brief(shape)}, rank {rank}", "matvec", functools.partial(_matvec, rank, shape=shape))


_DRAWS = (_draw_svd, _draw_rounding, _draw_dot, _draw_hadamard, _draw_matvec)


def _drawn_chain(
    source: random.Random, *, most_flops: float, growth: float, most_rank: int = 100
) -> tuple[tuple[int, ...], int]:
    """Modes and a rank of a train, so that ``growth * d n r^3`` flops are not too many."""
    while True:
        d, rank = round(math.exp(source.uniform(math.log(4), math.log(200)))), source.randint(2, most_rank)
        n = round(math.exp(source.uniform(math.log(2), math.log(100))))
        if growth * d * n * rank**3 <= most_flops:
            return tuple(max(2, round(n * source.uniform(0.7, 1.3))) for _ in range(d)), rank


def _drawn_modes(source: random.Random, d: int, *, numel: float) -> tuple[int, ...]:
    mean = numel ** (1 / d)
    return tuple(max(2, round(mean * source.uniform(0.7, 1.3))) for _ in range(d))


def _brief(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) if len(shape) <= 6 else f"{len(shape)} modes of {min(shape)} to {max(shape)}"


# -- TT-SVD -------------------------------------------------------------------------------------------


def _dense_case(name: str, shape: Sequence[int], small: Sequence[int], rank: int | None, **options: Any) -> Case:
    def make(quick: bool) -> Problem:
        return _dense(small if quick else shape, rank, **options)

    return Case(name, "tt_svd", make, unit=True)


def _dense(
    shape: Sequence[int], rank: int | None, *, eps: float, noise: float = 0.0, dtype: torch.dtype = torch.float64
) -> Problem:
    """A tensor of TT rank ``rank`` plus noise of relative size ``noise``; without a rank, Gaussian noise alone."""
    generator = torch.Generator().manual_seed(0)
    if rank is None:
        x = torch.randn(*shape, dtype=dtype, generator=generator)
        ranks = tuple(_full_ranks(shape))  # what surely suffices, for a library without a tolerance
    else:
        cores = orthonormal_train(shape, rank, generator, dtype)
        x = to_dense(cores)
        if noise:
            x.add_(torch.randn(*shape, dtype=dtype, generator=generator), alpha=noise / math.sqrt(x.numel()))
        ranks = tuple(core.shape[2] for core in cores[:-1])
    size = float(torch.linalg.vector_norm(x))
    return Problem(
        args=(("dense", x),),
        job=Job(eps=eps, ranks=ranks),
        error=lambda found: float(torch.linalg.vector_norm(to_dense(found).reshape(x.shape).sub_(x))) / size,
        tol=eps,
        floor=_svd_floor(shape, ranks, x.element_size()),
        dtype=dtype,
        shapes={"shape": list(shape), "rank": rank, "noise": noise},
    )


def _svd_floor(shape: Sequence[int], ranks: Sequence[int], itemsize: int) -> tuple[int, int]:
    """Sweep from the cheaper end with a Gram matrix at every bond.

    What is left, of ``size`` entries with a last side ``m``, is read twice (Gram matrix, projection) and its
    projection of ``size * r / m`` entries written; flops ``size * m`` (half of the symmetric product) and
    ``2 size r``.
    """

    def sweep(modes: Sequence[int], bonds: Sequence[int]) -> tuple[int, int]:
        size, right, n_bytes, flops = math.prod(modes), 1, 0, 0
        for n, r in zip(modes, bonds, strict=False):
            m = n * right
            after = size // m * r
            n_bytes += (2 * size + after) * itemsize
            flops += size * m + 2 * size * r
            size, right = after, r
        return n_bytes, flops

    ends = (tuple(shape), tuple(ranks)), (tuple(shape)[::-1], tuple(ranks)[::-1])
    return min((sweep(*end) for end in ends), key=lambda cost: cost[1])


# -- rounding -----------------------------------------------------------------------------------------


def _rounding(quick: bool, *, eps: float | None, shape: Sequence[int] = (20,) * 20, rank: int = 40) -> Problem:
    """A train of rank 40 plus itself, slightly perturbed: rank 80 on paper, 40 at the tolerance.

    What a perturbation of 1e-4 does to first order fits into the rank; about 1e-8 is left to cut.
    """
    if quick:
        shape, rank = tuple(min(n, 6) for n in shape[:8]), min(rank, 10)
    generator = torch.Generator().manual_seed(0)
    cores = orthonormal_train(shape, rank, generator)
    x = added(cores, perturbed(cores, 1e-4, generator))
    ranks = tuple(core.shape[2] for core in cores[:-1])
    return Problem(
        args=(("train", x),),
        job=Job(eps=eps, max_rank=None if eps else rank, ranks=ranks),
        error=lambda found: distance(found, x),
        tol=eps or 1e-6,
        floor=_round_floor(x, ranks),
        dtype=torch.float64,
        shapes={"shape": list(shape), "rank": 2 * rank, "result_rank": rank},
    )


def _round_floor(cores: Cores, ranks: Sequence[int], copies: int = 1) -> tuple[int, int]:
    """Randomize, then orthogonalize, with a sketch of just the ranks of the result.

    Per core ``(R, n, S)`` cut to ``(r, n, s)``: sketch ``2 R n S s + 2 R n s r``, range of what is left
    ``2 r n S s``, coefficients ``2 r n s S``, carried on ``2 s S n' S'``. Cores are read twice, the result
    written once.
    """
    cut = (1, *ranks, 1)
    n_bytes = flops = 0
    for k, core in enumerate(cores):
        big_r, n, big_s = core.shape
        r, s = cut[k], cut[k + 1]
        flops += 2 * n * (big_r * big_s * s + big_r * s * r + 2 * r * big_s * s + r * big_r * big_s)
        n_bytes += (2 * core.numel() + r * n * s) * core.element_size()
    return copies * n_bytes, copies * flops


def _batched_rounding(quick: bool) -> Problem:
    """64 trains of rank 16, in truth 8."""
    shape, rank, b = ((4,) * 6, 8, 8) if quick else ((4,) * 8, 8, 64)
    generator = torch.Generator().manual_seed(0)
    trains = []
    for _ in range(b):
        cores = orthonormal_train(shape, rank, generator)
        trains.append(added(cores, perturbed(cores, 1e-4, generator)))
    ranks = tuple(min(rank, 4 ** min(k, len(shape) - k)) for k in range(1, len(shape)))
    return Problem(
        args=(("trains", trains),),
        job=Job(eps=1e-6, max_rank=rank, ranks=ranks),
        error=lambda found: max(distance(one, x) for one, x in zip(found, trains, strict=True)),
        tol=1e-6,
        floor=_round_floor(trains[0], ranks, copies=b),
        dtype=torch.float64,
        shapes={"batch": b, "shape": list(shape), "rank": 2 * rank, "result_rank": rank},
    )


# -- products -----------------------------------------------------------------------------------------


def _dot(rank: int, quick: bool, *, shape: Sequence[int] = (10,) * 20) -> Problem:
    """Two trains that are near each other, so that their inner product does not vanish."""
    shape = tuple(min(n, 4) for n in shape[:8]) if quick else shape
    rank = min(rank, 16) if quick else rank
    generator = torch.Generator().manual_seed(0)
    x = orthonormal_train(shape, rank, generator)
    y = perturbed(x, 0.1, generator)
    expected = inner(x, y)
    # Two products with the running matrix per core; both trains are read once.
    flops = sum(2 * core.numel() * (core.shape[0] + core.shape[2]) for core in x)
    predicted = max(core.shape[0] ** 2 * core.shape[1] * core.shape[2] ** 2 for core in x) * 8
    return Problem(
        args=(("train", x), ("train", y)),
        job=Job(),
        error=lambda found: abs(complex(found) - expected) / abs(expected),
        tol=1e-10,
        floor=(2 * sum(core.numel() for core in x) * 8, flops),
        dtype=torch.float64,
        shapes={"shape": list(shape), "rank": rank},
        # kron(G, H) of one core, and the sum over its mode
        predicted={"kron": (2 * predicted, len(shape) * predicted // 4)},
    )


def _hadamard(rank: int, quick: bool, *, shape: Sequence[int] | None = None) -> Problem:
    """Trains of rank R whose product has rank R^2 on paper and about R at the tolerance."""
    # Orders and modes shrink as ranks grow, so that at least one peer ends within a minute.
    shape = shape or {10: (20,) * 20, 50: (4,) * 20, 200: (4,) * 12}[rank]
    shape = tuple(min(n, 4) for n in shape[:6]) if quick else shape
    rank = min(rank, 16) if quick else rank
    strong = math.isqrt(rank)
    generator = torch.Generator().manual_seed(0)
    (x, x_strong), (y, y_strong) = (_weak_tail(shape, rank, strong, generator) for _ in range(2))
    exact = [
        torch.einsum("rns,tnu->rtnsu", a, b).flatten(3, 4).flatten(0, 1)
        for a, b in zip(x_strong, y_strong, strict=True)
    ]
    ranks = tuple(core.shape[2] for core in exact[:-1])
    flops = n_bytes = 0
    for k, (a, b) in enumerate(zip(x, y, strict=True)):
        # Sketch, then project: each applies the core of one factor, then of the other, to s columns.
        s = (*ranks, 1)[k]
        flops += 2 * 2 * s * (a.numel() * b.shape[2] + a.shape[0] * b.numel())
        n_bytes += (2 * a.numel() + 2 * b.numel() + exact[k].numel()) * 8
    return _product(("train", x), ("train", y), exact, (n_bytes, flops), _formed(x, y), {"shape": list(shape)}, rank)


def _matvec(rank: int, quick: bool, *, shape: Sequence[int] | None = None) -> Problem:
    """A TT-matrix of rank 4 times a train of rank R; the result has rank 4 R on paper and R at the tolerance."""
    shape = shape or ((10,) * 20 if rank < 200 else (4,) * 12)
    shape = tuple(min(n, 3) for n in shape[:6]) if quick else shape
    rank = min(rank, 16) if quick else rank
    operator_rank = 4
    generator = torch.Generator().manual_seed(0)
    a = [
        core.unflatten(1, (n, n))
        for core, n in zip(orthonormal_train([n * n for n in shape], operator_rank, generator), shape, strict=True)
    ]
    x, x_strong = _weak_tail(shape, rank, max(1, rank // operator_rank), generator)
    exact = [
        torch.einsum("rijs,tju->rtisu", g, h).flatten(3, 4).flatten(0, 1) for g, h in zip(a, x_strong, strict=True)
    ]
    ranks = tuple(min(core.shape[2], n) for core, n in zip(exact[:-1], _full_ranks(shape), strict=True))
    flops = n_bytes = 0
    for k, (g, h) in enumerate(zip(a, x, strict=True)):
        s = (*ranks, 1)[k]
        flops += 2 * 2 * s * (h.numel() * g.shape[3] + h.shape[0] * g.numel())
        n_bytes += (2 * g.numel() + 2 * h.numel() + exact[k].numel()) * 8
    merged = [core[:, :, 0] for core in a]
    shapes = {"shape": list(shape), "operator_rank": operator_rank}
    return _product(("matrix", a), ("train", x), exact, (n_bytes, flops), _formed(merged, x), shapes, rank)


def _product(
    left: tuple[str, Cores],
    right: tuple[str, Cores],
    exact: Cores,
    floor: tuple[int, int],
    formed: tuple[int, int],
    shapes: dict[str, Any],
    rank: int,
) -> Problem:
    eps = 1e-6
    return Problem(
        args=(left, right),
        job=Job(eps=eps, ranks=tuple(core.shape[2] for core in exact[:-1])),
        error=lambda found: distance(found, exact),  # the weak tails left out weigh 1e-9
        tol=eps,
        floor=floor,
        dtype=torch.float64,
        shapes={**shapes, "rank": rank},
        predicted={"product": formed},
    )


def _formed(x: Cores, y: Cores) -> tuple[int, int]:
    """Bytes and flops of forming a product exactly and orthogonalizing it once, the least that rounding it takes."""
    n_bytes = flops = 0
    for a, b in zip(x, y, strict=True):
        r, n, s = a.shape[0] * b.shape[0], a.shape[1], a.shape[2] * b.shape[2]
        n_bytes += 2 * r * n * s * 8  # the product and its orthogonalized twin
        flops += 4 * n * r * s * min(s, r * n)
    return n_bytes, flops


def _weak_tail(shape: Sequence[int], rank: int, strong: int, generator: torch.Generator) -> tuple[Cores, Cores]:
    """A train of ``rank`` that is one of rank ``strong`` up to 1e-9, and that one."""
    x = orthonormal_train(shape, strong, generator)
    if strong >= rank:
        return x, x
    tail = orthonormal_train(shape, rank - strong, generator)
    tail[-1] = tail[-1] * 1e-9
    return added(x, tail), x


# -- trains, written independently of the libraries under test -------------------------------------------


def orthonormal_train(
    shape: Sequence[int], rank: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> Cores:
    """Left-orthogonal Gaussian cores, of Frobenius norm 1 together; ranks as the modes allow."""
    ranks = [1, *(min(rank, full) for full in _full_ranks(shape)), 1]
    cores = []
    for k, n in enumerate(shape):
        core = torch.randn(ranks[k], n, ranks[k + 1], dtype=dtype, generator=generator)
        if k < len(shape) - 1:
            cores.append(torch.linalg.qr(core.flatten(0, 1)).Q.reshape(core.shape))
        else:
            cores.append(core / torch.linalg.vector_norm(core))
    return cores


def perturbed(cores: Cores, size: float, generator: torch.Generator) -> Cores:
    """Every core plus Gaussian noise of relative ``size``."""
    out = []
    for core in cores:
        noise = torch.randn(core.shape, dtype=core.dtype, generator=generator)
        out.append(core + noise * (size * torch.linalg.vector_norm(core) / torch.linalg.vector_norm(noise)))
    return out


def added(x: Cores, y: Cores) -> Cores:
    """Cores of the sum, block-diagonal."""
    out = []
    for k, (a, b) in enumerate(zip(x, y, strict=True)):
        r, s = (a.shape[0], a.shape[2]) if k > 0 else (0, a.shape[2])
        s = s if k < len(x) - 1 else 0
        core = a.new_zeros(r + b.shape[0], a.shape[1], s + b.shape[2])
        core[: a.shape[0], :, : a.shape[2]] += a
        core[r:, :, s:] += b
        out.append(core)
    return out


def to_dense(cores: Cores) -> Tensor:
    state = cores[0].flatten(0, 1)
    for core in cores[1:]:
        state = (state @ core.flatten(1, 2)).reshape(-1, core.shape[2])
    return state.reshape([core.shape[1] for core in cores])


def inner(x: Cores, y: Cores) -> float:
    state = torch.ones(1, 1, dtype=x[0].dtype)
    for a, b in zip(x, y, strict=True):
        state = torch.einsum("rs,rnt,snu->tu", state, a, b)
    return float(state)


def norm(cores: Cores) -> float:
    """By orthogonalization: small differences keep their digits."""
    carry = torch.ones(1, 1, dtype=cores[0].dtype)
    log_scale = 0.0
    for core in cores:
        carry = torch.linalg.qr(torch.tensordot(carry, core, dims=1).flatten(0, 1), mode="r").R
        size = float(torch.linalg.vector_norm(carry))
        if size == 0.0 or not math.isfinite(size):
            return size
        carry, log_scale = carry / size, log_scale + math.log(size)
    return math.exp(log_scale)


def distance(found: Cores, exact: Cores) -> float:
    """``||found - exact|| / ||exact||``."""
    negative = [-found[0].to(exact[0].dtype), *(core.to(exact[0].dtype) for core in found[1:])]
    return norm(added(exact, negative)) / norm(exact)


def _full_ranks(shape: Sequence[int]) -> list[int]:
    return [min(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape))]


CASES = cases()
