"""Convolutions with a factorized kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tensortrain.contract import CostModel, Plan, cost_model
from tensortrain.contract.hops import ConvNetwork, Hop, Load, hop_candidates
from tensortrain.errors import ShapeError
from tensortrain.formats import FactorSpec, Format, Rank, WeightShape, get_format
from tensortrain.nn.base import FactorizedLayer, Implementation, Init, as_tuple
from tensortrain.nn.conv.choose import Found, Request, fastest_way, predicted
from tensortrain.nn.conv.kept import (
    convolve_by_kept_kernel,
    forget_kept_kernel,
    kept_kernel_bytes,
)
from tensortrain.nn.conv.layout import in_torchs_layout
from tensortrain.nn.conv.options import ConvOptions
from tensortrain.nn.conv.plan import ConvPlan, out_size
from tensortrain.nn.conv.quick import forget_weights, keep_quick, keep_training
from tensortrain.nn.conv.traced import dense_work, kept_kernel_wins, name_when_traced, rounded, run_hops
from tensortrain.nn.conv.ways import (
    DenseWay,
    HopsWay,
    Layout,
    StepsWay,
    Way,
    can_filter,
    can_pack,
    is_channels_last,
)
from tensortrain.nn.cores import are_plain
from tensortrain.nn.inputs import check_plain_layout, once, traceable
from tensortrain.nn.keeping import can_keep
from tensortrain.nn.kept import are_served
from tensortrain.nn.runner import FEW_WHEN_TRACED, Runner, device_type_of, may_be_dense, trains
from tensortrain.system.native import library
from tensortrain.system.tracing import is_traced, is_transformed, sizes_of, static_power_of_two

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvLayer"]

Size = int | Sequence[int]
Convolve = Callable[..., Tensor]  # (x, weight in torch's layout, bias=None, groups=1) -> y
_STEPS_OVERHEAD_S = 40e-6  # of the calls between the steps, which no flop count shows; seen on a CPU
_FEW = 4  # inputs of a traced program that is planned for one
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class _ConvKey(NamedTuple):
    """What tells the plans of one convolution apart."""

    training: bool
    batch: int
    spatial: tuple[int, ...]
    implementation: str
    dense_limit_bytes: int
    may_pack: bool = False
    may_time: bool = True
    n_threads: int = 0
    channels_last: bool = False


class ConvLayer(FactorizedLayer):
    """What convolutions and transposed convolutions have in common: two ways to run, and the choice."""

    n_axes: ClassVar[int]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        dilation: Size,
        groups: int,
        bias: bool,
        *,
        format: str,
        rank: Rank,
        in_modes: Sequence[int] | None,
        out_modes: Sequence[int] | None,
        init: Init,
        implementation: Implementation,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        n = self.n_axes
        _check_channels(in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = as_tuple(kernel_size, n, "kernel_size")
        self.stride = as_tuple(stride, n, "stride")
        self.dilation = as_tuple(dilation, n, "dilation")
        weight = WeightShape("conv", out_channels, in_channels // groups, self.kernel_size, groups)
        spec = get_format(format).spec(weight, rank=rank, out_modes=out_modes, in_modes=in_modes)
        super().__init__(
            spec,
            bias=out_channels if bias else None,
            init=init,
            implementation=implementation,
            device=device,
            dtype=dtype,
        )
        self._seen_spatial: tuple[int, ...] = tuple(4 * k for k in self.kernel_size)
        # Whether the kernel is rebuilt in every call of a traced program, for few inputs and for many.
        self._dense_pays = tuple(self._plan(n, self._seen_spatial, None).uses_dense for n in (1, FEW_WHEN_TRACED))

    @classmethod
    def weight_shape_of(cls, layer: Any) -> WeightShape:
        inputs = layer.in_channels // layer.groups
        return WeightShape("conv", layer.out_channels, inputs, tuple(layer.kernel_size), layer.groups)

    # -- what a subclass provides --------------------------------------------------------------------

    def _out_spatial(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Positions that an input of these positions gives."""
        raise NotImplementedError

    def _convolve_group(self, x: Tensor, cores: list[Tensor], convolve: Convolve) -> Tensor:
        """One group, core by core; ``convolve`` has the options of the layer and torch's layout of kernels."""
        return self.format.convolve(x, cores, self._group_spec, convolve, self._channel_plan(x))

    def conv_options(self, output_padding: tuple[int, ...] | None = None) -> ConvOptions:
        """What torch's convolution is told besides the kernel."""
        raise NotImplementedError

    def _work(self, spec: FactorSpec, ins: int, outs: int) -> list[tuple[int, int]]:
        """Steps beside the channel chain, for one group, as (flops, numbers moved)."""
        return self.format.conv_work(spec, ins, outs)

    # -- how it runs ---------------------------------------------------------------------------------

    def _check_input(self, x: Tensor) -> None:
        check_plain_layout(x, type(self).__name__)
        n, sizes = self.n_axes, sizes_of(x)
        if len(sizes) not in (n + 1, n + 2) or sizes[-n - 1] != self.in_channels:
            raise ShapeError(
                f"a convolution's input must be (b, C, *positions) or (C, *positions): found {sizes}, "
                f"expected C = {self.in_channels} and {n} position axes. Check the layer before."
            )

    def _run(self, x: Tensor, more: tuple[int, ...] | None = None) -> Tensor:
        """Convolve; ``more`` is the output padding of this call, where it is not that of the layer."""
        if x.layout is torch._mkldnn:  # type: ignore[attr-defined]
            return self._run(x.to_dense(), more).to_mkldnn()
        self._check_input(x)
        if x.ndim == self.n_axes + 1:
            return self._run(x.unsqueeze(0), more).squeeze(0)
        return self._run_traced(x, more) if is_traced() else self._run_planned(x, more)

    def _run_planned(self, x: Tensor, more: tuple[int, ...] | None) -> Tensor:
        self._seen_spatial = tuple(x.shape[2:])
        last = is_channels_last(x)
        plan = self._plan_of(x.shape[0], self._seen_spatial, may_pack=_is_ordinary(x), channels_last=last)
        way, options = plan.way, plan.options
        assert way is not None
        assert options is not None
        if more is not None:
            options = self.conv_options(more)
        if plan.key.training:
            forget_weights(self)
            prepared = way.prepare(self, self.core_list(), options)
        elif way.name == "dense plain":
            prepared = (self.runner.dense_weight(self),)
        else:
            prepared = self.runner.cached(self, way.name, lambda: way.prepare(self, self.core_list(), options))
        y = way.run(x, prepared, self.bias, options, self)
        if more is None:
            self._keep_short(x, plan, prepared)
        return y

    def _keep_short(self, x: Tensor, plan: ConvPlan, prepared: tuple[Tensor, ...]) -> None:
        """Let the next input of this shape take the short way, where layer and input are ordinary ones."""
        training = plan.key.training
        if torch.is_grad_enabled() != training or not _is_plain(x):
            return
        if self.stand_ins is not None or not are_plain(self.cores):
            return
        cores = self.core_list()
        if any(core.is_inference() or type(core) not in (Tensor, nn.Parameter) for core in cores):
            return
        if x.device.type != "cpu" or cores[0].device.type != "cpu":
            return
        if training:
            keep_training(self, x, plan)
        else:
            keep_quick(self, x, plan, prepared, cores)

    def _run_traced(self, x: Tensor, more: tuple[int, ...] | None) -> Tensor:
        options = self.conv_options(more)
        if self._keeps_kernel_when_traced(x, options):
            return convolve_by_kept_kernel(x, self.bias, self.core_list(), options, self.groups, self._told_spec)
        name = self._name_when_traced(x, options)
        if name.startswith("hops"):
            return run_hops(name, x, self.bias, *self.core_list())
        if name == "dense" or self._runs_dense_when_traced(x):
            return options(x, self.runner.dense_weight(self), self.bias, self.groups)
        y = self.steps_from(x, self.core_list(), options)
        return y if self.bias is None else y + self.bias.to(y.dtype).reshape(-1, *[1] * self.n_axes)

    def _name_when_traced(self, x: Tensor, options: ConvOptions) -> str:
        """Hops in what the compiler makes; other recordings are to fit inputs of any size, and hops may not."""
        if not torch.compiler.is_compiling() or self.implementation == "dense" or not self._has_steps:
            return ""
        allow_dense = self.implementation == "auto" and may_be_dense(self)
        ins = rounded(x.shape[2:])
        outs = tuple(max(1, n) for n in self._out_spatial(ins))
        return name_when_traced(self._told_spec, options, x.shape[0], (ins, outs), self.cores[0], allow_dense)

    def _keeps_kernel_when_traced(self, x: Tensor, options: ConvOptions) -> bool:
        """Whether a compiled program runs by the kept dense kernel: where no gradients are wanted and that is quickest.

        What is exported is for other machines and processes, and for weights that come later.
        """
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.is_grad_enabled():
            return False
        cores, bias = self.core_list(), self.bias
        if self.stand_ins is not None or torch.is_autocast_enabled(x.device.type) or not options.is_torchs_own:
            return False
        if not are_served([x] if bias is None else [x, bias], cores) or not can_keep():
            return False
        return self._kept_kernel_is_quickest(x, options)

    def _kept_kernel_is_quickest(self, x: Tensor, options: ConvOptions) -> bool:
        if self._runs_dense_when_traced(x):
            return True
        ins = rounded(x.shape[2:])
        outs = tuple(max(1, n) for n in self._out_spatial(ins))
        allow_dense = self.implementation == "auto" and may_be_dense(self)
        return allow_dense and kept_kernel_wins(self._told_spec, options, x.shape[0], (ins, outs), self.cores[0])

    def _runs_dense_when_traced(self, x: Tensor) -> bool:
        if self.implementation != "auto" or not self._has_steps:
            return self.implementation == "dense" or not self._has_steps
        few = (static_power_of_two(x.shape[0]) or FEW_WHEN_TRACED) <= _FEW
        return may_be_dense(self) and self._dense_pays[0 if few else 1]

    @property
    def _has_steps(self) -> bool:
        return type(self.format).convolve is not Format.convolve  # else the format can only be put together

    def dense_from(self, cores: Sequence[Tensor]) -> Tensor:
        """The kernel that cores make, in torch's layout."""
        return in_torchs_layout(self.format.to_dense(cores, self.spec))

    def build_weight(self) -> Tensor:
        return self.dense_from(self.core_list())

    def steps_from(self, x: Tensor, cores: Sequence[Tensor], convolve: Convolve) -> Tensor:
        """The format's own steps, group by group, without bias."""
        if self.groups == 1:
            return self._convolve_group(x, list(cores), convolve)
        parts = x.chunk(self.groups, dim=1)
        outputs = [self._convolve_group(part, [core[g] for core in cores], convolve) for g, part in enumerate(parts)]
        return torch.cat(outputs, dim=1)

    def _channel_plan(self, x: Tensor) -> Any:  # ContractionPlan | None: it never runs through a dense kernel
        if self.runner.shape is None:
            return None
        if is_traced():
            rows = self._chain_rows(sizes_of(x)[0], sizes_of(x)[2:])
            return self.runner.plan_when_traced(self, rows, force="factorized")
        return self.runner.plan(self, self._chain_rows(x.shape[0], tuple(x.shape[2:])), force="factorized")

    def _chain_rows(self, batch: int, spatial: tuple[int, ...]) -> int:
        """How many times the channel chain is applied."""
        return max(1, batch * math.prod(self._out_spatial(spatial)))

    def _make_runner(self) -> Runner:
        return Runner(self.format.channel_chain(self._group_spec))

    def plan(self, batch: int = 1, spatial: Sequence[int] | None = None) -> ConvPlan:
        """How the layer runs on this many inputs of this size (the size last seen when left out)."""
        sizes = tuple(spatial) if spatial is not None else self._seen_spatial
        return self._plan_of(batch, sizes, may_pack=not torch.is_grad_enabled())

    def _plan_of(
        self, batch: int, spatial: tuple[int, ...], *, may_pack: bool, channels_last: bool = False
    ) -> ConvPlan:
        may_time = self.may_time_plans and not torch.are_deterministic_algorithms_enabled()
        how = self.implementation, self.dense_limit_bytes, may_pack, may_time, torch.get_num_threads(), channels_last
        key = _ConvKey(trains(self), batch, spatial, *how)
        found = self.runner.layer_plans.get(key)
        if found is None or found.way is None:
            found = self.runner.layer_plans[key] = self._plan(batch, spatial, key)
        return found

    def _plan(self, batch: int, spatial: tuple[int, ...], key: _ConvKey | None) -> ConvPlan:
        """Plan; without a key for a traced program, which merges its cores in every call and is never timed."""
        core, traced = self.cores[0], key is None
        training = key is None or key.training
        device_type = device_type_of(self)
        model = CostModel.reference(device_type) if traced else cost_model(device_type)
        outs = self._out_spatial(spatial)
        still = frozenset(axis for axis in range(self.n_axes) if self.conv_options().is_still(axis))
        transposed = self.conv_options().is_transposed
        load = Load(batch, spatial, outs, still, transposed, training, core.element_size())
        dense, others = self._dense_ways(load, model, key), self._other_ways(load, model, key)
        asked = dense if self.implementation == "dense" or not others else others
        both = [*dense, *others] if self.implementation == "auto" and may_be_dense(self) else asked
        request = Request(
            self.spec,
            self.conv_options(),
            batch,
            spatial,
            self.out_channels * math.prod(outs),
            training,
            core.dtype,
            core.device,
            key is not None and key.channels_last,
            self.bias is not None,
        )
        may_time = key is not None and key.may_time and core.device.type in ("cpu", "cuda")
        found = fastest_way(request, both, self, may_time=may_time) if may_time else predicted(both)
        return self._told(found, dense, others, load, key)

    def _told(self, found: Found, dense: list[Way], others: list[Way], load: Load, key: Any) -> ConvPlan:
        """What was found, as a plan."""

        def seconds(ways: list[Way]) -> float:
            tried = [found.seconds[way.name] for way in ways if way.name in found.seconds]
            return min(tried) if tried else min((way.predicted_s for way in ways), default=0.0)

        best = min(others, key=lambda way: found.seconds.get(way.name, math.inf), default=dense[0])
        best = found.way if not found.way.uses_dense else best
        item = self.cores[0].element_size()
        return ConvPlan(
            "dense" if found.way.uses_dense else "factorized",
            load.batch,
            load.ins,
            best.flops,
            dense[0].flops,
            found.seconds[found.way.name] if not found.way.uses_dense else seconds(others or dense),
            found.seconds[found.way.name] if found.way.uses_dense else seconds(dense),
            0 if found.way.uses_dense else best.peak * item,
            is_measured=found.is_measured,
            way=found.way,
            options=self.conv_options(),
            key=key,
        )

    @property
    def resident_cache_bytes(self) -> int:
        return super().resident_cache_bytes + kept_kernel_bytes(list(self.cores.parameters()))

    def clear_cache(self) -> None:
        super().clear_cache()
        forget_kept_kernel(list(self.cores.parameters()))

    # -- candidates ----------------------------------------------------------------------------------

    def _dense_ways(self, load: Load, model: CostModel, key: _ConvKey | None) -> list[Way]:
        """Through the dense kernel: as torch runs it, and in other layouts."""
        flops, seconds = dense_work(self.spec, load, model)
        layouts: list[Layout] = ["plain"]
        if key is not None and not load.training and self.n_axes < 3:
            layouts += ["last"]
            layouts += ["packed"] if key.may_pack and can_pack(self.conv_options(), *self._place) else []
        if key is not None and len(load.still) == self.n_axes and self.groups == 1:
            layouts += [] if self.conv_options().is_transposed else ["library"]
        ways: list[Way] = [DenseWay(self.groups, flops, 0, seconds, layout) for layout in layouts]
        network = self._network if key is not None and load.training else None
        if network is None:
            return ways
        merged: list[Way] = [DenseWay(self.groups, flops, 0, seconds, layout, network) for layout in layouts]
        return [*merged, *ways] if _are_served(self.cores[0]) else [*ways, *merged]

    @property
    def _network(self) -> ConvNetwork | None:
        """The cores of all groups by the names of their legs, where they are a network."""
        network = self.format.conv_network(self._group_spec)
        return None if network is None else network.in_groups(self.groups)

    @property
    def _place(self) -> tuple[torch.dtype, torch.device]:
        return self.cores[0].dtype, self.cores[0].device

    def _other_ways(self, load: Load, model: CostModel, key: _ConvKey | None) -> list[Way]:
        """Through the cores: in hops, and by the format's own steps."""
        if not self._has_steps:
            return []
        network = self._network
        steps = self._steps_way(load, model, traced=key is None)
        if key is None or network is None:
            return [steps]
        found: list[Way] = []
        for hops in hop_candidates(network, load, model):
            found += self._in_layouts(network, hops, load, key)
        return [*found, steps] if found else [steps]

    def _in_layouts(self, network: ConvNetwork, hops: tuple[Hop, ...], load: Load, key: _ConvKey) -> list[HopsWay]:
        flops = sum(hop.flops for hop in hops)
        peak = max(hop.moved for hop in hops)
        seconds = sum(hop.seconds for hop in hops)
        way = HopsWay(self.groups, flops, peak, seconds, network, hops)
        layouts: list[Layout] = ["plain", "library"]
        layouts += ["filters"] if way.can_filter() and can_filter(self.conv_options(), *self._place) else []
        if way.can_be_last() and self.n_axes < 3:
            layouts += ["last"]
            if key.may_pack and not load.training and can_pack(self.conv_options(), *self._place):
                layouts += ["packed", "all packed"]
        return [way.in_layout(layout) for layout in layouts]

    def _steps_way(self, load: Load, model: CostModel, *, traced: bool) -> StepsWay:
        backward = 3 if load.training else 1
        n_ins, n_outs = load.batch * math.prod(load.ins), load.batch * math.prod(load.outs)
        steps = self._work(self._group_spec, n_ins, n_outs) * self.groups
        # Half the rate of large convolutions: these have few channels on one side.
        seconds = sum(backward * model.conv_s(2 * flops, moved * load.itemsize) for flops, moved in steps)
        seconds += backward * _STEPS_OVERHEAD_S * self.groups
        flops = sum(flops for flops, _ in steps)
        if self.runner.shape is not None:
            find: Callable[..., Plan] = self.runner.plan_when_traced if traced else self.runner.plan
            plan = find(self, self._chain_rows(load.batch, load.ins), force="factorized")
            seconds += plan.predicted_s * self.groups
            flops += plan.flops * self.groups
        return StepsWay(self.groups, flops, max((moved for _, moved in steps), default=0), seconds)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        parts += [f"padding={self.padding}"] if self.padding not in ((0,) * self.n_axes, "valid") else []
        parts += [f"dilation={self.dilation}"] if max(self.dilation) > 1 else []
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        return ", ".join([*parts, *self._more_repr(), f"bias={self.bias is not None}", self._format_repr()])

    def _more_repr(self) -> list[str]:
        return []


