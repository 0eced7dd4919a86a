"""Small models with the traits that surgery has to respect, and data to go with them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "ConvNet",
    "Tagger",
    "TwoHeads",
    "assert_unchanged",
    "batches",
    "decay_",
    "mlp",
    "object_graph",
    "snapshot",
]


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    """Linear layers with ReLU between them, named "0", "2", "4" and so on."""
    layers: list[nn.Module] = []
    for k, (n, m) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.ReLU()] if k else []
        layers.append(nn.Linear(n, m, bias=bias))
    return nn.Sequential(*layers)


class ConvNet(nn.Module):
    """Two convolutions, the first without bias before a batch norm, and a linear head behind a flattening."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * channels * 16, 10)

    def forward(self, x: Tensor) -> Tensor:  # b 3 8 8
        x = torch.relu(self.norm(self.conv1(x)))
        return self.head(torch.relu(self.conv2(x)).flatten(1))


class Tagger(nn.Module):
    """Embedding and linear, called in the manner of Hugging Face."""

    def __init__(self, vocabulary: int = 60, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.hidden = nn.Linear(width, 2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:  # b t -> b t c
        logits = self.head(torch.tanh(self.hidden(self.embed(input_ids))))
        return type("Output", (), {"logits": logits})()


class TwoHeads(nn.Module):
    """One linear layer under two names, run twice."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width), self.first])
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)


def decay_(model: nn.Module, power: float = 1.5) -> nn.Module:
    """Give every weight with two or more axes singular values that fall like ``k ** -power``."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                matrix = parameter.flatten(1)
                u, s, v = torch.linalg.svd(matrix, full_matrices=False)
                fallen = torch.arange(1, s.numel() + 1, dtype=s.dtype) ** -power
                fallen = fallen * (s.norm() / fallen.norm())
                parameter.copy_(((u * fallen) @ v).reshape(parameter.shape))
    return model


def batches(n: int, size: int, *shape: int, classes: int = 4, mean: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    """Labelled batches whose inputs differ in strength along the last axis."""
    strength = torch.linspace(2.0, 0.2, shape[-1])
    return [(torch.randn(size, *shape) * strength + mean, torch.randint(0, classes, (size,))) for _ in range(n)]


def object_graph(model: nn.Module) -> dict[str, int]:
    """Which object stands under which name: modules, parameters and buffers, aliases included."""
    graph = {f"module {name}": id(m) for name, m in model.named_modules(remove_duplicate=False)}
    graph |= {f"parameter {name}": id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    return graph | {f"buffer {name}": id(b) for name, b in model.named_buffers(remove_duplicate=False)}


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All that an operation which "changes nothing" must leave: objects, values, modes, gradients, hooks."""
    values = tuple((name, value.clone()) for name, value in model.state_dict().items())
    parameters = tuple((p.requires_grad, p.grad is None, p._backward_hooks is None) for p in model.parameters())
    hooks = tuple(
        (module.training, *(len(getattr(module, name)) for name in _HOOK_DICTS)) for module in model.modules()
    )
    return object_graph(model), values, parameters, hooks


def assert_unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    graph, values, parameters, hooks = snapshot(model)
    assert graph == before[0]
    for (name, value), (old_name, old) in zip(values, before[1], strict=True):
        assert name == old_name
        assert torch.equal(value.nan_to_num(7.0), old.nan_to_num(7.0))
    assert parameters == before[2]
    assert hooks == before[3]


_HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
