"""Whether numbers may decide what a program does: not where somebody records or transforms it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tensortrain.system.tracing import can_look, is_traced, is_transformed


def test_plain_tensors_may_be_looked_at() -> None:
    assert can_look(torch.ones(2))
    assert not is_traced()
    assert not is_transformed()


def test_meta_tensors_have_no_numbers() -> None:
    assert not can_look(torch.ones(2, device="meta"))


def test_not_while_a_program_is_recorded() -> None:
    seen: list[tuple[bool, bool]] = []

    def program(x: Tensor) -> Tensor:
        seen.append((can_look(x), is_traced()))
        return x + 1

    make_fx(program)(torch.ones(2))
    torch.jit.trace(program, torch.ones(2), check_trace=False)
    assert seen
    assert set(seen) == {(False, True)}


def test_not_under_transforms() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    def program(x: Tensor) -> Tensor:
        seen.append((can_look(x), is_traced(), is_transformed()))
        return x.square().sum()

    torch.func.vmap(program)(torch.ones(3, 2))
    torch.func.grad(program)(torch.ones(2))
    assert seen == [(False, False, True)] * 2