class _ConvNd(ConvLayer):
    torch_arguments = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
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
        self.padding = _check_padding(padding, as_tuple(stride, self.n_axes, "stride"), self.n_axes)
        self.padding_mode = _check_padding_mode(padding_mode)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            dilation,
            groups,
            bias,
            format=format,
            rank=rank,
            in_modes=in_modes,
            out_modes=out_modes,
            init=init,
            implementation=implementation,
            device=device,
            dtype=dtype,
        )

    def forward(self, input: Tensor) -> Tensor:
        if not is_dynamo_compiling():  # first: a compiler would look at the way, and compile anew when there is one
            way = self.runner.way
            y = None if way is None else way(self, input)
            if y is not None:
                return y
        return self._forward(input)

    @traceable
    @once
    def _forward(self, input: Tensor) -> Tensor:
        return self._run(input)

    def conv_options(self, output_padding: tuple[int, ...] | None = None) -> ConvOptions:
        return ConvOptions(self.kernel_size, self.stride, self.padding, self.dilation, self.padding_mode)

    def _out_spatial(self, spatial: Sequence[int]) -> tuple[int, ...]:
        if self.padding == "same":
            return tuple(spatial)
        padding = self.padding if isinstance(self.padding, tuple) else (0,) * self.n_axes
        axes = zip(spatial, self.kernel_size, self.stride, padding, self.dilation, strict=True)
        return tuple(out_size(*axis) for axis in axes)

    def _more_repr(self) -> list[str]:
        return [f"padding_mode={self.padding_mode}"] if self.padding_mode != "zeros" else []


