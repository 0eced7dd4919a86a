"""A plan: how a batch is multiplied by a weight in parts; what that costs, how it prints, how it runs.

A chain's plan and a network's differ in their steps alone. Whoever holds one need not ask which it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tensortrain._moved import names_of_before
from tensortrain.contract.compiled import FORMS, Compiled, Sweep
from tensortrain.contract.execute import by_kernels, linear_product
from tensortrain.contract.network import Network
from tensortrain.contract.shape import ChainShape
from tensortrain.errors import ShapeError
from tensortrain.system.tracing import sizes_of

__all__ = ["Plan", "Shape"]

Shape = ChainShape | Network
Self = TypeVar("Self", bound="Plan")


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """How to multiply a batch by a weight in parts: printable before it is run.

    Args:
        shape: Of the parts: a chain's, or a network's.
        batch: Rows the plan was made for; it runs with any number.
        dtype, device_type, training: What it was costed for.
        kind: ``"dense"``, or a name of the way through the parts.
        steps: The products in order of execution.
        flops: Two per multiply-add, of one call; training adds the backward pass. At inference what ``prepare`` makes
            counts as kept from the call before.
        moved_bytes: Bytes read and written.
        peak_bytes: Most memory held besides input, output and cores: prepared weights, and the states
            alive together (all of them in training, where backward needs them).
        prepared_bytes: The part of ``peak_bytes`` that ``prepare`` makes and a layer may keep.
        predicted_s: Seconds of one call; of forward and backward when training. No part of what tells plans apart.
        dense_flops, dense_s: The same for a plain dense layer.
        inside: ``(in_features, out_features)`` of a layer that the shape exceeds; ``None`` where both agree. Inputs
            are padded with zeros then, and outputs cut.
        is_measured: Whether ``predicted_s`` was measured on this machine.
    """

    shape: Any  # ChainShape or Network: those who need to know which one have a plan of their own kind
    batch: int
    dtype: torch.dtype
    device_type: str
    training: bool
    kind: str
    steps: tuple[Any, ...]
    flops: int
    moved_bytes: int
    peak_bytes: int
    prepared_bytes: int
    predicted_s: float = field(compare=False)
    dense_flops: int
    dense_s: float
    inside: tuple[int, int] | None = None
    is_measured: bool = field(default=False, compare=False)
    compiled: Compiled = field(default_factory=Compiled, init=False, compare=False, repr=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Plans pickled by the version before call their shape a chain or a network, and hold nothing compiled."""
        shape = next(state[name] for name in ("shape", "chain", "network") if name in state)
        values = {"inside": None, "is_measured": False, "compiled": Compiled(), **state, "shape": shape}
        for name in ("chain", "network"):
            values.pop(name, None)
        self.__dict__.update(values)

    # -- what it is ----------------------------------------------------------------------------------

    @property
    def in_features(self) -> int:
        """Size of a row of the input."""
        return int(self.shape.in_features) if self.inside is None else self.inside[0]

    @property
    def out_features(self) -> int:
        """Size of a row of the output."""
        return int(self.shape.out_features) if self.inside is None else self.inside[1]

    @property
    def uses_dense(self) -> bool:
        """Whether the plan builds the dense weight."""
        return self.kind == "dense"

    @property
    def flips(self) -> bool:
        """Whether single products are computed as their transposes."""
        return False

    @property
    def speed_up(self) -> float:
        """Predicted time of a dense layer over that of this plan."""
        return self.dense_s / self.predicted_s

    @property
    def state_bytes(self) -> int:
        """Size of the largest state between two steps that a few rows at a time would make smaller; 0 for none."""
        return 0

    @property
    @abstractmethod
    def prepared_key(self) -> Any:
        """What tells prepared weights of one layer apart: plans of one key prepare the same."""

    @property
    @abstractmethod
    def course(self) -> Any:
        """What tells plans of one layer apart, as plain data."""

    @property
    def words(self) -> str:
        """How the plan runs, in a few words."""
        flipped = ", flipped" if self.flips else ""
        return f"dense, kept{flipped}" if self.uses_dense else f"{self._way}{flipped}"

    @property
    @abstractmethod
    def _way(self) -> str:
        """The way through the parts, in a few words."""

    # -- the same plan, run otherwise ----------------------------------------------------------------

    def flipped(self: Self) -> Self:
        """The same plan with single products computed as their transposes, where it has a choice."""
        return self

    def by_parts(self: Self, rows_at_a_time: int) -> Self:
        """The same plan, a few rows at a time, where it has a choice."""
        return self

    def fit(self: Self, in_features: int, out_features: int) -> Self:
        """The same plan for a layer of these sizes, which the shape may exceed."""
        sizes = (in_features, out_features)
        return self if sizes == (self.in_features, self.out_features) else replace(self, inside=sizes)

    # -- running -------------------------------------------------------------------------------------

    def prepare(self, cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Everything that does not depend on the rows, in the order in which ``execute`` wants it.

        At inference the result may be kept (``WeightCache``) while the cores do not change. Cores that are not merged
        come back as views where they can.

        Raises:
            ShapeError: The cores are not those of ``shape``.
        """
        self._check_cores(cores)
        if not self.uses_dense:
            return self._prepare_steps(cores)
        weight = self._dense(cores)
        return (weight if self.inside is None else weight[: self.out_features, : self.in_features].contiguous(),)

    def execute(
        self,
        x: Tensor,
        cores: Sequence[Tensor],
        prepared: Sequence[Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Multiply: ``y = x W^T + b``, differentiably; by the kernels where they are built and serve these tensors.

        Args:
            x: ``(..., N)``, any number of leading dimensions, any strides.
            cores: Cores of ``shape``.
            prepared: What ``prepare(cores)`` gave; None makes it here.
            bias: ``(M,)``.

        Returns:
            Tensor: ``(..., M)``, dtype of the product.

        Raises:
            ShapeError: ``x`` does not end with ``N``, or the cores are not those of ``shape``.

        Example:
            >>> cores = [torch.randn(1, 4, 5, 3), torch.randn(3, 6, 7, 1)]
            >>> plan = plan_chain(ChainShape.of(cores), batch=2)
            >>> plan.execute(torch.randn(2, 35), cores).shape
            torch.Size([2, 24])
        """
        self._check_input(x)
        ready = prepared is not None
        y = by_kernels(self, x, cores if prepared is None else prepared, bias, ready=ready)
        if y is not None:
            return y
        weights = self.prepare(cores) if prepared is None else prepared
        if self.uses_dense:
            return linear_product(x, weights[0], bias, flipped=self.flips)
        return self._run(x, weights, bias)

    def _run(self, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Pad, take all steps, cut, add the bias."""
        y = self._run_steps(x if self.inside is None else self._padded(x), weights)
        y = y.reshape(*x.shape[:-1], self.shape.out_features)
        if self.inside is not None:
            y = self._cut(y, is_last=bias is None)
        return y if bias is None else y + bias.to(y.dtype)

    def sweep(self, *, ready: bool) -> Sweep | None:
        """What the kernels take for this plan, over cores or over ready weights; ``None`` where none runs it."""
        if not (ready and self.uses_dense):
            return None
        n, m = self.in_features, self.out_features
        form = FORMS.index("flipped" if self.flips else "linear")
        return Sweep(True, True, n, m, 0, [[0, 1, form, n, 1]], [[m, n]])

    @abstractmethod
    def _prepare_steps(self, cores: Sequence[Tensor]) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def _dense(self, cores: Sequence[Tensor]) -> Tensor:
        """The dense weight of ``shape``."""

    @abstractmethod
    def _run_steps(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """All steps, for inputs as long as the shape's; ``(b, M)`` in some other shape."""

    def _padded(self, x: Tensor) -> Tensor:
        more = self.shape.in_features - self.in_features
        return F.pad(x, (0, more)) if more else x

    def _cut(self, y: Tensor, *, is_last: bool) -> Tensor:
        if self.out_features == self.shape.out_features:
            return y
        y = y[..., : self.out_features]
        return y.contiguous() if is_last else y

    def _check_input(self, x: Tensor) -> None:
        sizes = sizes_of(x)
        if not sizes or sizes[-1] != self.in_features:
            raise ShapeError(
                f"the last size of the input must be in_features: x has shape {sizes}, expected "
                f"(..., {self.in_features}). Reshape the input or plan for its size."
            )

    def _check_cores(self, cores: Sequence[Tensor]) -> None:
        shapes = tuple(sizes_of(core) for core in cores)
        if shapes != self.shape.core_shapes:
            raise ShapeError(
                f"cores must have the planned shapes: cores has {shapes}, expected {self.shape.core_shapes}. "
                f"Make a plan for their shape."
            )

    # -- printing ------------------------------------------------------------------------------------

    @property
    def _planned_for(self) -> str:
        """The line of every report that says what was planned for."""
        phase = "training step" if self.training else "inference"
        return f"batch {self.batch}, {str(self.dtype).removeprefix('torch.')} on {self.device_type}, {phase}"


__getattr__ = names_of_before(__name__, "contract.chain_plan", "contract.execute")
