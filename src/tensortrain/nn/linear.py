"""Linear layer with a factorized weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from tensortrain.contract import ChainShape, Plan
from tensortrain.errors import ShapeError
from tensortrain.formats import PLAIN, FactorSpec, Rank, Weighting, WeightShape, get_format
from tensortrain.formats.channel_order import NATURAL, ChannelOrder, Ordered
from tensortrain.system.tracing import sizes_of

from .base import FactorizedLayer, Implementation, Init
from .inputs import is_plain_input, map_nested, once, traceable
from .kept import multiply_by_kept_weights, runs_by_kept, what_stands_in
from .runner import Runner, may_be_dense

__all__ = ["Linear"]

Self = TypeVar("Self", bound="Linear")


@what_stands_in("linear")
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
        ordered: Which channels stand in another order in the train than in the layer: those of the inputs (``"in"``),
            of the outputs (``"out"``) or of ``"both"``. It is given to ``from_dense``, or loaded; it starts as it is.

    Attributes:
        in_order: Place k of the train holds input ``in_order[k]``; a buffer, None where inputs are as they are.
        out_places: Output n stands at place ``out_places[n]`` of the train; the same.

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
    ordered: Ordered | None = None
    in_order: Tensor | None
    out_places: Tensor | None

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
        ordered: Ordered | None = None,
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
        self._make_order(ordered)

    # -- the order of channels -----------------------------------------------------------------------

    def _make_order(self, ordered: Ordered | None) -> None:
        """Buffers for the order, which starts as it is."""
        if ordered is not None and ordered not in get_args(Ordered):
            raise ShapeError(
                f"ordered must name sides of the layer: found {ordered!r}, expected one of {get_args(Ordered)} or "
                "None. Leave it out."
            )
        self.ordered = ordered
        sides = {"in_order": ("in", self.in_features), "out_places": ("out", self.out_features)}
        for name, (side, n) in sides.items():
            own = ordered in (side, "both")
            places = torch.arange(n, dtype=torch.int32, device=self.cores[0].device) if own else None
            self.register_buffer(name, places)

    def set_order_(self: Self, order: ChannelOrder) -> Self:
        """Let place k of the train stand for input ``order.inputs[k]``, or output ``order.outputs[k]``.

        The cores stay, so that the layer computes another function.

        Raises:
            ShapeError: It is no order of the layer's channels.
        """
        order.check(self.spec.weight)
        self._make_order(order.sides)
        with torch.no_grad():
            if self.in_order is not None:
                self.in_order.copy_(torch.tensor(order.inputs))
            if self.out_places is not None:
                self.out_places.copy_(torch.tensor(order.outputs).argsort())
        self.clear_cache()
        return self

    @property
    def channel_order(self) -> ChannelOrder:
        """The order as ``from_dense`` takes it."""
        outputs = None if self.out_places is None else self.out_places.argsort()
        ins = None if self.in_order is None else tuple(self.in_order.tolist())
        return ChannelOrder(None if outputs is None else tuple(outputs.tolist()), ins)

    @classmethod
    def from_dense(
        cls: type[Self],
        dense: Any,
        *,
        format: str = "tt",
        rank: Rank | None = None,
        eps: float | None = None,
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
        input_gram: Tensor | None = None,
        output_gram: Tensor | None = None,
        implementation: Implementation = "auto",
        in_order: Sequence[int] | None = None,
        out_order: Sequence[int] | None = None,
    ) -> Self:
        """As ``FactorizedLayer.from_dense``, also with the channels in another order in the train.

        Args:
            dense, format, rank, eps, in_modes, out_modes, input_gram, output_gram, implementation: As there; moments
                are those of the layer as it is.
            in_order, out_order: Place k of the train holds input ``in_order[k]``, or output ``out_order[k]``.

        Raises:
            ShapeError: It is no order of the layer's channels.
        """
        cls._check_dense_type(dense)
        spec, eps = get_format(format).asked(
            cls.weight_shape_of(dense), dense.weight.dtype, rank=rank, eps=eps, out_modes=out_modes, in_modes=in_modes
        )
        weighting, order = Weighting(input_gram, output_gram), ChannelOrder.of(out_order, in_order)
        return cls.from_spec(dense, spec, eps=eps, weighting=weighting, implementation=implementation, order=order)

    @classmethod
    def from_spec(
        cls: type[Self],
        dense: Any,
        spec: FactorSpec,
        *,
        eps: float | None = None,
        weighting: Weighting = PLAIN,
        implementation: Implementation = "auto",
        order: ChannelOrder = NATURAL,
    ) -> Self:
        """As ``FactorizedLayer.from_spec``, with the channels in an order of their own in the train."""
        cls._check_dense_type(dense)
        order.check(spec.weight)
        kernel, weighting = order.of_weight(cls.kernel_of(dense)), order.of_weighting(weighting)
        found = get_format(spec.format).fit(kernel, spec, eps=eps, weighting=weighting)
        layer = cls._of_fit(found, dense, implementation)
        return layer if order.sides is None else layer.set_order_(order)

    def placed(self, weight: Tensor) -> Tensor:
        if self.ordered is None:
            return weight
        if self.in_order is not None:
            weight = weight.index_select(1, self.in_order.argsort())
        return weight if self.out_places is None else weight.index_select(0, self.out_places)

    def config(self) -> dict[str, Any]:
        order = {"ordered": self.ordered} if self.ordered is not None else {}
        return {**super().config(), **order}

    # -- running -------------------------------------------------------------------------------------

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
        elif self._runs_by_kept(input):
            return multiply_by_kept_weights(self, input)
        return self._run(input)

    def _runs_by_kept(self, x: Tensor) -> bool:
        """Whether a compiled program runs the layer as it is run here, by what lies ready from call to call."""
        if self.ordered is not None or not is_plain_input(x) or x.ndim == 0 or x.shape[-1] != self.in_features:
            return False
        is_chain = self.runner._told[0] == ChainShape.__name__  # the kernels sweep over no other products
        return is_chain and runs_by_kept(self, [x] if self.bias is None else [x, self.bias])

    @traceable
    @once
    def _run(self, x: Tensor) -> Tensor:
        if not is_plain_input(x):
            return self._run_laid_out(x)
        self._check_input(x)
        return self.runner.run(self, x) if self.ordered is None else self._run_ordered(x)

    def _run_ordered(self, x: Tensor) -> Tensor:
        """Channels go to their places in the train and back, but for a kept dense weight, which has them in place."""
        if self.runner.multiplies_by_kept_weight(self, x):
            return self.runner.run(self, x)
        x = x if self.in_order is None else x.index_select(-1, self.in_order)
        y, _ = self.runner.product(self, x, None)
        y = y if self.out_places is None else y.index_select(-1, self.out_places)
        return y if self.bias is None else y + self.bias.to(y.dtype)

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
            f"{self._format_repr()}" + (f", ordered={self.ordered}" if self.ordered else "")
        )
