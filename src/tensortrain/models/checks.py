"""The checks of what comes into a model, each with one error: what must hold, what was found, what to do.

A look at the numbers of a tensor is left out while a program is traced or transformed (``torch.export``, ``vmap``).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from tensortrain.errors import DataError, KindError, RankError
from tensortrain.system.tracing import can_look

__all__ = [
    "chain_ranks",
    "check_between",
    "check_cap",
    "check_choice",
    "check_finite",
    "checked_count",
    "checked_dtype",
    "checked_inputs",
    "checked_labels",
    "checked_sizes",
    "checked_values",
    "lacking",
    "whole",
]


def whole(number: object) -> int | None:
    """A whole number of any library's kind, a boolean apart, as Python's; None for everything else."""
    if isinstance(number, (bool, Tensor)):
        return None
    try:
        return operator.index(number)  # type: ignore[arg-type]
    except TypeError:
        return None


def checked_sizes(*, least: int = 1, **sizes: object) -> tuple[int, ...]:
    """Sizes as Python's numbers, in the order in which they are named.

    Raises:
        RankError: The first one that is no whole number, or below ``least``, by its name.
    """
    found = []
    for name, size in sizes.items():
        number = whole(size)
        if number is None or number < least:
            raise RankError(
                f"sizes must be whole numbers of {least} or more: {name} has {size!r}. Pass {name}={least}, for "
                "instance."
            )
        found.append(number)
    return tuple(found)


def checked_count(n: object, name: str = "n") -> int:
    """How many samples to draw.

    Raises:
        DataError: It is no whole number of 0 or more.
    """
    number = whole(n)
    if number is None or number < 0:
        raise DataError(
            f"a number of samples must be 0 or more: {name} is {n!r}, expected a whole number. Pass how many to draw."
        )
    return number


def check_between(low: float, high: float = math.inf, **numbers: object) -> None:
    """Refuse options that are no finite numbers from ``low`` to ``high``.

    Raises:
        RankError: The first of them, by its name.
    """
    for name, number in numbers.items():
        is_number = isinstance(number, (int, float)) or (isinstance(number, Tensor) and number.ndim == 0)
        if not is_number or not (low <= float(number) <= high and math.isfinite(float(number))):  # type: ignore[arg-type]
            span = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
            raise RankError(
                f"{name} must be a number: it has {number!r}, expected {span}. Leave it out for the default."
            )


def check_cap(ranks: Sequence[int], max_bond: int | None) -> None:
    """Refuse steps at fixed ranks where these are above a cap.

    Raises:
        RankError: They are.
    """
    if max_bond is not None and max(ranks) > max_bond:
        raise RankError(
            f"steps at fixed ranks need ranks within the cap: the model has {max(ranks)} and max_bond is {max_bond}. "
            f"Build the model with bond_dim={max_bond}."
        )


def check_choice(value: object, choices: Sequence[str], name: str) -> None:
    """Refuse an option of no known name.

    Raises:
        KindError: It is none of ``choices``.
    """
    if value not in choices:
        raise KindError(f"{name} must be known: it has {value!r}, expected one of {', '.join(map(repr, choices))}.")


def checked_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of parameters, torch's default one where none is given.

    Raises:
        KindError: It is not real and floating.
    """
    found = torch.get_default_dtype() if dtype is None else dtype
    if not found.is_floating_point:
        also = " Complex amplitudes come with kind='complex'." if found.is_complex else ""
        raise KindError(f"a model takes a real dtype: dtype has {found}, expected such as torch.float32.{also}")
    return found


def chain_ranks(bond_dim: int | Sequence[int], modes: Sequence[int], name: str = "bond_dim") -> tuple[int, ...]:
    """Ranks ``(1, .., 1)`` of a chain: a number is cut to what the modes allow, a sequence is taken as it is.

    Raises:
        RankError: They are below 1, or not as many as the chain has.
    """
    order, number = len(modes), whole(bond_dim)
    if number is not None:
        given = [1, *[number] * (order - 1), 1]
        for k in range(1, order):
            given[k] = min(given[k], given[k - 1] * modes[k - 1])
        for k in reversed(range(1, order)):
            given[k] = min(given[k], given[k + 1] * modes[k])
    else:
        given = _whole_numbers(bond_dim)
        given = given if len(given) == order + 1 else [1, *given, 1]
    if len(given) != order + 1 or min(given) < 1 or given[0] != 1 or given[-1] != 1:
        raise RankError(
            f"a chain must have ranks of 1 or more between its {order} sites: {name} has {bond_dim!r}, expected a "
            f"number or {order - 1} of them. Pass one number for all bonds."
        )
    return tuple(given)


