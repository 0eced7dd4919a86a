"""The dense weight that is made from cores: to be read, and not to be written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tensortrain.errors import DerivedWeightError

__all__ = ["DerivedWeight", "read_only"]


def _refuse(what: str) -> NoReturn:
    raise DerivedWeightError(
        f"the weight of a factorized layer must be changed through its cores: {what} would write to the dense weight, "
        "which is made from them and kept nowhere. Change layer.cores, or make a new layer with from_dense."
    )


class DerivedWeight(Tensor):
    """A dense weight made from cores: a copy to read. Writing to it raises ``DerivedWeightError``.

    Whatever is computed from it is a plain tensor; views of it, ``.data`` and ``.detach()`` cannot be written to
    either. ``clone()`` gives a tensor to write to, and ``nn.Parameter(layer.weight)`` a parameter.
    """

    # As Parameter: no function of torch makes a detour for it, so that fused paths are taken as for a plain tensor.
    __torch_function__: Any = torch._C._disabled_torch_function_impl
    _may_require_grad = False

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        # nn.Parameter(weight) marks what detach() gave: from here on it is a parameter like any other.
        if value:
            self.__class__ = nn.Parameter  # type: ignore[assignment]

    def detach(self) -> Tensor:
        found = _as_derived(super().detach())
        found._may_require_grad = True
        return found

    @property
    def data(self) -> Tensor:
        return _as_derived(super().detach())

    @data.setter
    def data(self, value: Tensor) -> None:
        _refuse("assigning to .data")

    @property
    def requires_grad(self) -> bool:
        found: bool = Tensor.requires_grad.__get__(self)  # type: ignore[attr-defined]
        return found

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        if not self._may_require_grad:
            raise DerivedWeightError(
                "whether a factorized layer is trained must be told to its cores: requires_grad of the dense weight "
                f"made from them was set to {requires_grad}. Use layer.cores.requires_grad_({requires_grad})."
            )
        return super().requires_grad_(requires_grad)

    def numpy(self, **options: Any) -> Any:
        found = self.as_subclass(Tensor).numpy(**options)
        found.setflags(write=False)
        return found

    def __array__(self, *args: Any, **options: Any) -> Any:
        found = self.as_subclass(Tensor).__array__(*args, **options)
        found.setflags(write=False)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))


def read_only(weight: Tensor, *, is_shared: bool) -> Tensor:
    """A dense weight to hand out: a copy where others hold its memory too, and nothing that can be written to."""
    return _as_derived(weight.clone() if is_shared else weight)


def _as_derived(tensor: Tensor) -> Any:
    return tensor.as_subclass(DerivedWeight)


def _writer(name: str) -> Callable[..., NoReturn]:
    def write(self: Tensor, *args: Any, **options: Any) -> NoReturn:
        _refuse(f"{name}()" if name.isidentifier() and not name.startswith("__") else name.strip("_"))

    write.__name__ = name
    return write


def _viewer(name: str) -> Callable[..., Any]:
    look = getattr(Tensor, name)

    def view(self: Tensor, *args: Any, **options: Any) -> Any:
        return _wrapped(look(self, *args, **options), self)

    view.__name__ = name
    return view


def _wrapped(found: Any, weight: Tensor) -> Any:
    """What shares memory with the weight cannot be written to either."""
    if isinstance(found, (tuple, list)):
        return type(found)(_wrapped(one, weight) for one in found)
    if not isinstance(found, Tensor) or isinstance(found, DerivedWeight):
        return found
    return _as_derived(found) if found.untyped_storage()._cdata == weight.untyped_storage()._cdata else found


_HARMLESS = ("requires_grad_", "share_memory_")
_VIEWS = (
    *("__getitem__", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "contiguous"),
    *("t", "transpose", "swapaxes", "swapdims", "adjoint", "permute", "movedim", "moveaxis", "squeeze", "unsqueeze"),
    *("narrow", "select", "diagonal", "expand", "expand_as", "chunk", "split", "unbind", "tensor_split", "unfold"),
    *("to", "cpu", "cuda", "float", "double", "half", "bfloat16", "type", "type_as", "as_strided"),
)


def _finish_class() -> None:
    for name in dir(Tensor):
        is_writer = name.endswith("_") and not name.startswith("_") and name not in _HARMLESS
        is_operator = name.startswith("__i") and name.endswith("__") and f"__{name[3:]}" in dir(Tensor)
        if (is_writer or is_operator or name == "__setitem__") and callable(getattr(Tensor, name)):
            setattr(DerivedWeight, name, _writer(name))
    for name in _VIEWS:
        setattr(DerivedWeight, name, _viewer(name))
    for name in ("T", "mT", "H", "mH", "real"):
        setattr(DerivedWeight, name, property(_viewer_of_attribute(name)))


def _viewer_of_attribute(name: str) -> Callable[[Tensor], Any]:
    look = getattr(Tensor, name).__get__
    return lambda self: _wrapped(look(self), self)


_finish_class()
