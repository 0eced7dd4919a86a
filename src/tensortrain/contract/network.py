"""Weights that are no chain: a tensor network given by the names of its legs, and how it multiplies.

Legs with the same name are summed over or, where an input or an output bears the name too, shared: CP's rank
is a leg of every core, and the two cores of a block tensor train share one mode of the inputs and one of the
outputs. A contraction is a list of products of two operands, in an order found by opt_einsum.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tensortrain.contract.cost import CostModel, given_or_measured
from tensortrain.errors import KindError, ShapeError
from tensortrain.system.tracing import constant_when_traced, sizes_of

__all__ = [
    "Legs",
    "Network",
    "NetworkPlan",
    "Product",
    "Sizes",
    "contraction",
    "contraction_flops",
    "network_candidates",
    "plan_network",
]

Legs = tuple[str, ...]
Sizes = tuple[tuple[str, int], ...]
Order = Literal["auto", "forward", "backward"]
Force = Literal["factorized", "dense"]

BATCH = "batch"  # leg of the rows; no core bears it
# One einsum of two operands is several calls: views, the product, a view of the result.
_EINSUM_CALLS = 6
_MOST_LEGS = len(string.ascii_letters)


@dataclass(frozen=True)
class Network:
    """A weight ``(M, N)`` as a sum over products of one entry per core.

    Args:
        cores: Legs of every core, in the order in which a row meets them when nobody plans.
        out_legs: Legs that make up the outputs, first slowest.
        in_legs: Legs that make up the inputs, first slowest.
        sizes: Size of every leg; inner legs are those that are neither output nor input.

    Raises:
        ShapeError: More legs than an einsum has letters.

    Example:
        >>> cp = Network((("j", "r"), ("i", "r")), ("i",), ("j",), (("i", 5), ("j", 4), ("r", 3)))
        >>> cp.core_shapes, cp.n_paths
        (((4, 3), (5, 3)), 3)
    """

    cores: tuple[Legs, ...]
    out_legs: Legs
    in_legs: Legs
    sizes: Sizes

    def __post_init__(self) -> None:
        if len(self.sizes) >= _MOST_LEGS:
            raise ShapeError(
                f"a network must have fewer than {_MOST_LEGS} legs: found {len(self.sizes)}. Use fewer, larger modes."
            )

    def size(self, legs: str | Sequence[str]) -> int:
        """Size of one leg, or of several together."""
        known = dict(self.sizes)
        return known[legs] if isinstance(legs, str) else prod([known[leg] for leg in legs])  # a list: it is traced

    @property
    def core_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of every core."""
        return tuple(tuple(self.size(leg) for leg in legs) for legs in self.cores)

    @property
    def out_features(self) -> int:
        """Rows of the dense weight."""
        return self.size(self.out_legs)

    @property
    def in_features(self) -> int:
        """Columns of the dense weight."""
        return self.size(self.in_legs)

    @property
    def n_params(self) -> int:
        """Entries of all cores together."""
        return sum(prod(shape) for shape in self.core_shapes)

    @property
    def dense_numel(self) -> int:
        """Entries of the dense weight."""
        return self.out_features * self.in_features

    @property
    def inner_legs(self) -> Legs:
        """Legs that are summed over."""
        outer = {*self.out_legs, *self.in_legs}
        return tuple(leg for leg, _ in self.sizes if leg not in outer)

    @property
    def n_paths(self) -> int:
        """Products of one entry per core that are summed in an entry of the dense weight."""
        return self.size(self.inner_legs)

    def private_legs(self, k: int) -> Legs:
        """Output and input legs that only core ``k`` bears."""
        others = {leg for n, legs in enumerate(self.cores) for leg in legs if n != k}
        return tuple(leg for leg in self.cores[k] if leg in (*self.out_legs, *self.in_legs) and leg not in others)

    def core_fans(self) -> tuple[tuple[int, int], ...]:
        """What every core sums over, and the new legs it brings, when rows meet the cores in their order."""
        steps = contraction(
            ((BATCH, *self.in_legs), *self.cores), (BATCH, *self.out_legs), (*self.sizes, (BATCH, 1)), "forward"
        )
        return tuple((step.k, step.n) for step in steps)

    def to_dense(self, cores: Sequence[Tensor]) -> Tensor:
        """The dense weight ``(M, N)``, differentiably."""
        steps = contraction(self.cores, (*self.out_legs, *self.in_legs), self.sizes)
        return run(steps, cores).reshape(self.out_features, self.in_features)

    def squared_norm(self, cores: Sequence[Tensor]) -> Tensor:
        """``||W||^2``; without building ``W`` where that costs less."""
        direct = contraction(self.cores, (*self.out_legs, *self.in_legs), self.sizes)
        doubled, operands, sizes = self._doubled(cores)
        if len(sizes) >= _MOST_LEGS:
            return self.to_dense(cores).abs().square().sum()
        steps = contraction(doubled, (), sizes)
        if contraction_flops(direct) + 2 * self.dense_numel <= contraction_flops(steps):
            return self.to_dense(cores).abs().square().sum()
        return run(steps, operands).real

    def _doubled(self, cores: Sequence[Tensor]) -> tuple[tuple[Legs, ...], list[Tensor], Sizes]:
        """The network times its conjugate; inner legs of the second copy get a prime."""
        inner = set(self.inner_legs)
        primed = tuple(tuple(leg + "'" if leg in inner else leg for leg in legs) for legs in self.cores)
        sizes = (*self.sizes, *((leg + "'", n) for leg, n in self.sizes if leg in inner))
        return (*self.cores, *primed), [*cores, *(core.conj() for core in cores)], sizes