def _whole_numbers(given: object) -> list[int]:
    """The numbers of a sequence; 0, which no rank is, in place of what is none."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        return [0]
    return [whole(one) or 0 for one in given]


def checked_values(x: object, n_sites: int, n_values: int, *, least: int = 0, name: str = "x") -> Tensor:
    """Whole numbers ``(b, n_sites)`` from ``least`` to ``n_values - 1``.

    Raises:
        DataError: It is anything else.
    """
    what = f"{name} must hold values of {n_sites} sites"
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        found, way = (str(x.dtype), f"{name}.long()") if isinstance(x, Tensor) else _made_tensor(x, name)
        raise DataError(f"{what}: it has {found}, expected an int64 tensor (b, {n_sites}). Convert it with {way}.")
    if x.ndim != 2 or x.shape[1] != n_sites:
        raise DataError(f"{what}: it has shape {tuple(x.shape)}, expected (b, {n_sites}). Put samples along axis 0.")
    if can_look(x) and x.numel():
        low, high = (int(v) for v in torch.aminmax(x))
        if low < least or high >= n_values:
            also = ", or -1 where a site is left open" if least < 0 else ""
            raise DataError(
                f"{what}: it has numbers from {low} to {high}, expected 0 to {n_values - 1}{also}. Number the values "
                "from 0, and give the model as many n_values as there are."
            )
    return x.long()


def _made_tensor(x: object, name: str) -> tuple[str, str]:
    """What something is called, and what makes a tensor of it."""
    return type(x).__name__, f"torch.as_tensor({name})"


def checked_labels(y: object, n_samples: int, n_classes: int) -> Tensor:
    """Class numbers ``(b,)`` int64.

    Raises:
        DataError: It is anything else.
    """
    is_whole = isinstance(y, Tensor) and not (y.is_floating_point() or y.is_complex())
    if not isinstance(y, Tensor) or not is_whole or tuple(y.shape) != (n_samples,):
        found = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise DataError(
            f"labels must be class numbers, one for each sample: y has {found}, expected int64 of shape "
            f"({n_samples},). Pass y.argmax(1) of labels that are one-hot."
        )
    if y.numel():
        low, high = (int(v) for v in torch.aminmax(y))
        if low < 0 or high >= n_classes:
            raise DataError(
                f"labels must lie in their range: y has numbers from {low} to {high}, expected 0 to {n_classes - 1}. "
                "Number the classes from 0, and give the model as many n_classes as there are."
            )
    return y.long()


def checked_inputs(
    x: object, shape: Sequence[int | str], dtype: torch.dtype | None, way: str, *, name: str = "x", finite: bool = True
) -> Tensor:
    """Floating numbers of a shape, in the model's dtype.

    Args:
        shape: A number for each axis of known size; for the others a letter, of which a capital one is not 0.
        dtype: Of the result; None leaves it as it is.
        way: What to do about another shape, for the error.
        finite: Whether NaN and infinite numbers are refused.

    Raises:
        DataError: It is anything else.
    """
    is_right = isinstance(x, Tensor) and x.is_floating_point() and _fits(x.shape, shape)
    if not isinstance(x, Tensor) or not is_right:
        found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        sizes = f"({', '.join(map(str, shape))})"
        is_other = isinstance(x, Tensor) and _fits(x.shape, shape)
        raise DataError(
            f"{name} must hold floating numbers of shape {sizes}: it has {found}, expected {sizes}. "
            f"{f'Convert it with {name}.float()' if is_other else way}."
        )
    if finite and can_look(x):
        check_finite(x, name)
    # Under autocast the products choose their dtype, which a conversion here would undo.
    return x if dtype is None or x.dtype == dtype or torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def _fits(sizes: Sequence[int], shape: Sequence[int | str]) -> bool:
    if len(sizes) != len(shape):
        return False
    return all(
        size == one if isinstance(one, int) else (size > 0 or not one.isupper())
        for size, one in zip(sizes, shape, strict=True)
    )


def check_finite(x: Tensor, name: str = "x", way: str = "Leave these samples out, or fill") -> None:
    """Refuse NaN and infinite numbers.

    Raises:
        DataError: There are some.
    """
    if not bool(torch.isfinite(x).all()):
        raise DataError(f"{name} must be finite: it has NaN or Inf, expected numbers. {way}.")


def lacking(x: Tensor, missing: object) -> Tensor | None:
    """Where a feature is missing, ``(b, n_features)`` bool; None where none is said to be.

    Args:
        missing: A mask like that, or ``"nan"``: where ``x`` is NaN.

    Raises:
        DataError: The mask is not for ``x``.
        KindError: Another word.
    """
    if missing is None or not isinstance(x, Tensor):
        return None
    if isinstance(missing, str):
        check_choice(missing, ("nan",), "missing")
        return x.isnan()
    if not isinstance(missing, Tensor) or missing.shape != x.shape or missing.dtype != torch.bool:
        found = f"{missing.dtype} of shape {tuple(missing.shape)}" if isinstance(missing, Tensor) else repr(missing)
        raise DataError(
            f"missing features must be marked one by one: missing has {found}, expected bool of shape "
            f"{tuple(x.shape)}. Pass x.isnan(), or missing='nan'."
        )
    return missing
