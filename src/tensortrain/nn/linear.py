"""Linear layer with a factorized weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensortrain.contract import (
    ContractionPlan,
    NetworkPlan,
)
from tensortrain.contract.compiled import compiled
from tensortrain.contract.plan import linear_product
from tensortrain.errors import ShapeError
from tensortrain.formats import ChainFormat, Rank, WeightShape, get_format
from tensortrain.system.native import (
    library,
)
from tensortrain.system.tracing import is_traced, sizes_of

from .base import FactorizedLayer, Implementation, Init
from .cores import are_plain, is_watched
from .inputs import is_plain_input, map_nested, once, traceable

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
        self._n_padded_inputs = max(0, math.prod(spec.in_modes) - in_features)
        self._is_padded = self._n_padded_inputs > 0 or math.prod(spec.out_modes) > out_features
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

    def plan(self, batch: int = 1, *, force: str | None = None) -> ContractionPlan | NetworkPlan:
        """How the layer runs at this many rows: print it to see steps, flops and predicted time.

        The first time for a size, the likeliest plans are run to find it, unless ``may_time_plans`` is off.

        Args:
            batch: Rows, rounded up to a power of two.
            force: Another plan than the one that is used, such as ``"factorized"`` or ``"left-to-right"``.
        """
        return self._chain_plan(batch, force=force)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            y = self._short(input) if library() is None else self._shortest(input)
            if y is not None:
                return y
        return self._long(input)

    @traceable
    @once
    def _long(self, x: Tensor) -> Tensor:
        """The way of every input, which leaves a shorter one to the next of its size."""
        if not is_plain_input(x):
            return self._run_laid_out(x)
        self._check_input(x)
        plan = self._plan_for(x)
        y = self._run(plan, x)
        if not is_traced():
            self._keep_way(plan, x)
        return y

    def _run_laid_out(self, x: Tensor) -> Tensor:
        """Nested, sparse and oneDNN inputs, with an output as that of torch's layer."""
        if x.is_nested:
            found: Tensor = map_nested(x, self._long, n_last=1)
            return found
        self._check_input(x)
        if x.layout is torch._mkldnn:  # type: ignore[attr-defined]
            return self._long(x.to_dense()).to_mkldnn()
        is_matrix = x.layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc) and x.ndim == 2
        if is_matrix and x.dense_dim() == 0 and self._dense_allowed:
            return F.linear(x, self._dense_weight(), self.bias)
        return self._long(x.to_dense())

    def _check_input(self, x: Tensor) -> None:
        sizes = sizes_of(x)
        if not sizes or sizes[-1] != self.in_features:
            raise ShapeError(
                f"a linear layer's input must end with its in_features: found {sizes}, expected (..., "
                f"{self.in_features}). Check the layer before."
            )

    def _run(self, plan: ContractionPlan | NetworkPlan, x: Tensor) -> Tensor:
        traced = is_traced()  # the same program whether or not gradients are wanted
        if isinstance(plan, ContractionPlan) and not self._is_padded and (traced or self._trains()):
            if not traced:
                self._cache.clear()  # the cores are about to change
            return plan.execute(x, self._chain_cores(), bias=self.bias)
        if plan.uses_dense:
            # The same products as on the short way, so that what is run again saves the same for its gradients.
            if isinstance(plan, ContractionPlan) and not self._is_padded:
                return plan.execute(x, (), (self._dense_weight(),), self.bias)
            return linear_product(x, self._dense_weight(), self.bias)
        return self._execute(plan, x, self._prepared(plan))

    # -- the short way: a size that was met before ----------------------------------------------------

    def _shortest(self, x: Tensor) -> Tensor | None:
        """The product by the kernels, where they have kept the way."""
        way = self._way  # once: another thread may clear it
        # Past attributes of modules, which take longer to look up than a small product.
        cores = self._modules["cores"]
        if way is None or not are_plain(cores):  # type: ignore[arg-type]
            return None
        if self._stand_ins is not None or self._way_options != self._options():
            return None
        try:
            y: Tensor | None = way(x, cores._parameters, self._parameters)  # type: ignore[union-attr]
        except RuntimeError:
            if not getattr(x, "is_nested", False):  # a nested tensor has no sizes to look at
                raise
            return None
        return y

    def _short(self, x: Tensor) -> Tensor | None:
        """Without kernels: the product by the dense weight, where it runs at this many rows and lies ready."""
        if torch.is_grad_enabled() or not isinstance(x, Tensor) or not is_plain_input(x) or is_traced():
            return None
        if is_watched(self.cores):
            return None
        self._check_input(x)
        plan = self._plans.get(self._plan_key(x.numel() // self.in_features, training=False))
        if plan is None or plan.kind != "dense" or (plan.steps and plan.steps[0].kind == "flipped"):
            return None
        weight = self._cache.peek(self._core_list(), "dense")
        return None if weight is None else F.linear(x, weight, self.bias)

    def _forget(self) -> None:
        super()._forget()
        self._way: Any = None
        self._way_options: tuple[Any, ...] = ()

    def _options(self) -> tuple[Any, ...]:
        return self.implementation, self.dense_limit_bytes, self.may_time_plans

    @property
    def _stores_chain(self) -> bool:
        """Whether the stored cores are those of the plan."""
        return type(self.format).to_chain is ChainFormat.to_chain

    def _keep_way(self, plan: ContractionPlan | NetworkPlan, x: Tensor) -> None:
        """Let the kernels take inputs of this size next time, where they are built and the layer is an ordinary one."""
        kernels = library()
        if kernels is None or x.device.type != "cpu" or torch.are_deterministic_algorithms_enabled():
            return
        cores = self._core_list()
        if self._stand_ins is not None or not are_plain(self.cores):
            return
        way, options = self._way, self._options()
        if way is None or self._way_options != options:
            way = kernels.ShortWay()
            self._way, self._way_options, self._cache.holder = way, options, way
        rows = x.numel() // self.in_features
        if self._trains():
            if isinstance(plan, ContractionPlan) and not self._is_padded and self._stores_chain:
                way.keep_training(rows, compiled(plan, ready=False))
            return
        if isinstance(plan, ContractionPlan) and not self._is_padded:
            sweep = compiled(plan, ready=True)
        elif plan.uses_dense:
            sweep = kernels.dense_sweep(self.in_features, self.out_features)
        else:
            return
        found = self._cache.peek(cores, "dense" if plan.uses_dense else self._prepared_tag(plan))
        if found is not None:
            way.keep_inference(rows, sweep, [found] if plan.uses_dense else list(found), cores)

    def _execute(self, plan: ContractionPlan | NetworkPlan, x: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        """The product by steps, padded where the modes exceed the sizes, and the bias."""
        if isinstance(plan, ContractionPlan) and not self._is_padded:
            return plan.execute(x, (), prepared, self.bias)
        if self._n_padded_inputs:
            x = F.pad(x, (0, self._n_padded_inputs))
        y = plan.execute(x, (), prepared)
        if sizes_of(y)[-1] != self.out_features:
            y = y[..., : self.out_features]
            y = y.contiguous() if self.bias is None else y
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _plan_for(self, x: Tensor) -> ContractionPlan | NetworkPlan:
        if is_traced():
            assert self._static_plan is not None
            return self._plan_when_traced(_n_rows(x))
        return self._chain_plan(x.numel() // self.in_features)

    def _prepared(self, plan: ContractionPlan | NetworkPlan) -> tuple[Tensor, ...]:
        """The cores laid out and merged for a plan; kept while they do not change."""
        cores = self._core_list if isinstance(plan, NetworkPlan) else self._chain_cores
        return self._cached(self._prepared_tag(plan), lambda: plan.prepare(cores()))

    @staticmethod
    def _prepared_tag(plan: ContractionPlan | NetworkPlan) -> Any:
        return plan.steps if isinstance(plan, NetworkPlan) else (plan.direction, plan.groups)

    def _chain_cores(self) -> list[Tensor]:
        fmt = self.format
        assert isinstance(fmt, ChainFormat)
        return fmt.to_chain(self._core_list(), self.spec)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._format_repr()}"
        )


def _n_rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])
