"""Linear layer with a factorized weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from tensortrain.contract import Plan
from tensortrain.errors import ShapeError
from tensortrain.formats import Rank, WeightShape, get_format
from tensortrain.system.tracing import sizes_of

from .base import FactorizedLayer, Implementation, Init
from .inputs import is_plain_input, map_nested, once, traceable
from .runner import Runner, may_be_dense

__all__ = ["Linear"]


class Linear(FactorizedLayer):
    r"""``torch.nn.Linear`` with the weight as a product of small cores: ``y = x W^T + b``.

    Args:
        in_features, out_features, bias: As ``torch.nn.Linear``.
        format: One of ``tensortrain.formats.format_names()``, such as ``"tt"``, ``"low_rank"``, ``"btt"``, ``"cp"``.
        rank: Number, tuple, share of the dense parameters in (0, 1], or ``"same"``.
        in_modes, out_modes: Factors of the sizes, first slowest; balanced ones when left out. For sizes without good
            factors those of a train may multiply to more, by half at most: inputs are padded, and outputs cut.
        init: Variance of the dense weight: ``"match"`` (torch's), ``"glorot"``, ``"he"``, a number;
            ``None`` leaves the cores unset.
        implementation: ``"auto"``, ``"factorized"`` or ``"dense"``.

    Shapes: input ``(..., in_features)``, output ``(..., out_features)``.

    Raises:
        ShapeError: Modes that do not multiply to the sizes, an unknown format.
        RankError: A rank below one or a share outside (0, 1].

    Cost: TT of d cores: O(d r^2 m max(M, N)) flops per row; see ``plan``.
    Source: Novikov et al., NIPS 2015, arXiv:1509.06569.

    Example:
        >>> layer = Linear(25088, 4096, in_modes=(2, 7, 8, 8, 7, 4), out_modes=(4,) * 6, rank=4, bias=False)
        >>> layer.n_params
        2016
    """

    dense_type = nn.Linear
    torch_arguments = ("in_features", "out_features")
    made_from: str | None = None  # a kind of dense layer to go back to, where it is not torch's Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "tt",
        rank: Rank = 8,
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
        init: Init = "match",
        implementation: Implementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        weight = WeightShape("linear", out_features, in_features)
        spec = get_format(format).spec(weight, rank=rank, out_modes=out_modes, in_modes=in_modes)
        self.in_features, self.out_features = in_features, out_features
        super().__init__(
            spec,
            bias=out_features if bias else None,
            init=init,
            implementation=implementation,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def weight_shape_of(cls, layer: Any) -> WeightShape:
        return WeightShape("linear", layer.out_features, layer.in_features)

    def _make_runner(self) -> Runner:
        return Runner(self.format.contraction(self._group_spec), (self.in_features, self.out_features))

    def plan(self, batch: int = 1, *, force: str | None = None) -> Plan:
        """How the layer runs at this many rows: print it to see steps, flops and predicted time.

        The first time for a size, the likeliest plans are run to find it, unless ``may_time_plans`` is off.

        Args:
            batch: Rows, rounded up to a power of two.
            force: Another plan than the one that is used, such as ``"factorized"`` or ``"left-to-right"``.
        """
        return self.runner.plan(self, batch, force=force)

    def forward(self, input: Tensor) -> Tensor:
        if not is_dynamo_compiling():  # first: a compiler would look at the way, and compile anew when there is one
            way = self.runner.way
            y = None if way is None else way(self, input)
            if y is not None:
                return y
        return self._run(input)

    @traceable
    @once
    def _run(self, x: Tensor) -> Tensor:
        if not is_plain_input(x):
            return self._run_laid_out(x)
        self._check_input(x)
        return self.runner.run(self, x)

    def _run_laid_out(self, x: Tensor) -> Tensor:
        """Nested, sparse and oneDNN inputs, with an output as that of torch's layer."""
        if x.is_nested:
            found: Tensor = map_nested(x, self._run, n_last=1)
            return found
        self._check_input(x)
        if x.layout is torch._mkldnn:  # type: ignore[attr-defined]
            return self._run(x.to_dense()).to_mkldnn()
        is_matrix = x.layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc) and x.ndim == 2
        if is_matrix and x.dense_dim() == 0 and may_be_dense(self):
            return F.linear(x, self.runner.dense_weight(self), self.bias)
        return self._run(x.to_dense())

    def _check_input(self, x: Tensor) -> None:
        sizes = sizes_of(x)
        if not sizes or sizes[-1] != self.in_features:
            raise ShapeError(
                f"a linear layer's input must end with its in_features: found {sizes}, expected (..., "
                f"{self.in_features}). Check the layer before."
            )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._format_repr()}"
        )
