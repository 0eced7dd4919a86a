"""Parked tensors are tensors like any other, whose numbers lie in files."""

from __future__ import annotations

import copy
import os
import pickle
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tensortrain.system import parking
from tensortrain.system.parking import (
    activations_parked,
    are_large,
    can_park,
    is_parked,
    let_go,
    let_go_after_use,
    let_go_of_all,
    park,
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
    total = park(torch.zeros(300, 300), dtype=torch.float64)
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


def test_no_file_is_seen_and_none_stays_open() -> None:
    folder = Path(tempfile.gettempdir())
    n_open = _n_open()
    parked = [park(torch.arange(5.0)) for _ in range(20)]
    assert all(map(is_parked, parked))
    assert not list(folder.glob(f"{parking._PREFIX}*"))
    assert _n_open() == n_open


def _n_open() -> int:
    descriptors = Path("/proc/self/fd")
    return len(list(descriptors.iterdir())) if descriptors.exists() else 0


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be taken beforehand here")
def test_where_the_disk_is_full_numbers_lie_in_memory(monkeypatch) -> None:
    def full(descriptor: int, start: int, n_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    x = torch.randn(3, 2)
    found = park(x, dtype=torch.float64)
    assert not is_parked(found)
    assert torch.equal(found, x.double())
    assert found.dtype == torch.float64


def test_what_cannot_be_parked_stays(all_parked) -> None:
    whole = torch.zeros(8, 8)
    assert can_park(whole)
    odd = [whole[:4], whole.T, torch.zeros(3, device="meta"), whole.to_sparse(), park(whole), torch.zeros(1).expand(9)]
    assert not any(map(can_park, odd))


def test_only_much_together_is_large() -> None:
    assert not are_large([torch.zeros(100)])
    assert are_large([torch.zeros(parking.LARGE_BYTES // 8, device="meta") for _ in range(3)])


def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Tensors that are parked from now on."""
    seen: list[torch.Tensor] = []

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(park(tensor))
        return seen[-1]

    monkeypatch.setattr(parking, "park", noted)
    return seen


def test_gradients_of_parked_activations_are_the_same(all_parked, monkeypatch) -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 5), nn.GELU())
    x = torch.randn(4, 6, requires_grad=True)
    (wanted,) = torch.autograd.grad(net(x).square().sum(), x)
    parked = counted(monkeypatch)
    with activations_parked(net.parameters()):
        y = net(x).square().sum()
    (found,) = torch.autograd.grad(y, x)
    assert len(parked) > 3
    assert torch.equal(found, wanted)


def test_few_activations_stay_in_memory(monkeypatch) -> None:
    x = torch.randn(4, 6, requires_grad=True)
    parked = counted(monkeypatch)
    with activations_parked([torch.zeros(3)]):
        y = x.exp().sum()
    assert not parked
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


def test_weights_in_files_are_let_go_after_use(all_parked, monkeypatch) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    x, last = torch.randn(2, 4), net[2]
    wanted = net(x)
    last.weight.data = park(last.weight.data)
    gone: list[Tensor] = []
    monkeypatch.setattr(parking, "let_go", lambda *tensors: gone.extend(tensors))
    with let_go_after_use(net):
        assert torch.equal(net(x), wanted)
        assert [id(one) for one in gone] == [id(last.weight), id(last.bias)]
        assert not net[0]._forward_hooks
    assert not last._forward_hooks


def test_weights_of_a_small_model_are_left_alone() -> None:
    net = nn.Linear(4, 4)
    with weights_parked(net.parameters()) as put:
        put(net.parameters())
    assert not is_parked(net.weight)


_STEPS = """
import resource, sys, torch
from tensortrain.system.parking import reuse_freed_memory
if sys.argv[1] == "kept":
    reuse_freed_memory()
def step():
    some = [torch.zeros(3 * 2**18) for _ in range(4)]  # of 3 MB
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have rules of their own")
def test_freed_memory_is_there_for_the_next_step() -> None:
    places = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}
    command = [sys.executable, "-c", _STEPS, "kept"]
    found = subprocess.run(command, env=places, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 500  # 15,000 pages are written to, and most asked for anew where nothing is kept


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not list its maps")
def test_all_that_is_parked_is_let_go_whoever_holds_it() -> None:
    def resident() -> int:
        parts = Path("/proc/self/smaps").read_text().split("\n")
        sizes, is_ours = 0, False
        for line in parts:
            if line[:1].islower() or line[:1].isdigit():
                is_ours = "tensortrain-parked-" in line
            elif line.startswith("Rss:") and is_ours:
                sizes += int(line.split()[1])
        return sizes

    holders = [{"somewhere": park(torch.full((1000, 700), float(k)))} for k in range(3)]
    total = sum(float(one["somewhere"].sum()) for one in holders)
    assert total == 3 * 700_000
    assert resident() >= 3 * 2700  # kB
    let_go_of_all()
    assert resident() == 0
    assert sum(float(one["somewhere"].sum()) for one in holders) == total
