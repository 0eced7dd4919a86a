"""Parked tensors are tensors like any other, whose numbers lie in files."""

from __future__ import annotations

import copy
import gc
import os
import pickle

import pytest
import torch
from torch import nn

from tensortrain.system import parking
from tensortrain.system.parking import (
    activations_parked,
    are_large,
    can_park,
    is_parked,
    let_go,
    map_file,
    park,
    park_zeros,
    weights_parked,
)


@pytest.fixture
def all_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "LARGE_BYTES", 0)
    monkeypatch.setattr(parking, "_HELD_BYTES", 0)
    monkeypatch.setattr(parking, "_WORTH_BYTES", 1)


@pytest.mark.parametrize("shape", [(3, 700_000), (7,), (), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64])
def test_a_parked_tensor_has_the_same_numbers(shape, dtype) -> None:
    x = torch.randn(shape, dtype=torch.float64).mul(9).to(dtype)
    parked = park(x)
    assert parked.dtype == dtype
    assert parked.shape == x.shape
    assert torch.equal(parked, x)
    let_go(parked)
    assert torch.equal(parked, x)


def test_what_is_written_stays_when_memory_is_let_go() -> None:
    total = park_zeros((300, 300), torch.float64)
    for _ in range(3):
        total += torch.eye(300)
        let_go(total)
    assert torch.equal(total, 3 * torch.eye(300, dtype=torch.float64))


def test_a_transposed_tensor_is_parked_in_its_order() -> None:
    x = torch.arange(12.0).reshape(3, 4).T
    assert torch.equal(park(x, dtype=torch.float64), x.double())


def test_copies_of_a_parked_tensor_lie_in_memory() -> None:
    parked = park(torch.arange(5.0))
    for copied in (copy.deepcopy(parked), pickle.loads(pickle.dumps(parked)), parked.clone()):
        assert torch.equal(copied, parked)
        assert not is_parked(copied)
    assert is_parked(parked)
    assert is_parked(parked[2:])


def test_nothing_is_left_of_one_that_is_gone() -> None:
    before = len(parking._MAPS)
    parked = park(torch.arange(5.0))
    assert len(parking._MAPS) == before + 1
    del parked
    gc.collect()
    assert len(parking._MAPS) == before


def test_a_named_file_is_read_again(tmp_path) -> None:
    x = torch.randn(40, 3)
    park(x, path=tmp_path / "folder" / "x")
    assert torch.equal(map_file(tmp_path / "folder" / "x", (40, 3), torch.float32), x)
    with pytest.raises(OSError, match="expected"):
        map_file(tmp_path / "folder" / "x", (41, 3), torch.float32)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be taken beforehand here")
def test_a_full_disk_is_an_error_before_anything_is_written(monkeypatch) -> None:
    def full(descriptor: int, start: int, n_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="space"):
        park(torch.zeros(3))


def test_what_cannot_be_parked_stays(all_parked) -> None:
    whole = torch.zeros(8, 8)
    assert can_park(whole)
    odd = [whole[:4], whole.T, torch.zeros(3, device="meta"), whole.to_sparse(), park(whole), torch.zeros(1).expand(9)]
    assert not any(map(can_park, odd))


def test_only_much_together_is_large() -> None:
    assert not are_large([torch.zeros(100)])
    assert are_large([torch.zeros(parking.LARGE_BYTES // 8, device="meta") for _ in range(3)])


def test_gradients_of_parked_activations_are_the_same(all_parked) -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 5), nn.GELU())
    x = torch.randn(4, 6, requires_grad=True)
    (wanted,) = torch.autograd.grad(net(x).square().sum(), x)
    n_parked = 0
    with activations_parked(but_not=net.parameters()):
        y = net(x).square().sum()
        n_parked = len(parking._MAPS)
    (found,) = torch.autograd.grad(y, x)
    assert n_parked > 3
    assert torch.equal(found, wanted)


def test_few_activations_stay_in_memory() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    before = len(parking._MAPS)
    with activations_parked():
        y = x.exp().sum()
    assert len(parking._MAPS) == before
    assert torch.equal(torch.autograd.grad(y, x)[0], x.exp())


def test_weights_are_put_back_into_memory_after_an_error(all_parked) -> None:
    net = nn.Linear(4, 4)
    weight, value = net.weight, net.weight.detach().clone()

    def fail() -> None:
        with weights_parked(net.parameters()) as put:
            put([net.weight])
            assert is_parked(net.weight)
            assert torch.equal(net.weight, value)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert net.weight is weight
    assert not is_parked(weight)
    assert torch.equal(weight, value)


def test_weights_of_a_small_model_are_left_alone() -> None:
    net = nn.Linear(4, 4)
    with weights_parked(net.parameters()) as put:
        put(net.parameters())
    assert not is_parked(net.weight)
