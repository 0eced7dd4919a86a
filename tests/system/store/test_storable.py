"""What is written can be read; what could not is refused before anything is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import tensortrain as tt
from tensortrain.errors import CheckpointError
from tensortrain.io import load_pretrained, save_pretrained
from tensortrain.system.store.recipe import dtype_names

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3))


def factorized(model: nn.Sequential | None = None) -> nn.Sequential:
    model = model or dense()
    model[0] = tt.nn.Linear.from_dense(model[0], rank=3)
    return model.eval()


def with_buffer(value: Tensor) -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("extra", value)
    return model


def bits(tensor: Tensor) -> Tensor:
    plain = tensor.resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", list(dtype_names()), ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.randint(0, 2, (2 * 3 * dtype.itemsize,), dtype=torch.uint8).view(dtype).reshape(2, 3)
    for name, one in {
        "plain": value,
        "transposed": value.t(),
        "scalar": value[0, 0].clone(),
        "empty": value[:0],
    }.items():
        save_pretrained(with_buffer(one), tmp_path / name)
        again = load_pretrained(tmp_path / name, with_buffer(torch.empty_like(one)))
        assert again.extra.shape == one.shape
        assert torch.equal(bits(again.extra), bits(one))


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64).conj(),
        torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64).conj().imag,
        torch.ones(1).expand(4),
    ],
    ids=["not finite", "conjugate", "negative view", "expanded"],
)
def test_odd_tensors_keep_their_values(tmp_path: Path, value: Tensor) -> None:
    save_pretrained(with_buffer(value), tmp_path / "m")
    again = load_pretrained(tmp_path / "m", lambda: with_buffer(torch.zeros(value.shape, dtype=value.dtype)))
    assert torch.equal(bits(again.extra), bits(value))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sparse": (lambda: with_buffer(torch.eye(3).to_sparse()), "extra has layout torch.sparse_coo"),
    "compressed": (lambda: with_buffer(torch.eye(3).to_sparse_csr()), "extra has layout"),
    "quantized": (
        lambda: with_buffer(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
        "extra is quantized",
    ),
    "half complex": (lambda: with_buffer(torch.ones(3, dtype=torch.complex32)), "extra has torch.complex32"),
    "scales": (lambda: with_buffer(torch.ones(3).to(torch.float8_e8m0fnu)), "extra has torch.float8_e8m0fnu"),
    "reserved name": (lambda: _named("__metadata__"), "found __metadata__"),
    "name of no text": (lambda: _named("\ud800"), r"found '\\ud800'"),
    "pruned cores": (lambda: _pruned(0), r"prune\.remove\(model\.get_submodule\('0\.cores'\), '0'\)"),
    "pruned layer": (lambda: _pruned(1), r"prune\.remove\(model\.get_submodule\('1'\), 'weight'\)"),
    "parametrized cores": (lambda: _parametrized(), "those of '0' are constrained"),
    "cores of two dtypes": (lambda: _edited(lambda m: m[0].cores[0].data.double()), "must have one dtype"),
    "cores of another shape": (lambda: _edited(lambda m: m[0].cores[0].data[..., :2].clone()), "has shape"),
    "NaN among the arguments": (lambda: _with_norm(float("nan")), "a NaN"),
    "object among the arguments": (lambda: _with_norm(object()), "JSON cannot hold"),
}


def _named(name: str) -> nn.Module:
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.ones(2)))
    return model


def _pruned(layer: int) -> nn.Module:
    model = factorized()
    prune.l1_unstructured(*((model[0].cores, "0") if layer == 0 else (model[1], "weight")), amount=0.5)
    return model


def _parametrized() -> nn.Module:
    model = factorized()
    parametrize.register_parametrization(model[0].cores, "0", nn.Identity())
    return model


def _edited(core: Callable[[Any], Tensor]) -> nn.Module:
    model = factorized()
    model[0].cores[0].data = core(model)
    return model


def _with_norm(value: Any) -> nn.Module:
    layer = tt.nn.Embedding(30, 12, rank=2)
    layer.max_norm = value
    return nn.Sequential(layer)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    build, match = REFUSED[name]
    with pytest.raises(CheckpointError, match=match):
        save_pretrained(build(), tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_pruning_made_permanent(tmp_path: Path) -> None:
    model = _pruned(0)
    prune.remove(model[0].cores, "0")
    save_pretrained(model, tmp_path / "m")
    assert torch.equal(load_pretrained(tmp_path / "m", dense)(X), model(X))


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_dense_layers(tmp_path: Path, norm: Callable[[nn.Module], nn.Module]) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(12, 12), norm(nn.Linear(12, 3)))

    model = factorized(build())
    save_pretrained(model, tmp_path / "m")
    for given in (build, build()):
        assert torch.equal(load_pretrained(tmp_path / "m", given)(X), model(X))


def test_sharded_models_are_refused_in_words(tmp_path: Path) -> None:
    distributed = pytest.importorskip("torch.distributed")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not distributed.is_available() or distributed.is_initialized():
        pytest.skip("needs a process group of its own")
    whole = factorized()
    save_pretrained(whole, tmp_path / "m")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = factorized()
        fsdp.fully_shard(model)
        with pytest.raises(CheckpointError, match=r"is sharded \(DTensor\)\. Gather it first.*full_state_dict=True"):
            save_pretrained(model, tmp_path / "n")
        with pytest.raises(CheckpointError, match="is sharded"):
            load_pretrained(tmp_path / "m", model)
    finally:
        distributed.destroy_process_group()
    assert os.listdir(tmp_path) == ["m"]


def test_views_of_one_storage(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            for name, view in {"flat": self.weight.data.view(16), "turned": self.weight.data.t()}.items():
                self.register_buffer(name, view)

    model = Views()
    save_pretrained(model, tmp_path / "m")
    again = load_pretrained(tmp_path / "m", Views)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_names_with_odd_letters_and_numbers_of_numpy(tmp_path: Path) -> None:
    model = nn.Sequential(tt.nn.Linear(12, 12, rank=2))
    model[0].in_features = np.int64(12)
    model.register_buffer('a b\n/ü"\\', torch.ones(2))
    save_pretrained(model, tmp_path / "m")
    other = nn.Sequential(nn.Linear(12, 12))
    other.register_buffer('a b\n/ü"\\', torch.zeros(2))
    assert load_pretrained(tmp_path / "m", other) is other
    model[0].in_features = 12
    assert torch.equal(other(X), model(X))
    assert torch.equal(getattr(other, 'a b\n/ü"\\'), torch.ones(2))


def test_norms_may_be_infinite(tmp_path: Path) -> None:
    model = nn.Sequential(tt.nn.Embedding(30, 12, rank=2, max_norm=1.0, norm_type=float("inf")))
    save_pretrained(model, tmp_path / "m")
    again = load_pretrained(tmp_path / "m", lambda: nn.Sequential(nn.Embedding(30, 12, None, 1.0, float("inf"))))
    assert again[0].norm_type == float("inf")


def test_compiled_model_is_saved_as_the_one_inside(tmp_path: Path) -> None:
    model = factorized()
    save_pretrained(torch.compile(model), tmp_path / "m")
    assert torch.equal(load_pretrained(tmp_path / "m", dense)(X), model(X))
    wrapped = torch.compile(dense())
    assert load_pretrained(tmp_path / "m", wrapped) is wrapped
    assert torch.equal(wrapped._orig_mod(X), model(X))
