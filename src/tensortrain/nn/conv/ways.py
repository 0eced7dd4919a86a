"""The ways in which one convolution can run: through its dense kernel, in hops, or by the format's own steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tensortrain.contract.hops import ConvNetwork, Hop
from tensortrain.contract.weights import Wanted, made_weights, recipe_of
from tensortrain.nn.conv.options import ConvOptions
from tensortrain.system.native import library

__all__ = [
    "DenseWay",
    "HopsWay",
    "Layout",
    "Maker",
    "StepsWay",
    "Way",
    "can_filter",
    "can_pack",
    "is_channels_last",
]

# Of the states: as torch lays them out; the same with 1x1 products as convolutions of the library, or with our own
# kernel for convolutions of few channels; channels last; channels last with kernels that the library has laid out for
# itself beforehand; the same for 1x1 products too.
Layout = Literal["plain", "library", "filters", "last", "packed", "all packed"]
_FEW_CHANNELS = 4  # summed by each output of a convolution by our own kernel
_POINT = ConvOptions((1, 1), (1, 1), (0, 0), (1, 1))


class Maker(Protocol):
    """What a layer can do with cores that are handed to it: its own, or numbers for a trial."""

    def dense_from(self, cores: Sequence[Tensor]) -> Tensor:
        """The kernel in torch's layout."""

    def steps_from(self, x: Tensor, cores: Sequence[Tensor], convolve: Callable[..., Tensor]) -> Tensor:
        """The format's own steps on an input, without bias."""


