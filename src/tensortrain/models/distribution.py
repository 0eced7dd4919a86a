"""A Born machine as one of ``torch.distributions``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from tensortrain.errors import DataError
from tensortrain.models.lengths import is_ended

if TYPE_CHECKING:
    from tensortrain.models.born import BornMachine

__all__ = ["BornDistribution"]

_MOST_STRINGS = 1 << 20  # that are written out


class BornDistribution(Distribution):
    """A Born machine in the manner of ``torch.distributions``: events are strings ``(n_sites,)``.

    Samples of a batch, after ``expand``, are independent. Strings are discrete: there is no ``rsample``.

    Args:
        model: The machine; its parameters are looked at when a method is called.
        batch_shape: Of independent copies.

    Example:
        >>> law = BornMachine(4).distribution()
        >>> law.sample((2, 3)).shape, law.log_prob(law.sample((2, 3))).shape
        (torch.Size([2, 3, 4]), torch.Size([2, 3]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_enumerate_support = True

    def __init__(self, model: BornMachine, batch_shape: Any = ()) -> None:
        self.model = model
        super().__init__(torch.Size(batch_shape), torch.Size([model.n_sites]), validate_args=False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model.extra_repr()}, batch_shape={tuple(self.batch_shape)})"

    @property
    def support(self) -> Any:
        """Whole numbers from 0 to ``n_values - 1`` at every site; of ``variable_length`` nothing follows an end."""
        numbers = constraints.integer_interval(0, self.model._n_symbols - 1)
        end = self.model.end
        return constraints.independent(numbers, 1) if end is None else _Ended(numbers, end)

    def expand(self, batch_shape: Any, _instance: Any = None) -> BornDistribution:
        """Independent copies."""
        new = self._get_checked_instance(BornDistribution, _instance)
        BornDistribution.__init__(new, self.model, batch_shape)
        return new

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Independent strings ``(*sample_shape, *batch_shape, n_sites)``, by torch's own generator."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.model.sample(shape[:-1].numel()).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Logarithms of probabilities, in nats, of strings ``(.., n_sites)``.

        Raises:
            DataError: The last axis is no string, or the others do not fit the batch.
        """
        n_sites = self.model.n_sites
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[-1] != n_sites:
            told = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise DataError(
                f"an event must be a string: value has {told}, expected (.., {n_sites}). Put the sites along the last "
                "axis."
            )
        found = self.model.log_prob(value.reshape(-1, n_sites)).reshape(value.shape[:-1])
        try:
            return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))
        except RuntimeError:
            raise DataError(
                f"events must fit the batch: value has shape {tuple(value.shape)}, expected (.., "
                f"{', '.join(map(str, self.batch_shape))}, {n_sites}). Expand the law to another batch_shape."
            ) from None

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All strings, ``(strings, *batch_shape, n_sites)``, the last site fastest; up to about a million of them.

        Raises:
            NotImplementedError: There are more.
        """
        model = self.model
        if model._n_symbols**model.n_sites > _MOST_STRINGS:
            raise NotImplementedError(
                f"all strings can be written out where they are few: there are {model._n_symbols}^{model.n_sites}, "
                f"expected {_MOST_STRINGS} or fewer. Draw some with sample."
            )
        numbers = torch.arange(model._n_symbols, device=model.cores[0].device)
        every = torch.cartesian_prod(*[numbers] * model.n_sites).reshape(-1, model.n_sites)
        if model.end is not None:
            every = every[is_ended(every, model.end)]
        apart = every.reshape(-1, *[1] * len(self.batch_shape), model.n_sites)
        return apart.expand(-1, *self.batch_shape, -1) if expand else apart

    def entropy(self) -> Tensor:
        """Shannon's entropy of the law, in nats, ``batch_shape``, exactly, from all strings; see ``enumerate_support``.

        That of longer strings is about ``-law.log_prob(law.sample((n,))).mean()``. Entanglement across one bond is
        ``model.entropy(bond)``, at any length.

        Raises:
            NotImplementedError: There are too many strings.
        """
        every = BornDistribution(self.model).enumerate_support()
        log = self.model.log_prob(every)
        is_there = log > -torch.inf
        return -(log.exp() * log.where(is_there, 0.0)).sum().expand(self.batch_shape)


class _Ended(constraints.Constraint):
    """Strings whose values are among some numbers, with nothing behind an end."""

    is_discrete = True
    event_dim = 1

    def __init__(self, numbers: constraints.Constraint, end: int) -> None:
        self.numbers, self.end = numbers, end
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Which strings are."""
        fits: Tensor = self.numbers.check(value).all(-1)
        return fits & is_ended(value.reshape(-1, value.shape[-1]), self.end).reshape(value.shape[:-1])