class Conv1d(_ConvNd):
    """``torch.nn.Conv1d`` with a factorized kernel; see ``Conv2d``."""

    n_axes = 1
    dense_type = nn.Conv1d


class Conv2d(_ConvNd):
    r"""``torch.nn.Conv2d`` with the kernel as a product of small cores.

    Args:
        in_channels .. padding_mode: As ``torch.nn.Conv2d``.
        format: ``"tt"`` (kernel positions, then paired channel modes), ``"tt_naive"``, ``"tucker2"``,
            ``"low_rank"``.
        rank: Number, tuple, share, or ``"same"``. A TT tuple starts with the spatial core,
            ``(1, r_0, r_1, .., 1)``; Tucker-2 takes ``(R_in, R_out)``.
        in_modes, out_modes: Factors of the channels of one group.
        implementation: ``"dense"`` rebuilds the kernel and calls torch's convolution, ``"factorized"``
            runs core by core, ``"auto"`` takes what is predicted faster.

    Shapes: input ``(b, C, H, W)`` or ``(C, H, W)``; output as ``torch.nn.Conv2d``.

    Cost: rebuilding is O(k C S r), whatever the image; core by core is
    O(H W (k C r_0 + chain)) flops and r_0 times the feature map in memory.
    Source: Garipov et al., arXiv:1611.03214; Tucker-2: Kim et al., arXiv:1511.06530.

    Example:
        >>> layer = Conv2d(64, 128, 3, in_modes=(4, 4, 4), out_modes=(4, 8, 4), rank=(1, 27, 22, 22, 1))
        >>> layer(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 128, 6, 6])
    """

    n_axes = 2
    dense_type = nn.Conv2d


