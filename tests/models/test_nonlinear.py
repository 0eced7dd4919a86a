"""Trains with activations: both readings beside loops, the linear ones beside dense tensors."""

from __future__ import annotations

import copy
import itertools
import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from tensortrain.errors import DataError, KindError, RankError, ShapeError
from tensortrain.models import NonlinearTT
from tensortrain.testing import ModelSuite

MODES = (2, 3, 2, 3)


def network(dtype: torch.dtype = torch.float64, **options: object) -> NonlinearTT:
    generator = torch.Generator().manual_seed(0)
    model = NonlinearTT(MODES, 2, **{"rank": 3, **options}, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def activated(model: NonlinearTT, k: int, found: list[Tensor], before: list[Tensor]) -> list[Tensor]:
    if k == len(MODES) - 1:
        return found
    name = model.activation
    function = {"relu": lambda v: v.clamp_min(0), "tanh": torch.tanh, "identity": lambda v: v}.get(name)
    function = function or (lambda v: v * (1 + torch.erf(v / math.sqrt(2))) / 2)
    out = [function(value) for value in found]
    stays = model.residual and len(out) == len(before) and k > 0
    return [a + b for a, b in zip(out, before, strict=True)] if stays else out


def by_chunks(model: NonlinearTT, x: Tensor) -> Tensor:
    """Number by number, for one example."""
    state, start = [torch.ones((), dtype=x.dtype)], 0
    for k, (n, core) in enumerate(zip(MODES, model.cores, strict=True)):
        one = [torch.ones((), dtype=x.dtype)] if model.activation != "identity" else []
        chunk, known = [*x[start : start + n], *one], [*state, *(one if k else [])]
        found = [
            sum(known[a] * chunk[i] * core[a, i, s] for a in range(len(known)) for i in range(len(chunk)))
            for s in range(core.shape[2])
        ]
        state, start = activated(model, k, found, state), start + n
    return torch.stack(state)


def by_modes(model: NonlinearTT, x: Tensor) -> Tensor:
    state = [x.reshape(MODES)]
    for k, core in enumerate(model.cores):
        bias = model.biases[k] if model.activation != "identity" else torch.zeros(core.shape[2])
        found = [
            sum(part[i] * core[a, i, s] for a, part in enumerate(state) for i in range(MODES[k])) + bias[s]
            for s in range(core.shape[2])
        ]
        state = activated(model, k, found, [part.mean(0) for part in state])
    return torch.stack(state)


class NonlinearSuite(ModelSuite):
    options: ClassVar[dict[str, object]] = {}

    def make(self, dtype: torch.dtype) -> NonlinearTT:
        return network(dtype, **self.options)

    def data(self, dtype: torch.dtype) -> Tensor:
        n = self.make(dtype).in_features
        return torch.randn(7, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

    def exact(self, model: NonlinearTT, data: Tensor) -> Tensor:
        one = by_chunks if model.reading == "chunks" else by_modes
        return torch.stack([one(model, x.to(model.cores[0].dtype)).detach() for x in data])

    def bad(self, model: NonlinearTT):
        x = self.data(torch.float32)
        yield DataError, model, (x * torch.nan,)
        yield DataError, model, (x[:, 1:],)
        yield DataError, model, (x[0],)
        yield DataError, model, (x.long(),)
        yield DataError, model, (x.tolist(),)
        yield KindError, network, (), {"activation": "step"}
        yield KindError, network, (), {"reading": "aloud"}
        yield RankError, network, (), {"rank": 0}
        yield RankError, network, (), {"rank": (2, 3)}
        yield ShapeError, NonlinearTT, ((2, 0), 3), {"rank": 2}
        yield ShapeError, NonlinearTT, ((), 3), {"rank": 2}
        yield ShapeError, NonlinearTT, ((2, 2), 0), {"rank": 2}


class TestChunks(NonlinearSuite):
    pass


class TestChunksWithTanh(NonlinearSuite):
    options: ClassVar[dict[str, object]] = {"activation": "tanh", "rank": (3, 4, 2)}


class TestResidualChunks(NonlinearSuite):
    options: ClassVar[dict[str, object]] = {"activation": "gelu", "residual": True, "rank": (2, 3, 3)}


class TestLinearChunks(NonlinearSuite):
    options: ClassVar[dict[str, object]] = {"activation": "identity"}


class TestModes(NonlinearSuite):
    options: ClassVar[dict[str, object]] = {"reading": "modes", "activation": "tanh"}


class TestResidualModes(NonlinearSuite):
    options: ClassVar[dict[str, object]] = {"reading": "modes", "residual": True}


class TestLinearModes(NonlinearSuite):
    options: ClassVar[dict[str, object]] = {"reading": "modes", "activation": "identity"}


def dense_of(model: NonlinearTT) -> Tensor:
    """The train ``(modes .., out_features)``."""
    whole = model.cores[0].detach()[0]
    for core in list(model.cores)[1:]:
        whole = torch.tensordot(whole, core.detach(), dims=1)
    return whole


def test_the_linear_networks_are_those_of_a_train() -> None:
    chunks, modes = (network(activation="identity", reading=reading) for reading in ("chunks", "modes"))
    x = torch.randn(5, 10, dtype=torch.float64)
    expected = torch.einsum("abcdo,za,zb,zc,zd->zo", dense_of(chunks), *x.split(MODES, 1))
    torch.testing.assert_close(chunks(x).detach(), expected)
    y = torch.randn(5, 36, dtype=torch.float64)
    torch.testing.assert_close(modes(y).detach(), y @ dense_of(modes).flatten(0, 3))


@pytest.mark.parametrize("reading", ["chunks", "modes"])
@pytest.mark.parametrize("residual", [False, True])
def test_outputs_neither_fade_nor_grow_at_first(reading: str, residual: bool) -> None:
    modes = (28,) * 28 if reading == "chunks" else (4, 7, 4, 7)
    generator = torch.Generator().manual_seed(0)
    model = NonlinearTT(modes, 10, rank=16, reading=reading, residual=residual, generator=generator)
    x = torch.rand(64, 784, generator=generator)
    x[:, :200] = 0.0
    assert 0.02 < float(model(x).detach().std(0).mean()) < 50
    torch.nn.functional.cross_entropy(model(x), torch.arange(64) % 10).backward()
    sizes = [float(core.grad.norm()) for core in model.cores]
    assert min(sizes) > 1e-4 * max(sizes)


def test_one_core_is_a_linear_layer() -> None:
    model = NonlinearTT((5,), 3, rank=4)
    assert [tuple(core.shape) for core in model.cores] == [(1, 6, 3)]
    x = torch.randn(4, 5)
    weight = model.cores[0][0]
    torch.testing.assert_close(model(x), x @ weight[:5] + weight[5])


@pytest.mark.parametrize("reading", ["chunks", "modes"])
def test_half_precision_export_and_vmap(reading: str) -> None:
    model = network(torch.float32, reading=reading, activation="gelu")
    x = torch.randn(6, model.in_features)
    expected = model(x).detach()
    half = copy.deepcopy(model).bfloat16()(x.bfloat16()).detach()
    assert half.dtype == torch.bfloat16
    assert float((half - expected).abs().max()) < 0.1 * float(expected.abs().max())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float((model(x).detach() - expected).abs().max()) < 0.1 * float(expected.abs().max())
    torch.testing.assert_close(torch.vmap(lambda row: model(row[None])[0])(x).detach(), expected)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x).detach(), expected)
    torch.testing.assert_close(model(x.T.contiguous().T).detach(), expected)


def test_products_of_chunks_are_learned() -> None:
    """The sign of x1 x2 x3: no linear map of the inputs tells it."""
    x = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))
    y = (x.prod(1) > 0).long()
    model = NonlinearTT((1, 1, 1), 2, rank=4, activation="tanh", generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(x).argmax(1) == y).all()
