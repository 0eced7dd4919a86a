"""Keep what is derived from parameters for as long as the parameters stay as they are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from tensortrain.system.native.load import loaded
from tensortrain.system.tracing import is_traced

__all__ = ["WeightCache", "n_optimizer_steps"]

Derived = TypeVar("Derived", bound="Tensor | tuple[Tensor, ...]")


class _OptimizerSteps:
    """Counts the steps of all optimizers: fused ones write without raising a tensor's version."""

    def __init__(self) -> None:
        self.n_steps = 0
        self._is_listening = False

    def count(self) -> int:
        if not self._is_listening:  # at the first use, since an import sets no global state
            self._is_listening = True
            register_optimizer_step_post_hook(self._increment)
        return self.n_steps

    def _increment(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.n_steps += 1
        kernels = loaded()
        if kernels is not None:
            kernels.count_optimizer_step()


_STEPS = _OptimizerSteps()


def n_optimizer_steps() -> int:
    """Steps that optimizers have made since something was first kept."""
    return _STEPS.n_steps


@dataclass(frozen=True)
class _Stamp:
    """Identifies a tensor and its state; the storage is held so that its address is not reused."""

    tensor: weakref.ReferenceType[Tensor]
    storage: torch.UntypedStorage
    state: tuple[Hashable, ...]


class WeightCache:
    """A derived weight, valid while its sources do not change.

    A source has changed when it is another tensor, was written to in place (as by ``load_state_dict``),
    moved to another dtype, device or memory, or when any optimizer of ``torch.optim`` has made a step.
    A write through ``.data`` leaves no trace in PyTorch; call ``clear`` after one.

    The cache is passed by, and the value built afresh, while gradients to a source are recorded (which
    also clears the cache: the source is about to change), while a program is traced, compiled or
    exported, and for sources that keep no version: inference tensors, tensor subclasses, and the
    wrappers of ``torch.func``. It has no part in ``state_dict``; a copied or unpickled cache is empty.

    Example:
        >>> cache, core = WeightCache(), torch.ones(2)
        >>> first = cache.get([core], lambda: 2 * core)
        >>> cache.get([core], lambda: 2 * core) is first
        True
        >>> _ = core.add_(1)
        >>> cache.get([core], lambda: 2 * core)
        tensor([4., 4.])
    """

    def __init__(self) -> None:
        self._stamps: tuple[_Stamp, ...] = ()
        self._values: dict[Hashable, Tensor | tuple[Tensor, ...]] = {}
        self._optimizer_steps = 0
        self.holder: Any = None  # of the kernels, which keeps the same values and forgets them with this cache

    def get(self, sources: Sequence[Tensor], build: Callable[[], Derived], *, tag: Hashable = None) -> Derived:
        """Return ``build()``, or the value it had when the sources were as they are now.

        Args:
            sources: All tensors that ``build`` reads.
            build: Makes the value: a tensor or a tuple of tensors.
            tag: Tells apart several values of the same sources.
        """
        if is_traced():
            return build()
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            self.clear()
            return build()
        if not self._is_current(sources):
            if not all(type(source) in _PLAIN and not source.is_inference() for source in sources):
                return build()
            stamps = _stamps(sources)
            if stamps is None:
                return build()
            self._stamps, self._values = stamps, {}
            self._optimizer_steps = _STEPS.count()
        key = (tag, _autocast_dtype(sources))
        value: Any = self._values.get(key)
        if value is None:
            # A tensor made in inference mode could not serve a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                value = build()
            if not all(type(part) in _PLAIN for part in _parts(value)):
                return value
            self._values[key] = value
            if self.holder is not None:
                self.holder.note_cached()
        return value

    def peek(self, sources: Sequence[Tensor], tag: Hashable) -> Any:
        """The value kept outside autocast under a tag, or ``None``; what ``get`` does where nothing has changed.

        For the shortest way through a small layer: the caller sees to it that no gradients are recorded and no
        program is traced.
        """
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") or not self._is_current(sources):
            return None
        return self._values.get((tag, None))

    def clear(self) -> None:
        """Forget everything."""
        self._stamps, self._values = (), {}
        if self.holder is not None:
            self.holder.forget_weights()

    @property
    def values(self) -> object:
        """What is kept, as one object: another one, once it was dropped or made anew."""
        return self._values

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the sources themselves."""
        shared = {stamp.storage.data_ptr() for stamp in self._stamps}
        held = {}
        for value in self._values.values():
            for part in _parts(value):
                if part.is_mkldnn:  # a kernel in the library's own layout has no storage to look at
                    held[id(part)] = part.numel() * part.itemsize
                    continue
                storage = part.untyped_storage()
                if storage.data_ptr() not in shared:
                    held[storage.data_ptr()] = storage.nbytes()
        return sum(held.values())

    def _is_current(self, sources: Sequence[Tensor]) -> bool:
        if len(self._stamps) != len(sources) or self._optimizer_steps != _STEPS.n_steps:
            return False
        for stamp, source in zip(self._stamps, sources, strict=True):
            if stamp.tensor() is not source or stamp.state != (source.data_ptr(), source._version):
                return False
        return True

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return (WeightCache, ())


_PLAIN = (Tensor, torch.nn.Parameter)


def _stamps(sources: Sequence[Tensor]) -> tuple[_Stamp, ...] | None:
    try:
        return tuple(_Stamp(weakref.ref(s), s.untyped_storage(), _state(s)) for s in sources)
    except (RuntimeError, NotImplementedError):  # torch.func wrappers have no storage
        return None


def _state(tensor: Tensor) -> tuple[Hashable, ...]:
    # Another dtype, device or layout comes with another tensor or at least another address.
    return tensor.data_ptr(), tensor._version


def _autocast_dtype(sources: Sequence[Tensor]) -> torch.dtype | None:
    if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
        return None
    device_type = sources[0].device.type if sources else "cpu"
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _parts(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
