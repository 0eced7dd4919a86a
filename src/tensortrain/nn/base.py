"""What every factorized layer has in common: cores as parameters, a derived dense weight, counts, a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from tensortrain.errors import DerivedWeightError, KindError, ShapeError
from tensortrain.formats import PLAIN, FactorSpec, Fit, Format, Rank, Weighting, WeightShape, get_format
from tensortrain.system.tracing import is_traced

from .cores import Cores, held_cores, list_cores
from .derived import read_only
from .inputs import Traced
from .kept import forget_kept_ways, kept_bytes, told_spec
from .runner import DENSE_LIMIT_BYTES, Runner

__all__ = ["FactorizedLayer", "Implementation"]

Implementation = Literal["auto", "factorized", "dense"]
Init = Literal["match", "glorot", "he", "structured"] | float | None
Self = TypeVar("Self", bound="FactorizedLayer")
_OF_BEFORE = ("_plans", "_cache", "_static_plan", "_static_shape", "_way", "_way_options", "_stand_ins")


class FactorizedLayer(Traced):
    """Base of the layers whose weight is a product of small cores.

    Attributes:
        spec: Format, modes and ranks.
        cores: The parameters, laid out as ``spec.core_shapes``.
        runner: How the layer runs.
        implementation: ``"auto"`` runs whatever is predicted fastest and may keep a dense weight of at most
            ``dense_limit_bytes``; ``"factorized"`` never builds one; ``"dense"`` always does.
        dense_limit_bytes: Largest dense weight that ``"auto"`` builds: a 64th of the machine's memory, at least 16 MiB.
            Weights above 16 MiB that all layers keep together take up to an eighth of the memory; tables of embeddings
            above 16 MiB are not kept by default. Set it on a layer or on this class.
        may_time_plans: Whether the first call at a size runs the likeliest plans a few times and keeps the fastest;
            else the predicted times decide. Set it on a layer or on this class.
    """

    dense_limit_bytes: int = DENSE_LIMIT_BYTES
    may_time_plans: bool = True
    dense_type: ClassVar[type[nn.Module]]
    torch_arguments: ClassVar[tuple[str, ...]]  # attributes that torch's layer and this one share
    has_bias: ClassVar[bool] = True
    stand_ins: list[Tensor] | None = None  # for the time of one forward, what is computed from the cores

    def __init__(
        self,
        spec: FactorSpec,
        *,
        bias: int | None,
        init: Init,
        implementation: Implementation,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if implementation not in get_args(Implementation):
            raise ShapeError(
                f"implementation must be one of {get_args(Implementation)}: found {implementation!r}. Pass 'auto'."
            )
        self.implementation = implementation
        self.take_spec(spec)
        empty = [torch.empty(shape, device=device, dtype=dtype) for shape in spec.core_shapes]
        self.cores: nn.ParameterList = Cores(nn.Parameter(core) for core in empty)
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.empty(bias, device=device, dtype=dtype))
        if init is not None:
            self.reset_parameters(init)

    # -- parameters ----------------------------------------------------------------------------------

    def reset_parameters(self, init: Init = "match", generator: torch.Generator | None = None) -> None:
        """Draw cores anew, so that the dense weight has the variance that ``init`` names.

        ``"match"`` is the variance of torch's own layer, ``"glorot"`` is ``2 / (fan_in + fan_out)``,
        ``"he"`` is ``2 / fan_in``, a number is the standard deviation itself. ``"structured"`` scales every core
        by its own fans instead (``Format.core_fans``).
        """
        cores = self.core_list()
        if init == "structured":
            self.format.init_structured_(cores, self.spec, generator)
        else:
            self.format.init_(cores, self.spec, _sigma(self, init), generator)
        if len(self.cores._parameters) != len(cores):
            self.cores.assign_(cores)  # type: ignore[operator]  # constrained cores, see orthogonal.py
        if self.bias is not None and not self.bias.is_meta:
            bound = 1 / math.sqrt(max(1, self.spec.weight.fan_in))
            with torch.no_grad():
                self.bias.uniform_(-bound, bound, generator=generator)

    def _matching_sigma(self) -> float:
        return 1 / math.sqrt(3 * max(1, self.spec.weight.fan_in))  # torch draws from U(+-1/sqrt(fan_in))

    # -- to and from torch's layers ------------------------------------------------------------------

    @classmethod
    def weight_shape_of(cls, layer: Any) -> WeightShape:
        """Format-free shape of the weight of a layer, torch's or this one's."""
        raise NotImplementedError

    @classmethod
    def kernel_of(cls, layer: Any) -> Tensor:
        """The dense weight of such a layer, torch's or factorized, laid out as formats take it; no gradient."""
        return _full_weight_of(layer).detach()

    @classmethod
    def arguments_of(cls, layer: Any) -> dict[str, Any]:
        """The torch arguments that build a layer like this one, torch's or factorized."""
        arguments = {name: getattr(layer, name) for name in cls.torch_arguments}
        return {**arguments, "bias": layer.bias is not None} if cls.has_bias else arguments

    @classmethod
    def like(
        cls: type[Self],
        dense: Any,
        spec: FactorSpec,
        *,
        implementation: Implementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer with the options of ``dense`` and the cores of ``spec``, not filled in."""
        how: dict[str, Any] = {"implementation": implementation, "device": device, "dtype": dtype}
        return cls._made(**cls.arguments_of(dense), **spec.keywords(), init=None, **how)

    @classmethod
    def _made(cls: type[Self], **arguments: Any) -> Self:
        """A layer of the kind that this class builds."""
        return cls(**arguments)

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
    ) -> Self:
        """Approximate a trained torch layer; without ``rank`` and ``eps`` exact to dtype.

        Args:
            dense: The layer; it is not changed. Options, dtype, device, mode and ``requires_grad`` carry over.
            format: Name of a weight format.
            rank: Caps on the ranks: number, tuple, share of the dense parameters in (0, 1], or ``"same"``.
            eps: Relative tolerance on the weight (on the output, where ``input_gram`` is given).
            in_modes, out_modes: Mode shapes; balanced ones when left out.
            input_gram: Second moment of the inputs, ``(N, N)`` or its diagonal ``(N,)``; for convolutions of
                the patches as ``torch.nn.functional.unfold`` orders them; for embeddings token counts.
            output_gram: Weight of the outputs, ``(M, M)`` or ``(M,)``, such as the second moment of gradients.

        Raises:
            KindError: ``dense`` is a layer of another kind.
            NonFiniteError: The weight holds NaN or Inf.
            ShapeError: Modes that do not fit, an unknown format.
            RankError: A rank below one or a share outside (0, 1].

        Source: TT-SVD: Oseledets 2011; whitening: arXiv:2403.07378.
        """
        cls._check_dense_type(dense)
        spec, eps = get_format(format).asked(
            cls.weight_shape_of(dense), dense.weight.dtype, rank=rank, eps=eps, out_modes=out_modes, in_modes=in_modes
        )
        weighting = Weighting(input_gram, output_gram)
        return cls.from_spec(dense, spec, eps=eps, weighting=weighting, implementation=implementation)

    @classmethod
    def from_spec(
        cls: type[Self],
        dense: Any,
        spec: FactorSpec,
        *,
        eps: float | None = None,
        weighting: Weighting = PLAIN,
        implementation: Implementation = "auto",
    ) -> Self:
        """Approximate a trained torch layer by cores of a spec, as a plan gives it; ``from_dense`` takes words.

        Args:
            dense: As for ``from_dense``.
            spec: Format, modes and ranks of the layer's weight.
            eps: Relative tolerance, for which the spec's ranks are caps.
            weighting: Second moments of inputs and outputs that weigh the error.

        Raises:
            KindError, NonFiniteError, ShapeError: As ``from_dense``.
        """
        cls._check_dense_type(dense)
        found = get_format(spec.format).fit(cls.kernel_of(dense), spec, eps=eps, weighting=weighting)
        return cls._of_fit(found, dense, implementation)

    @classmethod
    def _of_fit(cls: type[Self], found: Fit, dense: Any, implementation: Implementation) -> Self:
        """The layer of cores that were fitted to a dense one."""
        weight = dense.weight
        layer = cls.like(dense, found.spec, implementation=implementation, device=weight.device, dtype=weight.dtype)
        return layer._adopt(found, dense)

    @classmethod
    def _check_dense_type(cls, dense: object) -> None:
        if not isinstance(dense, cls.dense_type):
            raise KindError(
                f"{cls.__name__}.from_dense takes a torch.nn.{cls.dense_type.__name__}: found "
                f"{type(dense).__name__}. Pass the torch layer (a factorized layer's to_dense() gives it)."
            )

    def _adopt(self: Self, found: Fit, dense: Any) -> Self:
        """Take over cores, bias and manners of a dense layer."""
        with torch.no_grad():
            for core, value in zip(self.cores, found.cores, strict=True):
                core.copy_(value)
                core.requires_grad_(dense.weight.requires_grad)
        _copy_bias(dense, self)
        return self.train(dense.training)

    def to_dense(self) -> Any:
        """The plain torch layer with the same weight."""
        core = self.cores[0]
        dense: Any = self.dense_type(**self.arguments_of(self), device=core.device, dtype=core.dtype)
        with torch.no_grad():
            dense.weight.copy_(self.full_weight())
        dense.weight.requires_grad_(core.requires_grad)
        _copy_bias(self, dense)
        return dense.train(self.training)

    # -- what it is ----------------------------------------------------------------------------------

    @property
    def format(self) -> Format:
        """The weight format, which knows how to use the cores."""
        return get_format(self.spec.format)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks, with the boundary ones where the format has them."""
        return self.spec.ranks

    @property
    def in_modes(self) -> tuple[int, ...]:
        """Factors of the inputs of one group (vocabulary of an embedding)."""
        return self.spec.in_modes

    @property
    def out_modes(self) -> tuple[int, ...]:
        """Factors of the outputs of one group (dimension of an embedding)."""
        return self.spec.out_modes

    @property
    def weight(self) -> Tensor:
        """The dense weight in torch's layout, built from the cores: a copy to read, which refuses to be written to."""
        weight = self.full_weight()
        if is_traced():
            return weight
        # Where it follows from several trained cores, neither the cache nor a core holds its memory.
        return read_only(weight, is_shared=not weight.requires_grad or len(self.cores) == 1)

    def full_weight(self) -> Tensor:
        """The weight as others see it; not to be written to, since it may lie in the cache."""
        return self.runner.dense_weight(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise DerivedWeightError(
                "the weight of a factorized layer must be changed through its cores: layer.weight was assigned to, but "
                "it is made from layer.cores. Make a new layer with from_dense, and put that in this one's place."
            )
        super().__setattr__(name, value)

    @property
    def n_params(self) -> int:
        """Parameters of this layer, the bias included."""
        return sum(p.numel() for p in self.parameters())

    @property
    def n_core_params(self) -> int:
        """Stored numbers of the cores alone; constrained cores have fewer than ``spec`` says."""
        return sum(p.numel() for p in self.cores.parameters())

    @property
    def compression(self) -> float:
        """Parameters of the dense layer over those of this one, the bias included on both sides."""
        bias = 0 if self.bias is None else self.bias.numel()
        return (self.spec.weight.n_params + bias) / self.n_params

    @property
    def resident_cache_bytes(self) -> int:
        """Bytes of derived weights that the layer keeps at present."""
        return self.runner.cache.nbytes + kept_bytes(list(self.cores.parameters()))

    def config(self) -> dict[str, Any]:
        """Constructor arguments as plain data, without the cores."""
        return {
            **self.arguments_of(self),
            **self.spec.keywords(),
            "implementation": self.implementation,
        }

    def how_it_ran(self) -> str:
        """How each plan made for inference so far runs, such as ``"dense kept; right-to-left [0][1 2]"``."""
        without_plans = "dense, kept" if self.runner.cache.nbytes else "core by core"
        return "; ".join(self.runner.words()) or without_plans

    def _format_repr(self) -> str:
        ranks = ",".join(str(r) for r in self.spec.ranks)
        return (
            f"format={self.spec.format}, in_modes={self.in_modes}, out_modes={self.out_modes}, ranks=({ranks}), "
            f"params={self.n_params:,} ({self.compression:.4g}x smaller)"
        )

    # -- how it runs ---------------------------------------------------------------------------------

    def take_spec(self, spec: FactorSpec) -> None:
        """Become a layer of this spec; the cores are not touched."""
        self.spec, self._group_spec = spec, spec.one_group()
        self._told_spec = told_spec(spec)
        self.runner = self._make_runner()

    def _make_runner(self) -> Runner:
        """A runner of what carries the layer's product."""
        return Runner(self.format.contraction(self._group_spec))

    def core_list(self) -> list[Tensor]:
        """The cores of this forward pass: what stands in for them, what hooks on their list gave, or the parameters."""
        if self.stand_ins is not None:
            return self.stand_ins
        return held_cores(self) or list_cores(self.cores)

    def plan_cores(self) -> list[Tensor]:
        """The same, laid out as plans take them."""
        return self.format.to_chain(self.core_list(), self.spec)

    @property
    def kept_limit_bytes(self) -> int:
        """Largest dense weight that ``"auto"`` keeps for a layer of this kind."""
        return self.dense_limit_bytes

    def build_weight(self) -> Tensor:
        """The dense weight that the cores make, in torch's layout; see ``Runner.dense_weight``, which keeps it."""
        return self.placed(self.format.to_dense(self.core_list(), self.spec)).contiguous()

    def placed(self, weight: Tensor) -> Tensor:
        """A dense weight as cores make it, with its channels where the layer has them."""
        return weight

    def clear_cache(self) -> None:
        """Drop derived weights. Needed only after cores were changed behind autograd's back (``.data``)."""
        self.runner.forget()
        forget_kept_ways(list(self.cores.parameters()))

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.clear_cache()  # torch may swap parameters, which nothing may hold weakly then
        result = super()._apply(fn, recurse)
        self.clear_cache()  # another device or dtype: other plans
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.clear_cache()
        super()._load_from_state_dict(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "runner" not in self.__dict__:  # pickled when plans and weights lay in the layer
            for name in _OF_BEFORE:
                self.__dict__.pop(name, None)
            self.runner = self._make_runner()
        self.__dict__.setdefault("_told_spec", told_spec(self.spec))


def _sigma(layer: FactorizedLayer, init: Init) -> float:
    """The standard deviation of the dense weight's entries that ``init`` names."""
    weight = layer.spec.weight
    if isinstance(init, (int, float)) and 0 <= init < math.inf:
        return float(init)
    if init == "glorot":
        fan_out = weight.out_features // weight.groups * math.prod(weight.kernel)
        return math.sqrt(2 / (weight.fan_in + fan_out))
    if init == "he":
        return math.sqrt(2 / weight.fan_in)
    if init == "match":
        return layer._matching_sigma()
    raise ShapeError(f"init must be 'match', 'glorot', 'he', 'structured' or a number: found {init!r}. Pass 'match'.")


def _full_weight_of(layer: Any) -> Tensor:
    """The dense weight of a layer, torch's or factorized."""
    weight: Tensor = layer.full_weight() if isinstance(layer, FactorizedLayer) else layer.weight
    return weight


def _copy_bias(source: Any, target: Any) -> None:
    if getattr(source, "bias", None) is not None:
        with torch.no_grad():
            target.bias.copy_(source.bias)
        target.bias.requires_grad_(source.bias.requires_grad)


def as_tuple(value: int | Sequence[int], n: int, what: str, *, least: int = 1) -> tuple[int, ...]:
    """A whole number for all axes, or one per axis, each at least ``least``."""
    given = tuple(value) if isinstance(value, Sequence) else (value,) * n
    if len(given) != n or not all(hasattr(v, "__index__") and v >= least for v in given):
        raise ShapeError(
            f"{what} must be one whole number of at least {least}, or {n} of them: found {value!r}. Pass one per axis."
        )
    return tuple(int(v) for v in given)
