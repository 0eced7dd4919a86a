"""Higher-order cells whose steps the kernels take: the same numbers and gradients as step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tensortrain.models import Forecaster, HOTTLSTMCell, HOTTRNNCell
from tensortrain.models.cell_steps import Course, _step_by_step, taken
from tensortrain.system.native import library, python_only

needs_kernels = pytest.mark.skipif(library() is None, reason="the kernels are not built")
KINDS = ["lstm", "tanh", "relu", "sigmoid", None]


def cell_of(kind: str | None, size: int = 3, *, inputs: int = 2, **options: Any) -> HOTTLSTMCell | HOTTRNNCell:
    generator = torch.Generator().manual_seed(0)
    options = {"n_lags": 2, "degree": 3, "rank": 2, "dtype": torch.float64, "generator": generator} | options
    if kind == "lstm":
        return HOTTLSTMCell(inputs, size, **options)
    return HOTTRNNCell(inputs, size, activation=kind, **options)


def drawn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) / 2


def jobs(kind: str | None, degree: int, n_lags: int, size: int, batch: int, n_steps: int) -> tuple[Course, list[Any]]:
    """A course, and everything that ``taken`` gets."""
    cell = cell_of(kind, size, n_lags=n_lags, degree=degree)
    with torch.no_grad():
        for core in cell.cores:
            core *= 0.5  # what is linear in its output must not grow from step to step
    gates, n_read = cell.n_gates * size, max(1, n_steps // 3)
    c = drawn(batch, size, seed=3).requires_grad_() if kind == "lstm" else None
    feed = (drawn(size, gates, seed=4) / size).requires_grad_()
    own = (drawn(n_steps - n_read, batch, seed=5) > 0).double()
    given = [drawn(batch, n_steps, gates).requires_grad_(), drawn(batch, n_lags, size, seed=2).requires_grad_(), c]
    return Course(kind, n_read), [*given, feed, own, *cell.cores]


def gradients(found: Any, inputs: list[Any]) -> tuple[Tensor, ...]:
    needed = [one for one in inputs if one is not None and one.requires_grad]
    total = sum((drawn(*one.shape, seed=9) * one).sum() for one in found if one is not None)
    return torch.autograd.grad(total, needed, materialize_grads=True, allow_unused=True)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "degree,n_lags,size,batch,n_steps",
    [(1, 1, 3, 1, 1), (1, 2, 9, 5, 4), (2, 3, 4, 3, 7), (3, 2, 17, 7, 40), (4, 1, 2, 2, 3), (2, 4, 16, 64, 6)],
)
def test_one_call_is_its_steps(kind: str | None, degree: int, n_lags: int, size: int, batch: int, n_steps: int) -> None:
    course, tensors = jobs(kind, degree, n_lags, size, batch, n_steps)
    gates, lags, c, feed, own, *cores = tensors
    found, exact = taken(course, gates, lags, c, cores, feed, own), _step_by_step(course, *tensors)
    with torch.no_grad():
        without = taken(course, gates, lags, c, cores, feed, own)
    for one, other, plain in zip(found, exact, without, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(plain, other, rtol=1e-11, atol=1e-12)
    for one, other in zip(gradients(found, tensors), gradients(exact, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@needs_kernels
def test_threads_do_not_change_a_digit() -> None:
    course, tensors = jobs("lstm", 2, 3, 16, 37, 20)
    gates, lags, c, feed, own, *cores = tensors
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            once = taken(course, gates, lags, c, cores, feed, own)
            found.append((once.states.detach(), *gradients(once, tensors)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["lstm", "tanh", "sigmoid", None])
def test_gradients_of_any_order(kind: str | None) -> None:
    cell = cell_of(kind, 2, degree=2)
    x, lags, c = (drawn(*shape).requires_grad_() for shape in ((3, 2), (3, 2, 2), (3, 2)))
    state: Any = (lags, c) if kind == "lstm" else lags
    tensors = (x, lags, c, *cell.parameters()) if kind == "lstm" else (x, lags, *cell.parameters())

    def run(*_: Tensor) -> Any:
        return cell(x, state)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_gradients_of_a_forecast() -> None:
    model = Forecaster(cell_of("lstm", 2, degree=2), 2)
    x = drawn(2, 3, 2).requires_grad_()
    tensors = (x, *model.parameters())
    assert torch.autograd.gradcheck(lambda *_: model(x, 3), tensors)
    assert torch.autograd.gradgradcheck(lambda *_: model(x, 3), tensors)


@needs_kernels
@pytest.mark.parametrize("kind", ["lstm", "relu"])
@pytest.mark.parametrize("has_known", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_forecast_in_one_call(kind: str, has_known: bool, dtype: torch.dtype) -> None:
    model = Forecaster(cell_of(kind, 5, inputs=3, dtype=dtype), 1 if has_known else 3)
    x, following = drawn(4, 6, 3, dtype=dtype), drawn(4, 5, model.output_size, seed=2, dtype=dtype)
    for share in (0.0, 0.5):
        for horizon in (1, 5):
            options = {"known": drawn(4, horizon, 2, seed=3, dtype=dtype)} if has_known else {}
            torch.manual_seed(0)
            found = model(x, horizon, following=following, share=share, **options)
            torch.manual_seed(0)
            with python_only():
                exact = model(x, horizon, following=following, share=share, **options)
            torch.testing.assert_close(found, exact)
            of_found, of_exact = (
                torch.autograd.grad(one.square().sum(), tuple(model.parameters())) for one in (found, exact)
            )
            torch.testing.assert_close(of_found, of_exact, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_a_forecast_of_a_cell_that_reads_nothing_of_its_own() -> None:
    model, x = Forecaster(cell_of("tanh", 4), 1), drawn(3, 5, 2)
    with python_only():
        exact = model(x, 6)
    torch.testing.assert_close(model(x, 6), exact)


def test_hooks_see_every_step() -> None:
    model, x, seen = Forecaster(cell_of("lstm"), 2), drawn(2, 4, 2), []
    plain = model(x, 3)
    handle = model.cell.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x, 3), plain)
    assert len(seen) == 6
    handle.remove()
    model.output.register_forward_hook(lambda *_: seen.append(1))
    model(x, 3)
    assert len(seen) == 9


def test_layouts_and_empty_batches() -> None:
    cell, x = cell_of("lstm"), drawn(2, 6, seed=4).T
    lags, c = drawn(2, 3, 6, seed=5).permute(2, 0, 1), drawn(3, 6, seed=6).T
    found = cell(x, (lags, c))
    exact = cell(x.contiguous(), (lags.contiguous(), c.contiguous()))
    assert all(torch.equal(one, other) for one, other in zip(found, exact, strict=True))
    lags, c = cell(x[:0])
    assert lags.shape == (0, 2, 3)
    assert c.shape == (0, 3)
    assert Forecaster(cell, 2)(drawn(0, 4, 2), 3).shape == (0, 3, 2)


def test_what_was_given_out_may_be_written_to() -> None:
    cell, x = cell_of("lstm"), drawn(4, 2)
    lags, c = cell(x, (drawn(4, 2, 3), drawn(4, 3)))
    (lags.square().sum() + c.sum()).backward()
    expected = [one.grad.clone() for one in cell.parameters()]
    cell.zero_grad()
    lags, c = cell(x, (drawn(4, 2, 3), drawn(4, 3)))
    total = lags.square().sum() + c.sum()
    with torch.no_grad():
        c.zero_()
    total.backward()
    for one, grad in zip(cell.parameters(), expected, strict=True):
        torch.testing.assert_close(one.grad, grad)


@pytest.mark.parametrize("kind", ["lstm", "tanh"])
def test_transforms_see_the_steps(kind: str) -> None:
    model, x = Forecaster(cell_of(kind), 2), drawn(3, 4, 2)
    parameters = {name: one.detach() for name, one in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], series: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (series[None], 3)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    model(x, 3).square().sum().backward()
    for name, one in model.named_parameters():
        torch.testing.assert_close(each[name].sum(0), one.grad)


def test_a_program_has_the_steps() -> None:
    model, x = Forecaster(cell_of("lstm"), 2), drawn(3, 4, 2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, 3), model(x, 3))


def test_autocast_and_bfloat16_go_step_by_step() -> None:
    model = Forecaster(cell_of("lstm", dtype=torch.float32), 2)
    x = drawn(3, 4, 2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x, 3)
    assert found.dtype == torch.bfloat16
    assert (found.float() - model(x, 3)).abs().max() < 0.05
    assert (model.bfloat16()(x.bfloat16(), 3).float() - found.float()).abs().max() < 0.1
