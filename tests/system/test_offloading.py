"""Weights that lie in files while a large model is worked on."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from torch import nn

from tensortrain.system import offloading, parking
from tensortrain.system.offloading import bring_back, is_offloaded, offload, weights_offloaded
from tensortrain.system.parking import is_parked, memory_given_back, memory_reused


@pytest.fixture(autouse=True)
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "LARGE_BYTES", 0)
    monkeypatch.setattr(parking, "_WORTH_BYTES", 1)
    monkeypatch.setattr(parking, "_WORTH_THE_PAGES", 0)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5, bias=False))


def test_a_model_computes_the_same_from_files_and_is_the_same_object_all_along() -> None:
    model, x = net(), torch.randn(3, 7)
    before = list(model.parameters())
    with torch.no_grad():
        wanted = model(x)
        with weights_offloaded(model):
            assert all(map(is_parked, model.parameters()))
            assert torch.equal(model(x), wanted)
            assert torch.equal(model(x), wanted)  # from memory that was given back in between
            bring_back(model)
        assert torch.equal(model(x), wanted)
    assert not any(map(is_parked, model.parameters()))
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


def test_memory_is_given_back_after_the_forward_of_every_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model, gone = net(), []
    monkeypatch.setattr(offloading, "let_go", lambda *tensors: gone.extend(map(id, tensors)))
    with weights_offloaded(model):
        model(torch.randn(3, 7))
    assert gone == [id(p) for p in model.parameters()]
    model(torch.randn(3, 7))
    assert len(gone) == 3  # the hook is gone


def test_after_an_error_all_is_in_memory_as_it_was() -> None:
    model = net()
    wanted = [p.detach().clone() for p in model.parameters()]

    def fail() -> None:
        with weights_offloaded(model):
            model[2] = nn.Linear(9, 4)
            offload(model[2])
            assert is_offloaded(model[2])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not any(map(is_parked, model.parameters()))
    assert torch.equal(model[0].weight, wanted[0])


def test_what_shares_its_memory_stays() -> None:
    model = net()
    twin = nn.Linear(7, 9)
    twin.weight.data = model[0].weight.data
    model.append(twin)
    model.loose = model[2].weight.detach()[:2]
    with weights_offloaded(model):
        assert [is_parked(p) for p in model.parameters()] == [False, True, False, False, True]
        assert twin.weight.data_ptr() == model[0].weight.data_ptr()
        bring_back(model)


def test_some_modules_keep_theirs() -> None:
    model = nn.Sequential(net(), nn.ParameterList([nn.Parameter(torch.ones(40))]))
    with weights_offloaded(model, but_not=lambda module: module is model):
        assert not is_offloaded(model)
        assert is_offloaded(model[0][0])
        bring_back(model)


def test_gradients_come_as_from_memory() -> None:
    model, x = net(), torch.randn(3, 7)
    model(x).square().sum().backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad()
    with weights_offloaded(model):
        model(x).square().sum().backward()
        bring_back(model)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), wanted, strict=True))


def test_a_small_model_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "LARGE_BYTES", 2**27)
    model = net()
    with weights_offloaded(model):
        assert not any(map(is_parked, model.parameters()))


@pytest.mark.parametrize("own", [False, True])
def test_the_allocator_is_set_once_and_not_where_the_user_did(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(parking, "_mallopt", lambda: lambda *args: calls.append(args))
    for name in parking._OWN_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000")
    weights = list(net().parameters())
    with memory_given_back(weights), memory_given_back(weights):
        inside = list(calls)
    assert [value for _, value in inside] == ([] if own else [2**20, 2**20])
    assert [value for _, value in calls[2:]] == ([] if own else [2**25, 2**26])


@pytest.mark.parametrize("own", [False, True])
def test_freed_memory_is_kept_for_a_small_model_alone(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(parking, "_mallopt", lambda: lambda *args: calls.append(args))
    for name in parking._OWN_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    weights = list(net().parameters())
    with memory_reused(weights):  # large to this module's tests
        assert not calls
    monkeypatch.setattr(parking, "_WORTH_THE_PAGES", 2**20)
    with memory_reused(weights), memory_reused(weights):
        inside = list(calls)
    assert [value for _, value in inside] == ([] if own else [0, 2**31 - 1])
    assert [value for _, value in calls[2:]] == ([] if own else [2**16, 2**25, 2**26])


@pytest.mark.skipif(not sys.platform.startswith("linux") or parking._mallopt() is None, reason="of GNU's allocator")
def test_blocks_of_any_size_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    for name in parking._OWN_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(parking, "_WORTH_THE_PAGES", 2**20)

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.zeros(2**26, dtype=torch.uint8)
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    with memory_reused(net().parameters()):
        faults()
        again = faults()
    assert again < 2**26 // mmap.PAGESIZE
