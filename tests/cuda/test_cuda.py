"""On a CUDA device: the results of the CPU, and results that lie on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.contract import measure_cost_model, use_cost_model
from tensortrain.formats import format_names
from tensortrain.testing import rel_error

pytestmark = pytest.mark.cuda

SHAPE, RANK = (4, 5, 6, 3), 4


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def _train(seed: int = 0, dtype: torch.dtype = torch.float64) -> tt.TensorTrain:
    return tt.randn(SHAPE, RANK, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _matrix(seed: int = 0) -> tt.TTMatrix:
    return tt.randn_matrix(SHAPE, SHAPE, 3, generator=torch.Generator().manual_seed(seed))


TRAIN_WORK: dict[str, Callable[[Any, Any, Any], Any]] = {
    "dense": lambda x, y, a: x.to_dense(),
    "sum": lambda x, y, a: (x + y).to_dense(),
    "product": lambda x, y, a: (x * y).to_dense(),
    "rounded": lambda x, y, a: (x + x + y).round(eps=1e-10).to_dense(),
    "rounded by sketches": lambda x, y, a: tt.round_tt(x + y, max_rank=8, method="randomized").value.to_dense(),
    "norm": lambda x, y, a: x.norm(),
    "log norm": lambda x, y, a: x.log_norm(),
    "dot": lambda x, y, a: tt.dot(x, y),
    "sums": lambda x, y, a: x.sum(dim=(0, 2)).to_dense(),
    "indexed": lambda x, y, a: x[1:, :, [0, 2], 1].to_dense(),
    "entries set": lambda x, y, a: x.at[0, 1, 2, 0].set(7.0).to_dense(),
    "permuted": lambda x, y, a: x.permute(2, 0, 3, 1).to_dense(),
    "reshaped": lambda x, y, a: x.reshape(20, 18).to_dense(),
    "orthogonalized": lambda x, y, a: x.orthogonalize(2).to_dense(),
    "matrix times train": lambda x, y, a: (a @ x).to_dense(),
    "matrix times matrix": lambda x, y, a: (a @ a.T).to_dense(),
    "fitted product": lambda x, y, a: tt.matmul(a, x, eps=1e-10).value.to_dense(),
    "hadamard": lambda x, y, a: tt.hadamard(x, y, eps=1e-10).value.to_dense(),
    "entropy": lambda x, y, a: x.normalize().entropy(2),
    "tangent": lambda x, y, a: tt.manifold.project(y, at=x).value.to_dense(),
    "gradient": lambda x, y, a: tt.manifold.riemannian_grad(lambda z: tt.dot(z, z), x).value.to_dense(),
    "hessian": lambda x, y, a: tt.manifold.hvp(lambda z: tt.dot(z, z), x, y).value.to_dense(),
}


@pytest.mark.parametrize("name", TRAIN_WORK)
def test_trains(name: str) -> None:
    x, y, a = _train(0), _train(1), _matrix(2)
    expected = TRAIN_WORK[name](x, y, a)
    found = TRAIN_WORK[name](x.to("cuda"), y.to("cuda"), a.to("cuda"))
    assert found.is_cuda
    assert rel_error(found.cpu(), expected) <= 1e-9


@pytest.mark.parametrize("method", ["auto", "svd", "gram", "qr", "randomized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_decompositions_keep_their_promise(method: str, dtype: torch.dtype) -> None:
    x = torch.randn(12, 10, 9, 8, dtype=dtype, device="cuda") * 1e-4
    x += _outer(x)
    found = tt.tt_svd(x, eps=1e-2, method=method)
    assert found.value.cores[0].is_cuda
    exact = rel_error(found.value.to_dense().to(torch.complex128), x.to(torch.complex128))
    assert exact <= float(found.rel_error_bound) <= 1e-2 * (1 + 1e-6)


def _outer(x: Tensor) -> Tensor:
    parts = [torch.randn(n, dtype=x.dtype, device=x.device) for n in x.shape]
    return torch.einsum("i,j,k,l->ijkl", *parts)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", sorted(format_names()))
def test_linear_layers_of_every_format(name: str, training: bool) -> None:
    try:
        layer = tt.nn.Linear(24, 36, format=name, rank=2)
    except ValueError as error:
        pytest.skip(str(error))
    x = torch.randn(5, 24)
    _same_on_the_gpu(layer, x, training)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "conv1d": (lambda: tt.nn.Conv1d(4, 6, 3, rank=2, padding=1), lambda: torch.randn(2, 4, 9)),
    "conv2d tt": (lambda: tt.nn.Conv2d(4, 6, 3, rank=2, stride=2), lambda: torch.randn(2, 4, 9, 9)),
    "conv2d tucker2": (lambda: tt.nn.Conv2d(4, 6, 3, format="tucker2", rank=2), lambda: torch.randn(2, 4, 9, 9)),
    "conv2d cp": (lambda: tt.nn.Conv2d(4, 6, 3, format="cp", rank=2), lambda: torch.randn(2, 4, 9, 9)),
    "conv transposed": (lambda: tt.nn.ConvTranspose2d(4, 6, 3, rank=2), lambda: torch.randn(2, 4, 5, 5)),
    "embedding": (lambda: tt.nn.Embedding(103, 12, rank=3, padding_idx=0), lambda: torch.randint(103, (4, 7))),
    "bag": (lambda: tt.nn.EmbeddingBag(103, 12, rank=3, mode="mean"), lambda: torch.randint(103, (4, 7))),
    "lstm": (lambda: tt.nn.LSTM(8, 12, rank=2, compress="both"), lambda: torch.randn(5, 3, 8)),
    "gru": (lambda: tt.nn.GRU(8, 12, rank=2, batch_first=True), lambda: torch.randn(3, 5, 8)),
    "large linear": (lambda: tt.nn.Linear(1024, 1024, rank=8), lambda: torch.randn(64, 1024)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, training: bool) -> None:
    make, example = LAYERS[name]
    _same_on_the_gpu(make(), example(), training)


def _same_on_the_gpu(layer: nn.Module, x: Tensor, training: bool) -> None:
    layer.train(training)
    expected, grads = _run(layer, x, training)
    layer.to("cuda")
    found, grads_there = _run(layer, x.cuda(), training)
    assert found.is_cuda
    assert rel_error(found.cpu(), expected) <= 1e-10
    for mine, theirs in zip(grads_there, grads, strict=True):
        assert rel_error(mine.cpu(), theirs) <= 1e-9


def _run(layer: nn.Module, x: Tensor, training: bool) -> tuple[Tensor, list[Tensor]]:
    with torch.set_grad_enabled(training):
        for _ in range(2):  # the second call reads what the first one kept
            y = layer(x)
            y = y[0] if isinstance(y, tuple) else y
    params = list(layer.parameters())
    return y.detach(), list(torch.autograd.grad(y.square().sum(), params)) if training else []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_low_precision(dtype: torch.dtype) -> None:
    layer = tt.nn.Linear(256, 256, rank=8, dtype=torch.float32).cuda()
    x = torch.randn(32, 256, dtype=torch.float32, device="cuda")
    expected = layer(x)
    with torch.autocast("cuda", dtype=dtype):
        found = layer(x)
    assert found.dtype == dtype
    assert rel_error(found.float(), expected) <= 3e-2
    low = layer.to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    assert rel_error(low.float(), expected) <= 3e-2


def test_compiled() -> None:
    layer = tt.nn.Linear(64, 64, rank=4, dtype=torch.float32).cuda()
    x = torch.randn(8, 64, dtype=torch.float32, device="cuda")
    compiled = torch.compile(layer, fullgraph=True)
    assert rel_error(compiled(x), layer(x)) <= 1e-5
    compiled(x).sum().backward()


def test_made_on_the_device() -> None:
    layer = tt.nn.Conv2d(4, 8, 3, rank=2, device="cuda")
    assert all(core.is_cuda for core in layer.parameters())
    with torch.device("cuda"):
        assert tt.nn.Linear(8, 8, rank=2).cores[0].is_cuda
        assert tt.randn((3, 4), 2).cores[0].is_cuda
    assert tt.nn.Linear.from_dense(nn.Linear(24, 36, device="cuda"), rank=3).cores[0].is_cuda


def test_costs_are_measured() -> None:
    model = measure_cost_model("cuda")
    with use_cost_model(model):
        plan = tt.nn.Linear(4096, 4096, rank=16, dtype=torch.float32, device="cuda").plan(64)
    assert 1e-7 < plan.predicted_s < 1e-2


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.hidden = nn.Linear(16 * 64, 256)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.norm(self.conv(x)).relu().flatten(1)).relu())


def _data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(32, 1, 8, 8, dtype=torch.float32), torch.randint(10, (32,))) for _ in range(8)]


def test_compress_heal_and_save(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    model = _Net().cuda()
    result = tt.compress(model, budget=0.3, data=_data(), heal={"epochs": 1}, measure=True)
    assert all(value.is_cuda for value in result.model.parameters())
    assert 0.28 * result.report.params_before <= result.report.params_after <= 0.3 * result.report.params_before
    x = _data()[0][0].cuda()
    result.model.eval()
    tt.save_pretrained(result.model, tmp_path / "model")
    loaded = tt.load_pretrained(tmp_path / "model", model=_Net().cuda()).eval()
    assert torch.equal(loaded(x), result.model(x))
    assert "cuda" in str(result.report.to_json()).lower()


def test_data_on_the_device_and_accuracy() -> None:
    torch.set_default_dtype(torch.float32)
    data = [(x.cuda(), y.cuda()) for x, y in _data()]
    result = tt.compress(_Net().cuda(), budget="4x", data=data, heal=False)
    assert result.model(data[0][0]).is_cuda
