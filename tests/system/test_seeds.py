"""The same numbers as after torch.manual_seed."""

from __future__ import annotations

import torch

from tensortrain.system import seeds
from tensortrain.system.seeds import seed_all


def test_numbers_are_those_of_torch(monkeypatch) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    for has_devices in (seeds._has_devices(), True, False):
        monkeypatch.setattr(seeds, "_has_devices", lambda has_devices=has_devices: has_devices)
        seed_all(7)
        assert torch.equal(torch.rand(3), expected)
        assert torch.initial_seed() == 7