# -- products of two operands -------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """One product of a contraction.

    Args:
        operands: Numbers of its operands; the inputs of the contraction come first, then results in order.
        result: Number of its result.
        equation: As ``torch.einsum`` takes it.
        batch, m, k, n: ``batch`` products of ``m x k`` by ``k x n``.
        numel: Entries of the operands and of the result.
        result_numel: Entries of the result.
        sources: Inputs of the contraction that it depends on.
    """

    operands: tuple[int, ...]
    result: int
    equation: str
    batch: int
    m: int
    k: int
    n: int
    numel: int
    result_numel: int
    sources: frozenset[int]

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n


@constant_when_traced
def contraction(
    inputs: tuple[Legs, ...], output: Legs, sizes: Sizes, order: Order = "auto", sizes_for_path: Sizes | None = None
) -> tuple[Product, ...]:
    """Products that contract ``inputs`` to one tensor with the legs ``output``.

    Args:
        order: ``"auto"`` is the order of fewest flops, as far as opt_einsum finds it; ``"forward"`` and
            ``"backward"`` let the first input absorb the others one by one.
        sizes_for_path: Sizes to find the order for, where they differ from those to be counted.

    Example:
        >>> sizes = (("b", 1), ("j", 9), ("r", 2), ("i", 9))
        >>> steps = contraction((("b", "j"), ("j", "r"), ("i", "r")), ("b", "i"), sizes)
        >>> [(step.m, step.k, step.n) for step in steps]
        [(1, 9, 2), (1, 2, 9)]
    """
    return _contraction(inputs, output, sizes, order, sizes_for_path)


@lru_cache(maxsize=8192)
def _contraction(
    inputs: tuple[Legs, ...], output: Legs, sizes: Sizes, order: Order, sizes_for_path: Sizes | None
) -> tuple[Product, ...]:
    letters = {leg: letter for (leg, _), letter in zip(sizes, string.ascii_letters, strict=False)}
    path = _path(inputs, output, dict(sizes_for_path or sizes), letters, order)
    known = dict(sizes)
    stack: list[tuple[int, Legs, frozenset[int]]] = [(k, legs, frozenset({k})) for k, legs in enumerate(inputs)]
    steps: list[Product] = []
    for n_left, entry in zip(range(len(path) - 1, -1, -1), path, strict=True):
        taken = [stack[position] for position in entry]
        stack = [operand for position, operand in enumerate(stack) if position not in entry]
        while taken:
            pair, taken = taken[:2], taken[2:]
            needed = {leg for _, legs, _ in (*stack, *taken) for leg in legs}.union(output)
            last = n_left == 0 and not taken
            step, legs = _product(pair, output if last else None, needed, len(inputs) + len(steps), known, letters)
            steps.append(step)
            merged = (step.result, legs, step.sources)
            if not taken:
                stack.append(merged)
                break
            taken = [merged, *taken]
    return tuple(steps)


def _path(
    inputs: tuple[Legs, ...], output: Legs, sizes: dict[str, int], letters: dict[str, str], order: Order
) -> list[tuple[int, ...]]:
    n = len(inputs)
    if n == 1:
        return [(0,)]
    if order != "auto":  # the first input is at the front only before the first step, later at the end
        rest = range(1, n) if order == "forward" else range(n - 1, 0, -1)
        left, path = list(range(n)), list[tuple[int, ...]]()
        for k in rest:
            path.append((left.index(0), left.index(k)))
            left = [m for m in left if m not in (0, k)] + [0]
        return path
    from opt_einsum import contract_path

    equation = ",".join("".join(letters[leg] for leg in legs) for legs in inputs)
    equation += "->" + "".join(letters[leg] for leg in output)
    shapes = [tuple(sizes[leg] for leg in legs) for legs in inputs]
    return contract_path(equation, *shapes, shapes=True, optimize="auto")[0]


def _product(
    pair: Sequence[tuple[int, Legs, frozenset[int]]],
    output: Legs | None,
    needed: set[str],
    result: int,
    sizes: dict[str, int],
    letters: dict[str, str],
) -> tuple[Product, Legs]:
    """The product of one or two operands, and the legs of its result (shared ones first unless given)."""
    left, right = pair[0][1], pair[-1][1] if len(pair) > 1 else ()
    shared = [leg for leg in left if leg in right]
    batch, summed = [leg for leg in shared if leg in needed], [leg for leg in shared if leg not in needed]
    m, n = [leg for leg in left if leg not in shared], [leg for leg in right if leg not in shared]
    legs = output if output is not None else tuple(leg for leg in (*batch, *m, *n) if leg in needed)

    def size(some: Sequence[str]) -> int:
        return prod(sizes[leg] for leg in some)

    equation = ",".join("".join(letters[leg] for leg in operand[1]) for operand in pair)
    return (
        Product(
            operands=tuple(operand[0] for operand in pair),
            result=result,
            equation=equation + "->" + "".join(letters[leg] for leg in legs),
            batch=size(batch),
            m=size(m),
            k=size(summed),
            n=size(n),
            numel=size(left) + (size(right) if len(pair) > 1 else 0) + size(legs),
            result_numel=size(legs),
            sources=frozenset().union(*(operand[2] for operand in pair)),
        ),
        legs,
    )


def contraction_flops(steps: Sequence[Product]) -> int:
    """Floating-point operations, two per multiply-add."""
    return sum(step.flops for step in steps)


def run(steps: Sequence[Product], operands: Sequence[Tensor]) -> Tensor:
    """Carry out a contraction."""
    values = dict(enumerate(operands))
    _run_steps(steps, values)
    return values[steps[-1].result]


def _run_steps(steps: Sequence[Product], values: dict[int, Tensor]) -> None:
    for step in steps:
        values[step.result] = torch.einsum(step.equation, *(values.pop(k) for k in step.operands))


# -- plans --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkPlan:
    """How to multiply a batch by a network: printable before it is run.

    Args:
        network: The legs.
        batch: Rows the plan was made for; it runs with any number.
        dtype, device_type, training: What it was costed for.
        kind: "network" or "dense".
        steps: The products in order of execution. Those that do not depend on the rows come first.
        flops: Two per multiply-add, of one call; training adds the backward pass. At inference what
            ``prepare`` makes counts as kept from the call before.
        moved_bytes: Bytes read and written by the products.
        peak_bytes: Most memory held besides input, output and cores.
        prepared_bytes: The part of ``peak_bytes`` that ``prepare`` makes and a layer may keep.
        predicted_s: Seconds of one call; of forward and backward when training.
        dense_flops, dense_s: The same for a plain dense layer.
    """

    network: Network
    batch: int
    dtype: torch.dtype
    device_type: str
    training: bool
    kind: Literal["network", "dense"]
    steps: tuple[Product, ...]
    flops: int
    moved_bytes: int
    peak_bytes: int
    prepared_bytes: int
    predicted_s: float
    dense_flops: int
    dense_s: float

    @property
    def uses_dense(self) -> bool:
        """Whether the plan builds the dense weight."""
        return self.kind == "dense"

    @property
    def speed_up(self) -> float:
        """Predicted time of a dense layer over that of this plan."""
        return self.dense_s / self.predicted_s

    def prepare(self, cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Everything that does not depend on the rows, in the order in which ``execute`` wants it.

        Raises:
            ShapeError: The cores are not those of ``network``.
        """
        self._check_cores(cores)
        if self.uses_dense:
            return (self.network.to_dense(cores),)
        values = dict(enumerate(cores, start=1))
        _run_steps([step for step in self.steps if 0 not in step.sources], values)
        return tuple(values[k] for k in sorted(values))

    def execute(self, x: Tensor, cores: Sequence[Tensor], prepared: Sequence[Tensor] | None = None) -> Tensor:
        """Multiply: ``y = x W^T``, differentiably.

        Args:
            x: ``(..., N)``, any number of leading dimensions, any strides.
            cores: Cores of ``network``.
            prepared: What ``prepare(cores)`` gave; None makes it here.

        Returns:
            Tensor: ``(..., M)``.

        Raises:
            ShapeError: ``x`` does not end with ``N``, or the cores are not those of ``network``.

        Example:
            >>> cp = Network((("j", "r"), ("i", "r")), ("i",), ("j",), (("i", 5), ("j", 4), ("r", 3)))
            >>> plan = plan_network(cp, batch=2)
            >>> plan.execute(torch.randn(2, 4), [torch.randn(4, 3), torch.randn(5, 3)]).shape
            torch.Size([2, 5])
        """
        network = self.network
        sizes = sizes_of(x)
        if not sizes or sizes[-1] != network.in_features:
            raise ShapeError(
                f"the last size of the input must be in_features: x has shape {sizes}, expected "
                f"(..., {network.in_features}). Reshape the input or plan for its size."
            )
        weights = self.prepare(cores) if prepared is None else prepared
        if self.uses_dense:
            return F.linear(x, weights[0])
        values = {0: x.reshape(-1, *[network.size(leg) for leg in network.in_legs])}
        values.update(zip(self._prepared_numbers(), weights, strict=True))
        _run_steps([step for step in self.steps if 0 in step.sources], values)
        return values[self.steps[-1].result].reshape(*x.shape[:-1], network.out_features)

    def _prepared_numbers(self) -> list[int]:
        left = set(range(1, len(self.network.cores) + 1))
        for step in self.steps:
            if 0 not in step.sources:
                left = left.difference(step.operands) | {step.result}
        return sorted(left)

    def _check_cores(self, cores: Sequence[Tensor]) -> None:
        shapes = tuple(sizes_of(core) for core in cores)
        if shapes != self.network.core_shapes:
            raise ShapeError(
                f"cores must have the planned shapes: cores has {shapes}, expected "
                f"{self.network.core_shapes}. Make a plan for their network."
            )

    def __str__(self) -> str:
        return "\n".join(_report(self))