@dataclass(frozen=True)
class Way(ABC):
    """One way to run. ``run`` is differentiable, but where a kernel is packed.

    Args:
        groups: Of channels.
        flops: Of one call.
        peak: Numbers of the largest state between two steps.
        predicted_s: Seconds of one call, of forward and backward in training.
    """

    groups: int
    flops: int
    peak: int
    predicted_s: float

    @property
    def uses_dense(self) -> bool:
        """Whether the dense kernel is built."""
        return False

    @property
    def packs(self) -> bool:
        """Whether a kernel is kept in the library's own layout, which only plain inference can use."""
        return False

    @property
    @abstractmethod
    def name(self) -> str:
        """What tells ways of one layer apart, in every process."""

    @property
    @abstractmethod
    def words(self) -> str:
        """How the layer runs, in a few words."""

    @abstractmethod
    def prepare(self, maker: Maker, cores: Sequence[Tensor], options: ConvOptions) -> tuple[Tensor, ...]:
        """What follows from the cores alone, differentiably unless it packs."""

    @abstractmethod
    def run(
        self, x: Tensor, prepared: tuple[Tensor, ...], bias: Tensor | None, options: ConvOptions, maker: Maker
    ) -> Tensor:
        """Convolve ``(b, C, *positions)``."""

    def ready(
        self, x: Tensor, prepared: tuple[Tensor, ...], options: ConvOptions
    ) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        """The same as ``run`` for inputs of the shape of ``x``, without the layer; None where it needs that."""
        return lambda other, bias: self.run(other, prepared, bias, options, None)  # type: ignore[arg-type]

    def recipe(self, options: ConvOptions) -> Any | None:
        """How the kernels make its weights from the cores in every call of training; None where they do not."""
        return None

    def by_weights(self, options: ConvOptions) -> Callable[[Tensor, Tensor | None, Sequence[Tensor]], Tensor]:
        """The rest of a call, by the weights of the recipe."""
        return lambda x, bias, weights: self.run(x, tuple(weights), bias, options, None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class StepsWay(Way):
    """The format's own steps, as in traced programs."""

    @property
    def name(self) -> str:
        return "steps"

    @property
    def words(self) -> str:
        return "core by core"

    def prepare(self, maker: Maker, cores: Sequence[Tensor], options: ConvOptions) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return tuple(cores)
        # Products with tensors that require gradients are laid out for a backward pass, even where none is recorded.
        return tuple(core.detach() for core in cores)

    def run(
        self, x: Tensor, prepared: tuple[Tensor, ...], bias: Tensor | None, options: ConvOptions, maker: Maker
    ) -> Tensor:
        y = _with_bias(maker.steps_from(x, prepared, options), bias)
        return y if is_channels_last(x) else y.contiguous()  # as torch's: a model may take a view of it

    def ready(
        self, x: Tensor, prepared: tuple[Tensor, ...], options: ConvOptions
    ) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        return None


@dataclass(frozen=True)
class DenseWay(Way):
    """The dense kernel; ``layout`` ``"library"`` means a 1x1 kernel as a product of matrices.

    With a ``network`` all cores are merged at once into torch's layout, which copies less than the format's own way.
    """

    layout: Layout = "plain"
    network: ConvNetwork | None = None

    @property
    def uses_dense(self) -> bool:
        return True

    @property
    def packs(self) -> bool:
        return self.layout == "packed"

    @property
    def name(self) -> str:
        return f"dense {self.layout}" if self.network is None else f"dense {self.layout} merged"

    @property
    def words(self) -> str:
        return "dense, kept"

    def prepare(self, maker: Maker, cores: Sequence[Tensor], options: ConvOptions) -> tuple[Tensor, ...]:
        network = self.network
        if network is None:
            weight = maker.dense_from(cores)
        else:
            (weight,) = made_weights(network.cores, network.sizes, (self._wanted(network, options),), cores)
        return (self._finished(weight, options),)

    def _wanted(self, network: ConvNetwork, options: ConvOptions) -> Wanted:
        return network.dense(transposed=options.is_transposed)

    def _finished(self, weight: Tensor, options: ConvOptions) -> Tensor:
        if self.layout == "library":
            return weight.flatten(1)
        return weight if self.layout == "plain" else _laid_out(weight, options, self.groups, self.packs)

    def recipe(self, options: ConvOptions) -> Any | None:
        network = self.network
        return None if network is None else recipe_of(network.cores, network.sizes, (self._wanted(network, options),))

    def by_weights(self, options: ConvOptions) -> Callable[[Tensor, Tensor | None, Sequence[Tensor]], Tensor]:
        def run(x: Tensor, bias: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
            return self.run(x, (self._finished(weights[0], options),), bias, options, None)  # type: ignore[arg-type]

        return run

    def is_torchs_own(self, options: ConvOptions) -> bool:
        """Whether all it does with the kernel is one plain convolution of torch's."""
        if self.layout != "plain" or options.padding_mode != "zeros":
            return False
        return isinstance(options.padding, tuple) and not options.is_transposed

    def run(
        self, x: Tensor, prepared: tuple[Tensor, ...], bias: Tensor | None, options: ConvOptions, maker: Maker
    ) -> Tensor:
        (weight,) = prepared
        if self.layout == "plain":
            return options(x, weight, bias, self.groups)
        if self.layout == "library":
            return _product(weight, x.flatten(2), bias).unflatten(2, x.shape[2:])
        y = _last_convolved(x, weight, bias, options, self.groups, packed=self.packs)
        return y if is_channels_last(x) else y.contiguous()

    def ready(
        self, x: Tensor, prepared: tuple[Tensor, ...], options: ConvOptions
    ) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        if self.layout != "plain" or options.is_transposed or options.padding_mode != "zeros":
            return super().ready(x, prepared, options)
        convolve, weight, groups = options.function, prepared[0], self.groups
        stride, padding, dilation = options.stride, options.padding, options.dilation
        return lambda other, bias: convolve(other, weight, bias, stride, padding, dilation, groups)


@dataclass(frozen=True)
class HopsWay(Way):
    """A few merged cores at a time; see ``tensortrain.contract.hops``."""

    network: ConvNetwork
    hops: tuple[Hop, ...]
    layout: Layout = "plain"

    @property
    def packs(self) -> bool:
        return self.layout in ("packed", "all packed")

    @property
    def name(self) -> str:
        how = " ".join(f"{'.'.join(map(str, hop.cores))}>{','.join(hop.legs)}" for hop in self.hops)
        return f"hops {how} {self.layout}"

    @property
    def words(self) -> str:
        told = []
        for hop in self.hops:
            kernel = "x".join(map(str, self._kernel(hop))) if hop.along else "1x1"
            told.append(f"{'depthwise ' if hop.along and hop.sizes[1] > 1 else ''}{kernel}")
        return f"in hops: {', '.join(told)}"

    def _kernel(self, hop: Hop) -> tuple[int, ...]:
        known = dict(self.network.sizes)
        axes = enumerate(self.network.axes)
        return tuple(known.get(leg, 1) if axis in hop.along else 1 for axis, leg in axes)

    def in_layout(self, layout: Layout) -> HopsWay:
        """The same hops, laid out otherwise."""
        return replace(self, layout=layout)

    def can_filter(self) -> bool:
        """Whether our own kernel may take one of its convolutions."""
        return any(hop.along and hop.weight_sizes[2] <= _FEW_CHANNELS for hop in self.hops)

    def can_be_last(self) -> bool:
        """Whether every state is nothing but channels, as channels-last steps want it."""
        return all(hop.is_plain and (hop.along or hop.sizes[1] == 1) for hop in self.hops)

    def prepare(self, maker: Maker, cores: Sequence[Tensor], options: ConvOptions) -> tuple[Tensor, ...]:
        made = made_weights(self.network.cores, self.network.sizes, self._wanted(options.is_transposed), cores)
        return self._finished(made, self._parts(options))

    def _wanted(self, transposed: bool) -> tuple[Wanted, ...]:
        """The weights of the hops as torch's products and convolutions take them."""
        found = []
        for hop in self.hops:
            groups, new, summed = hop.weight_sizes
            if hop.along and transposed:
                shape: tuple[int, ...] = (groups * summed, new, *self._kernel(hop))
            elif hop.along:
                shape = (groups * new, summed, *self._kernel(hop))
            elif self.layout in ("library", "all packed"):
                shape = (groups * new, summed, 1, 1)
            else:
                shape = (*((groups,) if groups > 1 else ()), new, summed)
            found.append(hop.weight(shape, summed_first=bool(hop.along) and transposed))
        return tuple(found)

    def _finished(self, made: Sequence[Tensor], parts: Sequence[ConvOptions]) -> tuple[Tensor, ...]:
        """The same in the layout of the way."""
        if self.layout in ("plain", "library", "filters"):
            return tuple(made)
        found = []
        for hop, weight, options in zip(self.hops, made, parts, strict=True):
            if hop.along:
                weight = _laid_out(weight, options, hop.sizes[1], self.packs)
            elif self.layout == "all packed":
                weight = _laid_out(weight, _POINT, hop.sizes[1], packed=True)
            found.append(weight)
        return tuple(found)

    def recipe(self, options: ConvOptions) -> Any | None:
        return recipe_of(self.network.cores, self.network.sizes, self._wanted(options.is_transposed))

    def by_weights(self, options: ConvOptions) -> Callable[[Tensor, Tensor | None, Sequence[Tensor]], Tensor]:
        parts, run, finished = self._parts(options), self._run, self._finished
        return lambda x, bias, weights: run(x, finished(weights, parts), bias, parts)

    def run(
        self, x: Tensor, prepared: tuple[Tensor, ...], bias: Tensor | None, options: ConvOptions, maker: Maker
    ) -> Tensor:
        return self._run(x, prepared, bias, self._parts(options))

    def ready(
        self, x: Tensor, prepared: tuple[Tensor, ...], options: ConvOptions
    ) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        parts, run = self._parts(options), self._run
        return lambda other, bias: run(other, prepared, bias, parts)

    def _parts(self, options: ConvOptions) -> list[ConvOptions]:
        """What every hop has of the options."""
        return [options.along(hop.along) for hop in self.hops]

    def _run(
        self, x: Tensor, prepared: tuple[Tensor, ...], bias: Tensor | None, parts: Sequence[ConvOptions]
    ) -> Tensor:
        if self.layout in ("last", "packed", "all packed"):
            return self._run_last(x, prepared, bias, parts)
        batch, places, legs, n_last = x.shape[0], x.shape[2:], self.network.in_legs, len(self.hops) - 1
        for number, (hop, weight) in enumerate(zip(self.hops, prepared, strict=True)):
            if hop.permute:
                x = x.reshape(batch, *self._sizes(legs), places.numel())
                x = x.permute(0, *(1 + axis for axis in hop.permute), -1)
            ends = number == n_last and hop.is_plain and hop.legs == self.network.out_legs
            own, bias = (bias, None) if ends else (None, bias)
            x, places = self._applied(hop, x, weight, own, batch, places, parts[number])
            legs = hop.legs
        if legs != self.network.out_legs:
            x = x.reshape(batch, *self._sizes(legs), *places)
            order = (legs.index(leg) for leg in self.network.out_legs)
            x = x.permute(0, *(1 + axis for axis in order), *range(1 + len(legs), x.ndim))
        return _with_bias(x.reshape(batch, self.network.size(self.network.out_legs), *places), bias)

    def _sizes(self, legs: Sequence[str]) -> list[int]:
        known = dict(self.network.sizes)
        return [known[leg] for leg in legs]

    def _applied(
        self,
        hop: Hop,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: int,
        places: torch.Size,
        options: ConvOptions,
    ) -> tuple[Tensor, torch.Size]:
        before, groups, summed, after = hop.sizes
        if hop.along:
            x = x.reshape(batch * before, groups * summed, *places)
            filters = self.layout == "filters" and hop.weight_sizes[2] <= _FEW_CHANNELS
            y = (_filtered if filters else _convolved)(x, weight, bias, options, groups)
            return y, y.shape[2:]
        width = after * places.numel()
        if self.layout == "library":
            return F.conv2d(x.reshape(batch * before, groups * summed, width, 1), weight, bias, groups=groups), places
        if groups > 1:
            y = torch.matmul(weight, x.reshape(batch * before, groups, summed, width))
            return _with_bias(y.reshape(batch * before, groups * hop.weight_sizes[1], width), bias), places
        return _product(weight, x.reshape(batch * before, summed, width), bias), places

    def _run_last(
        self, x: Tensor, prepared: tuple[Tensor, ...], bias: Tensor | None, parts: Sequence[ConvOptions]
    ) -> Tensor:
        """States with the channels innermost, so that products and convolutions hand them on without a copy."""
        keeps, n_last = is_channels_last(x), len(self.hops) - 1
        for number, (hop, weight) in enumerate(zip(self.hops, prepared, strict=True)):
            own = bias if number == n_last else None
            if hop.along:
                x = _last_convolved(x, weight, own, parts[number], hop.sizes[1], packed=self.packs)
            elif self.layout == "all packed":
                x = _last_convolved(x, weight, own, _POINT, hop.sizes[1], packed=True)
            elif number == n_last and not keeps:
                return _product(weight, x.flatten(2), own).unflatten(2, x.shape[2:])
            else:
                x = _rows_product(x, weight, own, is_given=number == 0)
        return x if keeps else x.contiguous()


# -- steps --------------------------------------------------------------------------------------------------------


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype).reshape(-1, *[1] * (y.ndim - 2))


def _product(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """``(b, C, p)`` times ``(S, C)``: ``(b, S, p)``, the bias within the product."""
    if x.shape[0] == 1:
        flat = x.squeeze(0)
        return (torch.mm(weight, flat) if bias is None else torch.addmm(bias.unsqueeze(1), weight, flat)).unsqueeze(0)
    wide = weight.expand(x.shape[0], -1, -1)
    if bias is None:
        return torch.bmm(wide, x)
    return torch.baddbmm(bias.reshape(1, -1, 1), wide, x)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions, groups: int) -> Tensor:
    return options(x, weight, bias, groups)


def _filtered(x: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions, groups: int) -> Tensor:
    """The same by our own kernel; by torch's where it is not built, or somebody looks on."""
    kernels = library()
    if kernels is not None and not options.is_transposed and options.padding_mode == "zeros":
        y: Tensor | None = kernels.filter(x, weight, bias, options.stride, options.padding, options.dilation, groups)
        if y is not None:
            return y
    return options(x, weight, bias, groups)


def can_filter(options: ConvOptions, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether our own kernel takes such convolutions."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64) or options.is_transposed:
        return False
    return options.padding_mode == "zeros" and isinstance(options.padding, tuple) and library() is not None


def _rows_product(x: Tensor, weight: Tensor, bias: Tensor | None, *, is_given: bool) -> Tensor:
    """The same with channels innermost in the result, and in ``x`` unless it is the input as it was given."""
    rows = x.flatten(2).transpose(1, 2)  # b p c
    if not is_given or is_channels_last(x):
        y = F.linear(rows, weight, bias)
    elif rows.shape[0] == 1:
        y = F.linear(rows.squeeze(0), weight, bias).unsqueeze(0)
    else:
        y = torch.bmm(rows, weight.T.expand(rows.shape[0], -1, -1))
        y = y if bias is None else y + bias
    return y.transpose(1, 2).unflatten(2, x.shape[2:])


def _format_of(n_axes: int) -> torch.memory_format:
    return torch.channels_last_3d if n_axes == 3 else torch.channels_last


def is_channels_last(x: Tensor) -> bool:
    """Whether an input lies with its channels innermost, and not as torch lays them out otherwise."""
    if x.ndim == 3:
        return not x.is_contiguous() and x.transpose(1, 2).is_contiguous()
    return not x.is_contiguous() and x.is_contiguous(memory_format=_format_of(x.ndim - 2))


def _last_convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions, groups: int, *, packed: bool
) -> Tensor:
    """A convolution with channels innermost; one along a single axis as one of a plane."""
    if x.ndim == 3:
        plane = options if options.n_axes == 2 else options.as_plane()
        return _last_convolved(x.unsqueeze(2), weight, bias, plane, groups, packed=packed).squeeze(2)
    x = x.contiguous(memory_format=_format_of(options.n_axes))
    if not packed:
        return options(x, weight, bias, groups)
    y: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
        x, weight, bias, options.padding, options.stride, options.dilation, groups, "none", [], ""
    )
    return y


def _laid_out(weight: Tensor, options: ConvOptions, groups: int, packed: bool) -> Tensor:
    """A kernel for ``_last_convolved``."""
    if weight.ndim == 3:
        return _laid_out(weight.unsqueeze(2), options.as_plane(), groups, packed)
    if not packed:
        return weight.contiguous(memory_format=_format_of(options.n_axes))
    pack: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    kernel: Tensor = pack(weight.contiguous().to_mkldnn(), options.padding, options.stride, options.dilation, groups)
    return kernel


def can_pack(options: ConvOptions, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the library keeps kernels of such a convolution in its own layout."""
    if device.type != "cpu" or dtype != torch.float32 or options.is_transposed or options.n_axes == 3:
        return False
    if options.padding_mode != "zeros" or isinstance(options.padding, str):
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    known = hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    return known and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