class Conv3d(_ConvNd):
    """``torch.nn.Conv3d`` with a factorized kernel; see ``Conv2d``."""

    n_axes = 3
    dense_type = nn.Conv3d


def _is_ordinary(x: Tensor) -> bool:
    """Whether an input may meet kernels that the library has laid out for itself: nobody would differentiate them."""
    return not torch.is_grad_enabled() and x.dtype == torch.float32 and _is_plain(x)


def _is_plain(x: Tensor) -> bool:
    """Whether nothing looks on that would have to see every operation on an input."""
    if type(x) is not Tensor or x.numel() == 0 or is_transformed() or torch.is_autocast_enabled("cpu"):
        return False
    return forward_ad._current_level < 0 and _get_current_dispatch_mode() is None


def _are_served(core: Tensor) -> bool:
    """Whether the kernels make weights of such cores, in less time than torch's operations one by one."""
    return core.is_cpu and core.dtype in (torch.float32, torch.float64) and library() is not None


def _check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise ShapeError(
            f"groups must divide both channel counts: found groups={groups}, in_channels={in_channels}, "
            f"out_channels={out_channels}. Choose a common divisor."
        )


def _check_padding(padding: Size | str, stride: tuple[int, ...], n: int) -> tuple[int, ...] | str:
    if not isinstance(padding, str):
        return as_tuple(padding, n, "padding", least=0)
    if padding not in ("same", "valid"):
        raise ShapeError(f"padding must be a number, a tuple, 'same' or 'valid': found {padding!r}. Pass one of these.")
    if padding == "same" and max(stride) > 1:
        raise ShapeError(f"padding='same' needs stride 1: found stride={stride}. Pad by a number instead.")
    return padding


def _check_padding_mode(mode: str) -> str:
    if mode not in _PADDING_MODES:
        raise ShapeError(f"padding_mode must be one of {_PADDING_MODES}: found {mode!r}. Pass 'zeros'.")
    return mode