def plan_network(
    network: Network,
    *,
    batch: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    training: bool = False,
    allow_dense: bool = True,
    force: Force | None = None,
    cost_model: CostModel | None = None,
) -> NetworkPlan:
    """Return the plan with the least predicted time.

    The candidates are opt_einsum's orders for this batch and for a single row, the cores one after the
    other from either end, and the dense weight. An order that merges cores into something more than half
    as large as the dense weight is left out.

    Args:
        network: The legs.
        batch: Rows of the input, all leading dimensions together.
        dtype: Of input and cores.
        device: Where they are.
        training: Cost forward and backward.
        allow_dense: Whether the dense weight may be chosen.
        force: ``"factorized"`` or ``"dense"``.
        cost_model: Constants; the device's own by default.

    Raises:
        KindError: ``force`` names no kind of plan.

    Cost: four path searches, remembered for equal arguments.
    """
    return network_candidates(
        network,
        batch=batch,
        dtype=dtype,
        device=device,
        training=training,
        allow_dense=allow_dense,
        force=force,
        cost_model=cost_model,
    )[0]


def network_candidates(
    network: Network,
    *,
    batch: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    training: bool = False,
    allow_dense: bool = True,
    force: Force | None = None,
    cost_model: CostModel | None = None,
) -> tuple[NetworkPlan, ...]:
    """The plans that ``plan_network`` chooses from, shortest predicted time first; arguments and errors as there."""
    if force not in (None, "factorized", "dense"):
        raise KindError(
            f"a plan of a network is forced by name: force has {force!r}, expected 'factorized' or 'dense'. "
            "Leave it out to get the fastest plan."
        )
    device = torch.device(device)
    model = given_or_measured(cost_model, device)
    return _candidates(network, max(int(batch), 1), dtype, device.type, training, allow_dense, force, model)


