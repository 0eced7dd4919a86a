"""How much each input and output of a weight counts: the norm in which its error is measured.

For a linear map ``y = W x`` with input second moment ``H = E[x x^T]`` the mean squared output error of a
replacement ``W'`` is ``tr((W - W') H (W - W')^T)``. Outputs can be weighted likewise: with ``F = E[g g^T]``, ``g``
the gradient of the model's output with respect to the layer's, ``tr(F (W - W') H (W - W')^T)`` predicts the change of
the model's output (the Kronecker-factored curvature of Martens and Grosse, ICML 2015, arXiv:1503.05671).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from tensortrain.cores.tolerance import compute_dtype
from tensortrain.errors import DTypeError, NonFiniteError, ShapeError
from tensortrain.system.parking import is_parked, let_go

from .layout import order_gram, pad_gram
from .spec import WeightShape

__all__ = ["PLAIN", "Weighting", "apply_root", "check_gram", "energy", "output_error", "times_moment"]

T = TypeVar("T")

_LARGE = 512  # inputs
_AT_ONCE = 2**20  # numbers of a weight that are held several times
_SOME_PARTS = 4  # of fewer it is not worth the while
_TINY = 1e-300  # what a vanishing weight is divided by


@dataclass(frozen=True, eq=False)
class Weighting:
    """Second moments that weigh the error of a weight; with none of the inputs all entries count alike.

    Attributes:
        inputs: Second moment of the inputs, ``(N, N)`` or its diagonal ``(N,)``, with ``N`` the fan-in (convolutions:
            channel slowest, as ``torch.nn.functional.unfold`` orders a patch; embeddings: how often each id is met).
        outputs: Weight of the outputs beside that of the inputs, ``(M, M)`` or ``(M,)``, such as the second moment of
            the gradients that reach them.
        basis: ``(r, N)`` orthonormal: directions that the inputs lie in, where these are few.
        outside: Share of their mean square that an input may have in any other direction all the same.

    Example:
        >>> change, weight = torch.tensor([[0.0, 2.5]]), torch.tensor([[3.0, 4.0]])
        >>> Weighting().rel_error(change, weight), Weighting(torch.tensor([1.0, 0.0])).rel_error(change, weight)
        (0.5, 0.0)
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None
    basis: Tensor | None = field(default=None, kw_only=True)
    outside: float = field(default=0.0, kw_only=True)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is weighed; outputs are only where inputs are."""
        return self.inputs is None

    def beside(self, dense: Tensor) -> Weighting:
        """The moments on the device of a weight.

        Raises:
            DTypeError: The weight is complex.
        """
        if self.inputs is None:
            return PLAIN
        if dense.is_complex():
            raise DTypeError(
                f"only real weights can be weighted by a second moment: found {dense.dtype}. Leave it out."
            )
        inputs = self.inputs.to(dense.device)
        outputs = None if self.outputs is None else self.outputs.to(dense.device)
        same = inputs is self.inputs and outputs is self.outputs
        return (
            self if same else replace(self, inputs=inputs, outputs=outputs)
        )  # what follows from the moments stays known

    def checked(self, weight: WeightShape) -> Weighting:
        """The moments in float64.

        Raises:
            ShapeError: They do not have the sizes of the weight.
            NonFiniteError: They hold NaN or Inf.
        """
        if self.inputs is None:
            return PLAIN
        sizes = (weight.fan_in, weight.out_features)
        if self._derived.get("sizes") == sizes:
            return self
        found: Weighting | None = self._derived.get(sizes)
        if found is None:
            inputs = check_gram(self.inputs, weight.fan_in)
            outputs = None if self.outputs is None else check_gram(self.outputs, weight.out_features, "output")
            if inputs is self.inputs and outputs is self.outputs:
                self._derived["sizes"] = sizes
                return self
            found = self._derived[sizes] = replace(self, inputs=inputs, outputs=outputs)
            found._derived["sizes"] = sizes
        return found

    @cached_property
    def keeps_directions(self) -> bool:
        """Whether what a decomposition of a weight finds is kept, see ``keep_directions``."""
        return False

    @cached_property
    def _derived(self) -> dict[Any, Any]:
        """What follows from the moments, which are not written to: looked at once for all formats that ask."""
        return {}

    def forget(self) -> None:
        """Drop what follows from the moments, which is several times as large and holds on to them."""
        self.forget_shapes()
        self._kept.clear()

    def forget_shapes(self) -> None:
        """Drop the moments as formats see them, whatever weight they weigh; what was found of a weight stays."""
        for one in self._derived.values():
            if isinstance(one, Weighting) and one is not self:
                one.forget()
        self._derived.clear()

    def forget_norms(self) -> None:
        """Drop the norms of single mode shapes: each holds a weight as it is seen in it."""
        for key, one in list(self._derived.items()):
            if isinstance(one, Weighting) and one is not self:
                one.forget_norms()
            elif isinstance(key, tuple) and key[0] == "norm":
                del self._derived[key]

    def of_matrix(self, weight: WeightShape, n_outputs: int, n_inputs: int) -> Weighting:
        """Checked, in the order of the matrix's rows and columns and padded like it (see ``weight_to_matrix``)."""
        found = self.checked(weight)
        if found.inputs is None:
            return found
        key = (weight, n_outputs, n_inputs)
        if key not in found._derived:
            outputs = None if found.outputs is None else pad_gram(found.outputs, n_outputs)
            found._derived[key] = Weighting(order_gram(found.inputs, weight, n_inputs), outputs)
        ordered: Weighting = found._derived[key]
        return ordered

    def of_channels(self, weight: WeightShape) -> tuple[Tensor, Tensor]:
        """Partial traces of a convolution's checked moment: ``(C, C)`` over positions, ``(L, L)`` over channels.

        Diagonals of a diagonal.
        """
        found = self.checked(weight)
        assert found.inputs is not None
        key = ("of_channels", weight.in_features)
        if key not in found._derived:
            sides = (weight.in_features, weight.fan_in // weight.in_features)
            blocks = found.inputs.reshape(sides * found.inputs.ndim)
            if found.inputs.ndim == 1:
                found._derived[key] = blocks.sum(1), blocks.sum(0)
            else:
                channels = blocks.diagonal(dim1=1, dim2=3).sum(-1)
                found._derived[key] = channels, blocks.diagonal(dim1=0, dim2=2).sum(-1)
        traces: tuple[Tensor, Tensor] = found._derived[key]
        return traces

    def times_inputs(self, weight: Tensor) -> Tensor:
        """``W H`` in float64, ``(outputs, inputs)`` in torch's order; kept until another weight is asked for."""
        if self.inputs is None or self.inputs.ndim == 1 or weight.is_inference():
            return times_moment(weight, self.inputs)
        # In the weight's own precision, beyond which it is not known: half the memory.
        dtype = _at_least_float32(weight)
        return self.found_of(weight, "product", lambda: times_moment(weight, self.inputs).to(dtype)).double()

    @cached_property
    def _kept(self) -> dict[str, Any]:
        """What was last found of a weight, by name, each with that weight: its product with the inputs' moment, .."""
        return {}

    def found_of(self, weight: Tensor, name: str, find: Callable[[], T]) -> T:
        """What was found of a weight before, or is found now and kept until it is asked for of another one.

        Args:
            name: Tells what was found from other things.
        """
        if weight.is_inference() or self.inputs is None:
            return find()
        kept = self._kept.get(name)
        if kept is None or not kept[0].is_of(weight):
            kept = self._kept[name] = _Seen.of(weight), find()
        found: T = kept[1]
        return found

    def keep_directions(self) -> None:
        """Let those who decompose a weight keep what they find until they are asked for it at another rank."""
        if self.inputs is not None:
            self.__dict__["keeps_directions"] = True

    def energy(self, matrix: Tensor, *, weighted: Tensor | None = None) -> float:
        """``tr(F W H W^T)`` of ``(outputs, inputs)``: the mean square of the outputs, weighted by ``F``.

        Args:
            weighted: ``W H``, where it is known.
        """
        if weighted is None and self.goes_in_parts(matrix):
            return math.fsum(part.energy(some) for part, some in self._in_parts(matrix))
        weighted = times_moment(matrix, self.inputs) if weighted is None else weighted
        outputs = None if self.inputs is None else self.outputs
        return max(0.0, float((weighted * times_moment(matrix.T, outputs).T).sum()))

    def energy_of_weight(self, weight: Tensor) -> float:
        """The same of a weight that is asked for several times."""

        def find() -> float:
            return self.energy(weight, weighted=None if self.goes_in_parts(weight) else self.times_inputs(weight))

        return self.found_of(weight, "energy", find)

    def goes_in_parts(self, matrix: Tensor) -> bool:
        """Whether a matrix is large, and its outputs or its inputs count one by one."""
        if self.inputs is None or _counts_alone(self.outputs):
            n_parts = matrix.shape[0]
        else:
            n_parts = matrix.shape[1] if _counts_alone(self.inputs) else 1
        return matrix.numel() > _SOME_PARTS * _AT_ONCE and n_parts > 1

    def _in_parts(self, matrix: Tensor) -> Iterator[tuple[Weighting, Tensor]]:
        """Parts of a matrix whose energies add up to that of the whole."""
        if self.inputs is None or _counts_alone(self.outputs):
            n = max(1, _AT_ONCE // matrix.shape[1])
            for k, rows in enumerate(matrix.split(n)):
                outputs = None if self.outputs is None else self.outputs[k * n : k * n + len(rows)]
                yield replace(self, outputs=outputs), rows
            return
        n = max(1, _AT_ONCE // matrix.shape[0])
        for k, columns in enumerate(matrix.split(n, dim=1)):
            yield replace(self, inputs=self.inputs[k * n : k * n + columns.shape[1]]), columns

    def size(self, matrix: Tensor) -> float:
        """``||F^(1/2) W H^(1/2)||``."""
        if self.inputs is None:
            return float(torch.linalg.vector_norm(matrix, dtype=compute_dtype(matrix.dtype)))
        return math.sqrt(self.energy(matrix))

    def rel_error(self, difference: Tensor, matrix: Tensor) -> float:
        """``||F^(1/2) D H^(1/2)|| / ||F^(1/2) W H^(1/2)||``: relative error of a change ``D`` to ``W``."""
        if self.inputs is None:
            size = torch.linalg.vector_norm(matrix).clamp_min(_TINY)
            return float(torch.linalg.vector_norm(difference) / size)
        return math.sqrt(self.energy(difference) / max(self.energy_of_weight(matrix), _TINY))


@dataclass(frozen=True)
class _Seen:
    """A tensor as it was: held with its version, so that its memory is nobody else's and what was written shows."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Seen:
        return cls(tensor, tensor._version)

    def is_of(self, other: Tensor) -> bool:
        """Whether another one has the same numbers, as a copy of a model has."""
        one = self.tensor
        if (one.shape, one.stride(), one.dtype, one.device) != (other.shape, other.stride(), other.dtype, other.device):
            return False
        if other.is_inference() or one._version != self.version:
            return False
        is_here = one.data_ptr() == other.data_ptr() and other._version == self.version
        return is_here or torch.equal(one, other)


def _counts_alone(moment: Tensor | None) -> bool:
    return moment is None or moment.ndim == 1


def _at_least_float32(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def times_moment(matrix: Tensor, moment: Tensor | None) -> Tensor:
    """``W H`` in float64; a large product of a float32 matrix is computed in float32, as exactly as it is known."""
    if moment is None:
        return matrix.double()
    if moment.ndim == 2 and matrix.dtype == torch.float32 and len(moment) >= _LARGE:
        parts = moment.split(_LARGE) if is_parked(moment) else (moment,)
        return torch.cat([_times_part(matrix, some) for some in parts], dim=1).double()
    return apply_root(matrix.double(), moment)


def _times_part(matrix: Tensor, some: Tensor) -> Tensor:
    """A matrix times some of the rows of a symmetric moment, as columns; a part that lies in a file goes at once."""
    product = matrix @ some.float().mT
    let_go(some)
    return product


PLAIN = Weighting()


def energy(matrix: Tensor, gram: Tensor, output_gram: Tensor | None = None) -> float:
    """``tr(F W H W^T)``: the mean square of the outputs, weighted by ``F``."""
    return Weighting(gram, output_gram).energy(matrix)


def output_error(difference: Tensor, matrix: Tensor, gram: Tensor, output_gram: Tensor | None = None) -> float:
    """``||F^(1/2) D H^(1/2)|| / ||F^(1/2) W H^(1/2)||``: relative error of a change ``D`` to ``W`` (out, in)."""
    return Weighting(gram, output_gram).rel_error(difference, matrix)


def check_gram(gram: Tensor, size: int, side: str = "input") -> Tensor:
    """The second moment as float64, full ``(N, N)`` or diagonal ``(N,)``.

    Raises:
        ShapeError: It does not have ``N`` rows.
        NonFiniteError: It holds NaN or Inf.
    """
    if gram.shape not in ((size,), (size, size)):
        own = "x x^T over the layer's own inputs" if side == "input" else "g g^T over the gradients of its outputs"
        raise ShapeError(
            f"an {side} second moment must be (N, N) or its diagonal (N,): found {tuple(gram.shape)}, expected "
            f"N = {size}. Sum {own}."
        )
    # A sum is finite only where all of it is, unless it overflows; and takes half the time.
    if not math.isfinite(float(gram.sum())) and not bool(torch.isfinite(gram).all()):
        raise NonFiniteError(f"an {side} second moment must be finite: found NaN or Inf. Check the calibration data.")
    return gram.double()


def apply_root(matrix: Tensor, root: Tensor) -> Tensor:
    """``matrix @ root`` for a full or a diagonal root, in the precision of the matrix."""
    root = root.to(matrix.dtype)
    return matrix * root if root.ndim == 1 else matrix @ root
