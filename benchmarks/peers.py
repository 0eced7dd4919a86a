"""The libraries under comparison, each behind the same few calls.

A library loads inputs into its own type (not timed), runs an operation (timed) and hands back cores (not timed).
Every operation uses the call its documentation recommends; where there are several, all of them run, and the
fastest one that reaches the tolerance stands for the library.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import math
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tensortrain as tt

__all__ = ["PEER_NAMES", "Call", "Cores", "Job", "Library", "default_dtype", "libraries"]

Cores = list[Tensor]


@dataclass(frozen=True)
class Job:
    """What is asked of every contender.

    Attributes:
        eps: Relative Frobenius error; None where only ``max_rank`` counts.
        max_rank: Cap on the ranks, or None.
        ranks: Inner ranks of the answer, for a library that takes ranks and no tolerance.
    """

    eps: float | None = None
    max_rank: int | None = None
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Call:
    """One way to run an operation.

    Attributes:
        run: ``run(*loaded inputs, job)``, the timed part.
        label: Tells it from the library's other ways; "" for the first.
        load: Loads the inputs where this way wants another type than the library's usual one.
        unload: From the result to cores, likewise.
        forms: Name of a large intermediate, see ``Case.predicted``.
        slower_than: Label of a way known to be faster: if that one ran out of time, this one is not tried.
        missing: Why there is nothing to run, or "".
    """

    run: Callable[..., Any]
    label: str = ""
    load: Callable[[str, Any], Any] | None = None
    unload: Callable[[Any], Any] | None = None
    forms: str = ""
    slower_than: str | None = None
    missing: str = ""


@dataclass(frozen=True)
class Library:
    """A library: how to load inputs, how to unload results, and its calls per operation."""

    name: str
    package: str
    load: Callable[[str, Any], Any]
    unload: Callable[[Any], Any]
    calls: Mapping[str, Sequence[Call]]
    lacks: Mapping[str, str] = field(default_factory=dict)
    ours: bool = False

    @property
    def version(self) -> str:
        return tt.__version__ if self.ours else importlib.metadata.version(self.package)


def libraries(peers: str = "all") -> tuple[list[Library], dict[str, str]]:
    """Ours and the peers asked for ("all", "none" or names with commas), and why some of them are not there."""
    names = {"all": PEER_NAMES, "none": ()}.get(peers, tuple(peers.split(",")))
    wanted = {name: _PEERS[name] for name in names}
    found, absent = [_ours()], {}
    for name, build in wanted.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found.append(build())
        except ImportError as error:
            absent[name] = f"not installed ({error}): pip install 'tensortrain[peers]'"
    return found, absent


# -- ours ---------------------------------------------------------------------------------------------


def _ours() -> Library:
    return Library(
        name="tensortrain",
        package="tensortrain",
        load=_load_ours,
        unload=_unload_ours,
        calls={
            "tt_svd": _by_method(tt.tt_svd, ("auto", "svd", "qr", "gram", "randomized"), _run_tt_svd),
            "round": _by_method(tt.round_tt, ("svd", "gram", "randomized"), _run_round),
            "round_batched": [_batched_call(), Call(_loop(_run_round), label="loop")],
            "dot": [Call(lambda x, y, job: tt.dot(x, y))],
            "hadamard": _product_calls("hadamard", lambda x, y: x * y),
            "matvec": _product_calls("matmul", lambda a, x: a @ x),
        },
        ours=True,
    )


def _load_ours(kind: str, data: Any) -> Any:
    if kind == "trains":
        return [tt.TensorTrain(cores) for cores in data]
    return {"dense": lambda x: x, "train": tt.TensorTrain, "matrix": tt.TTMatrix}[kind](data)


def _unload_ours(result: Any) -> Any:
    if isinstance(result, list):
        return [_unload_ours(one) for one in result]
    value = getattr(result, "value", result)
    return value if isinstance(value, Tensor) else list(value.cores)


def _run_tt_svd(x: Tensor, job: Job, *, method: str) -> Any:
    return tt.tt_svd(x, eps=job.eps, max_rank=job.max_rank, method=method)


def _run_round(x: Any, job: Job, *, method: str = "svd") -> Any:
    return tt.round_tt(x, eps=job.eps, max_rank=job.max_rank, method=method)


def _by_method(function: Callable[..., Any], expected: Sequence[str], run: Callable[..., Any]) -> list[Call]:
    """A call for every method the function knows, and a note for those it is expected to learn."""
    known = _methods_of(function)
    names = [*(name for name in expected if name in known), *sorted(set(known) - set(expected))]
    return [
        *(Call(functools.partial(run, method=name), label=name) for name in names),
        *(
            Call(run, label=name, missing=f"{function.__name__} has no method {name!r} yet")
            for name in expected
            if name not in known
        ),
    ]


def _methods_of(function: Callable[..., Any]) -> list[str]:
    """The strings in the ``Literal`` of the parameter ``method``."""
    hints = typing.get_type_hints(inspect.unwrap(function))

    def strings(hint: Any) -> list[str]:
        if typing.get_origin(hint) is typing.Literal:
            return [value for value in typing.get_args(hint) if isinstance(value, str)]
        return [name for part in typing.get_args(hint) for name in strings(part)]

    return list(dict.fromkeys(strings(hints.get("method"))))


def _product_calls(name: str, exact: Callable[[Any, Any], Any]) -> list[Call]:
    """The exact product rounded, and every method of the fast product ``tt.<name>`` where there is one."""

    def rounded(x: Any, y: Any, job: Job) -> Any:
        return tt.round_tt(exact(x, y), eps=job.eps, max_rank=job.max_rank)

    calls = [Call(rounded, label="product, then round", forms="product")]
    fast = getattr(tt, name, None)
    if fast is None:
        return [*calls, Call(rounded, label=name, missing=f"tensortrain.{name} does not exist yet")]

    def run(x: Any, y: Any, job: Job, *, method: str | None = None) -> Any:
        options = {} if method is None else {"method": method}
        return fast(x, y, eps=job.eps, max_rank=job.max_rank, **options)

    methods: list[str | None] = [*_methods_of(fast)] or [None]
    return [*(Call(functools.partial(run, method=method), label=method or name) for method in methods), *calls]


def _loop(run: Callable[[Any, Job], Any]) -> Callable[[Sequence[Any], Job], list[Any]]:
    return lambda trains, job: [run(train, job) for train in trains]


def _stacked(trains: Sequence[Cores]) -> Cores:
    return [torch.stack(cores) for cores in zip(*trains, strict=True)]


def _unstacked(cores: Sequence[Tensor]) -> list[Cores]:
    return [list(one) for one in zip(*(core.unbind(0) for core in cores), strict=True)]


def _batched_call() -> Call:
    try:
        tt.TensorTrain((torch.ones(2, 1, 3, 1), torch.ones(2, 1, 3, 1)))
        missing = ""
    except tt.TTError:
        missing = "TensorTrain takes no batch of trains (cores b r n s) yet"
    return Call(
        _run_round,
        label="batched",
        load=lambda kind, trains: tt.TensorTrain(tuple(_stacked(trains))),
        unload=lambda result: _unstacked(result.value.cores),
        missing=missing,
    )


# -- peers --------------------------------------------------------------------------------------------


def _torchtt() -> Library:
    import torchtt

    def load(kind: str, data: Any) -> Any:
        if kind == "dense":
            return data
        return [torchtt.TT(list(cores)) for cores in data] if kind == "trains" else torchtt.TT(list(data))

    def unload(result: Any) -> Any:
        if isinstance(result, list):
            return [unload(one) for one in result]
        return result if isinstance(result, Tensor) else list(result.cores)

    def limits(job: Job) -> dict[str, Any]:
        # A tolerance of zero or below keeps all ranks, so that only the cap counts.
        return {"eps": job.eps or 0.0, **({} if job.max_rank is None else {"rmax": job.max_rank})}

    # The name is misspelt in 0.5.0; __all__ has it right.
    hadamard = getattr(torchtt, "fast_hadamard", None) or torchtt.fast_hadammard
    return Library(
        name="torchTT",
        package="torchTT",
        load=load,
        unload=unload,
        calls={
            "tt_svd": [Call(lambda x, job: torchtt.TT(x, **limits(job)))],
            "round": [Call(lambda x, job: x.round(**limits(job)))],
            "round_batched": [Call(_loop(lambda x, job: x.round(**limits(job))), label="loop")],
            "dot": [Call(lambda x, y, job: torchtt.dot(x, y))],
            "hadamard": [
                Call(lambda x, y, job: (x * y).round(**limits(job)), forms="product"),
                Call(lambda x, y, job: hadamard(x, y, **limits(job)), label="fast_hadamard"),
                Call(lambda x, y, job: torchtt.dmrg_hadamard(x, y, **limits(job)), label="dmrg_hadamard"),
            ],
            "matvec": [
                Call(lambda a, x, job: (a @ x).round(**limits(job)), forms="product"),
                Call(lambda a, x, job: torchtt.fast_mv(a, x, **limits(job)), label="fast_mv"),
                Call(lambda a, x, job: a.fast_matvec(x, eps=job.eps), label="fast_matvec"),
                Call(lambda a, x, job: torchtt.amen_mv(a, x, **limits(job)), label="amen_mv"),
            ],
        },
    )


def _tntorch() -> Library:
    import tntorch

    def load(kind: str, data: Any) -> Any:
        if kind == "dense":
            return data
        return [tntorch.Tensor(list(cores)) for cores in data] if kind == "trains" else tntorch.Tensor(list(data))

    def unload(result: Any) -> Any:
        if isinstance(result, list):
            return [unload(one) for one in result]
        return result if isinstance(result, Tensor) else list(result.cores)

    def round_with(algorithm: str) -> Callable[[Any, Job], Any]:
        return lambda x, job: tntorch.round_tt(x, eps=job.eps or 0.0, rmax=job.max_rank, algorithm=algorithm)

    def decompose_with(algorithm: str) -> Callable[[Any, Job], Any]:
        def run(x: Tensor, job: Job) -> Any:
            # Tensor(x) holds x at full ranks, which round_tt cuts: what the constructor does itself with ranks_tt,
            # here with a tolerance.
            train = tntorch.Tensor(x)
            train.round_tt(eps=job.eps or 0.0, rmax=job.max_rank, algorithm=algorithm)
            return train

        return run

    def both(run_with: Callable[[str], Callable[..., Any]], forms: str = "") -> list[Call]:
        # "svd" forms the full square V, so it is by far the slower one.
        return [
            Call(run_with("eig"), label="eig", forms=forms),
            Call(run_with("svd"), label="svd", forms=forms, slower_than="eig"),
        ]

    return Library(
        name="tntorch",
        package="tntorch",
        load=load,
        unload=unload,
        calls={
            "tt_svd": both(decompose_with),
            "round": both(round_with),
            "round_batched": [
                Call(
                    # In a batch tntorch takes no tolerance: the cap alone decides.
                    lambda x, job: tntorch.round_tt(x, rmax=job.max_rank, algorithm="eig"),
                    label="batched eig",
                    load=lambda kind, trains: tntorch.Tensor(_stacked(trains), batch=True),
                    unload=lambda result: _unstacked(result.cores),
                ),
                Call(
                    lambda x, job: tntorch.round_tt(x, rmax=job.max_rank),
                    label="batched svd",
                    load=lambda kind, trains: tntorch.Tensor(_stacked(trains), batch=True),
                    unload=lambda result: _unstacked(result.cores),
                ),
                *(Call(_loop(call.run), label=f"loop {call.label}") for call in both(round_with)),
            ],
            "dot": [Call(lambda x, y, job: tntorch.dot(x, y))],
            "hadamard": both(lambda algorithm: lambda x, y, job: round_with(algorithm)(x * y, job), "product"),
        },
        lacks={"matvec": "has no product of a TT-matrix and a train"},
    )


def _teneva() -> Library:
    import numpy as np
    import teneva

    def load(kind: str, data: Any) -> Any:
        if kind == "dense":
            return data.numpy()
        if kind == "trains":
            return [load("train", cores) for cores in data]
        return [core.numpy() for core in data]

    def unload(result: Any) -> Any:
        if isinstance(result, (float, complex, np.generic)):
            return torch.as_tensor(result)
        if isinstance(result[0], list):
            return [unload(one) for one in result]
        return [torch.from_numpy(np.ascontiguousarray(core)) for core in result]

    def cap(job: Job) -> dict[str, Any]:
        return {} if job.max_rank is None else {"r": job.max_rank}

    def decompose(x: Any, job: Job) -> Any:
        # The tolerance of teneva.svd is an absolute one for each cut.
        return teneva.svd(x, e=(job.eps or 0.0) * np.linalg.norm(x) / math.sqrt(x.ndim - 1), **cap(job))

    def round_with(is_eigh: bool) -> Callable[[Any, Job], Any]:
        return lambda x, job: teneva.truncate(x, e=job.eps or 1e-14, is_eigh=is_eigh, **cap(job))

    def both(run_with: Callable[[bool], Callable[..., Any]], forms: str = "") -> list[Call]:
        return [
            Call(run_with(True), label="eigh", forms=forms),
            Call(run_with(False), label="svd", forms=forms),
        ]

    return Library(
        name="teneva",
        package="teneva",
        load=load,
        unload=unload,
        calls={
            "tt_svd": [Call(decompose)],
            "round": both(round_with),
            "round_batched": [Call(_loop(call.run), label=f"loop {call.label}") for call in both(round_with)],
            "dot": [Call(lambda x, y, job: teneva.mul_scalar(x, y), forms="kron")],
            "hadamard": both(lambda is_eigh: lambda x, y, job: round_with(is_eigh)(teneva.mul(x, y), job), "product"),
        },
        lacks={"matvec": "has no product of a TT-matrix and a train"},
    )


def _tensorly() -> Library:
    import tensorly
    from tensorly.decomposition import tensor_train

    def on_torch(run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            with tensorly.backend_context("pytorch"):
                return run(*args)

        return wrapped

    # Its third way, "symeig_svd", takes the eigenvalues of the Gram matrix of the long side: minutes on small inputs.
    def decompose_with(svd: str) -> Callable[[Any, Job], Any]:
        options = {"random_state": 0} if svd == "randomized_svd" else {}
        return on_torch(lambda x, job: tensor_train(x, [1, *job.ranks, 1], svd=svd, **options))

    return Library(
        name="tensorly",
        package="tensorly",
        load=lambda kind, data: data,
        unload=lambda result: list(result.factors),
        calls={
            "tt_svd": [
                Call(decompose_with("randomized_svd"), label="randomized_svd"),
                Call(decompose_with("truncated_svd"), label="truncated_svd"),
            ]
        },
        lacks=dict.fromkeys(
            ("round", "round_batched", "dot", "hadamard", "matvec"), "has no arithmetic of trains, only TT-SVD"
        ),
    )


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Torch's default dtype set to the real one of ``dtype``; tntorch builds its own tensors with it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype.to_real())
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_PEERS: dict[str, Callable[[], Library]] = {
    "torchTT": _torchtt,
    "tntorch": _tntorch,
    "teneva": _teneva,
    "tensorly": _tensorly,
}
PEER_NAMES = tuple(_PEERS)