@lru_cache(maxsize=4096)
def _candidates(
    network: Network,
    batch: int,
    dtype: torch.dtype,
    device_type: str,
    training: bool,
    allow_dense: bool,
    force: Force | None,
    model: CostModel,
) -> tuple[NetworkPlan, ...]:
    pricer = _Pricer(network, batch, dtype, device_type, training, model)
    if force == "dense":
        return (pricer.dense(),)
    plans = [pricer.factorized(steps) for steps in pricer.orders()]
    if force is None and allow_dense:
        plans.append(pricer.dense())
    return tuple(sorted(plans, key=lambda plan: plan.predicted_s))


@dataclass(frozen=True)
class _Pricer:
    """Prices the plans of one network."""

    network: Network
    batch: int
    dtype: torch.dtype
    device_type: str
    training: bool
    model: CostModel

    def orders(self) -> Iterator[tuple[Product, ...]]:
        net = self.network
        inputs, output = ((BATCH, *net.in_legs), *net.cores), (BATCH, *net.out_legs)
        sizes = (*net.sizes, (BATCH, self.batch))
        found = [
            contraction(inputs, output, sizes, "forward"),
            contraction(inputs, output, sizes, "backward"),
            contraction(inputs, output, sizes),
            contraction(inputs, output, sizes, "auto", (*net.sizes, (BATCH, 1))),
        ]
        for steps in dict.fromkeys(found):
            merged = max((step.result_numel for step in steps if 0 not in step.sources), default=0)
            if 2 * merged <= net.dense_numel:
                yield tuple(sorted(steps, key=lambda step: 0 in step.sources))

    def step_s(self, step: Product) -> float:
        passes, copies = (3, 2) if self.training else (1, 1)
        product_s = self.model.gemm_s(step.m, step.n, step.k, batch=step.batch, dtype=self.dtype)
        moved = self.dtype.itemsize * (step.numel - step.result_numel)
        return passes * (product_s + _EINSUM_CALLS * self.model.overhead_s) + copies * self.model.copy_s(moved)

    def dense_layer(self) -> tuple[int, float]:
        """Flops and seconds of a plain dense layer."""
        b, m, n = self.batch, self.network.out_features, self.network.in_features
        seconds = self.model.linear_s(b, m, n, dtype=self.dtype)
        if self.training:
            seconds += self.model.gemm_s(b, n, m, dtype=self.dtype) + self.model.gemm_s(m, n, b, dtype=self.dtype)
        return 2 * b * m * n * (3 if self.training else 1), seconds

    def dense(self) -> NetworkPlan:
        """Build the weight and apply it; at inference the weight is kept."""
        net = self.network
        flops, seconds = self.dense_layer()
        moved = self.dtype.itemsize * (net.dense_numel + self.batch * (net.in_features + net.out_features))
        weight_bytes = self.dtype.itemsize * net.dense_numel
        if self.training:
            steps = contraction(net.cores, (*net.out_legs, *net.in_legs), net.sizes)
            flops += 3 * contraction_flops(steps)
            seconds += sum(self.step_s(step) for step in steps)
            moved += 3 * self.dtype.itemsize * sum(step.numel for step in steps)
        peak = weight_bytes * (2 if self.training else 1)
        return self.plan("dense", (), flops, moved, peak, weight_bytes, seconds)

    def factorized(self, steps: tuple[Product, ...]) -> NetworkPlan:
        item, passes = self.dtype.itemsize, 3 if self.training else 1
        counted = [step for step in steps if self.training or 0 in step.sources]
        cores_only = [step for step in steps if 0 not in step.sources]
        consumed = {k for step in cores_only for k in step.operands}
        prepared = item * sum(step.result_numel for step in cores_only if step.result not in consumed)
        states = [item * step.result_numel for step in steps if 0 in step.sources][:-1]
        held = (
            sum(states)
            if self.training
            else max((a + b for a, b in zip([0, *states], states, strict=False)), default=0)
        )
        return self.plan(
            "network",
            steps,
            passes * contraction_flops(counted),
            passes * item * sum(step.numel for step in counted),
            prepared + held,
            prepared,
            sum(self.step_s(step) for step in counted),
        )

    def plan(
        self,
        kind: Literal["network", "dense"],
        steps: tuple[Product, ...],
        flops: int,
        moved_bytes: int,
        peak_bytes: int,
        prepared_bytes: int,
        predicted_s: float,
    ) -> NetworkPlan:
        dense_flops, dense_s = self.dense_layer()
        return NetworkPlan(
            network=self.network,
            batch=self.batch,
            dtype=self.dtype,
            device_type=self.device_type,
            training=self.training,
            kind=kind,
            steps=steps,
            flops=flops,
            moved_bytes=moved_bytes,
            peak_bytes=peak_bytes,
            prepared_bytes=prepared_bytes,
            predicted_s=predicted_s,
            dense_flops=dense_flops,
            dense_s=dense_s,
        )


def _report(plan: NetworkPlan) -> Iterator[str]:
    net, phase = plan.network, "training step" if plan.training else "inference"
    yield f"{net.in_features} -> {net.out_features} by {len(net.cores)} cores, {net.n_params} parameters"
    yield f"batch {plan.batch}, {str(plan.dtype).removeprefix('torch.')} on {plan.device_type}, {phase}"
    yield f"plan: {'the dense weight, kept' if plan.uses_dense else 'core by core'}"
    for step in plan.steps:
        kept = "" if 0 in step.sources else "  (kept)"
        shape = f"{step.batch} x ({step.m} x {step.k}) ({step.k} x {step.n})"
        yield f"  {step.equation:<24}{shape:<36}{step.flops:>10.2e}{kept}"
    yield f"flops: {plan.flops:,} (dense {plan.dense_flops:,})"
    yield f"predicted: {plan.predicted_s * 1e6:,.0f} us (dense layer {plan.dense_s * 1e6:,.0f} us)"
    yield f"peak: {plan.peak_bytes:,} bytes, of which prepared weights {plan.prepared_bytes:,}"
