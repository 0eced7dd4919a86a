"""Tables, controls, graphs, sound, and what people do to modules of any kind."""

from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from gallery_case import Case, case, drawn_classes, forward, needs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, IterableDataset


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(sizes):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def classified(net: nn.Module, *shape: int, n: int = 32) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, *shape)
    return x, drawn_classes(forward(net, x.clone()))


# -- outputs ----------------------------------------------------------------------------------------------


@case
def plain_mlp() -> Case:
    return Case(lambda: mlp(32, 64, 64, 10), lambda net: classified(net, 32), measure=True)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(32, 64)
        self.classes, self.box = mlp(64, 64, 10), mlp(64, 64, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.body(x))
        return self.classes(h), self.box(h).sigmoid()


@case
def two_heads() -> Case:
    return Case(TwoHeads, lambda net: torch.randn(32, 32))


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = mlp(24, 64, 32), mlp(40, 64, 32)

    def forward(self, user: Tensor, item: Tensor) -> dict[str, Tensor]:
        a, b = self.user(user), self.item(item)
        return {"score": 10 * (a * b).mean(-1), "user": F.normalize(a, dim=-1), "item": F.normalize(b, dim=-1)}


@case
def two_towers_with_a_dict_of_outputs() -> Case:
    return Case(DictOutput, lambda net: {"user": torch.randn(32, 24), "item": torch.randn(32, 40)})


@dataclass
class Estimate:
    mean: Tensor
    spread: Tensor | None = None
    name: str = "estimate"


class DataclassOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.spread = mlp(32, 64, 64), nn.Linear(64, 3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Estimate:
        h = self.body(x).relu()
        return Estimate(self.mean(h), F.softplus(self.spread(h)))


@case
def dataclass_output() -> Case:
    return Case(DataclassOutput, lambda net: torch.randn(32, 32))


@case
def regression_with_one_output() -> Case:
    def batch(net: nn.Module) -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 32)
        return x, net(x) + 0.1 * torch.randn(32, 1)

    return Case(lambda: mlp(32, 64, 64, 1), batch)


class OneLogit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(32, 64, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


@case
def one_logit_and_float_labels() -> Case:
    def batch(net: nn.Module) -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 32)
        return x, torch.bernoulli(net(x).sigmoid())

    return Case(OneLogit, batch)


@case
def multi_label() -> Case:
    def batch(net: nn.Module) -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 32)
        return x, torch.bernoulli(net(x).sigmoid())

    return Case(lambda: mlp(32, 64, 64, 12), batch)


@case
def soft_labels() -> Case:
    def batch(net: nn.Module) -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 32)
        return x, net(x).softmax(-1)  # as label smoothing and mixup make them

    return Case(lambda: mlp(32, 64, 64, 10), batch)


class Policy(nn.Module):
    """Actor and critic; actions that are not allowed get a logit of minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.actor, self.critic = mlp(32, 64, 64), nn.Linear(64, 9), nn.Linear(64, 1)

    def forward(self, state: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(state).tanh()
        return self.actor(h).masked_fill(~allowed, float("-inf")), self.critic(h).squeeze(-1)


@case
def masked_policy() -> Case:
    def batch(net: nn.Module) -> dict[str, Tensor]:
        allowed = torch.rand(32, 9) < 0.7
        allowed[:, 0] = True
        return {"state": torch.randn(32, 32), "allowed": allowed}

    return Case(Policy, batch)


# -- data -------------------------------------------------------------------------------------------------


class ForceField(nn.Module):
    """Energies, and forces as their gradients: it takes a gradient in its forward, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(30, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, places: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            places = places.detach().requires_grad_()
            energy = self.net(places.flatten(1)).squeeze(1)
            (slope,) = torch.autograd.grad(energy.sum(), places, create_graph=self.training)
        return {"energy": energy, "forces": -slope}


@case
def force_field() -> Case:
    return Case(ForceField, lambda net: {"places": torch.randn(32, 10, 3)})


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = mlp(32, 64, 48), nn.Linear(48, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head((self.net(a) - self.net(b)).abs())


@case
def siamese() -> Case:
    def batch(net: nn.Module) -> tuple[tuple[Tensor, Tensor], Tensor]:
        pair = torch.randn(32, 32), torch.randn(32, 32)
        return pair, drawn_classes(net(*pair))

    return Case(Siamese, batch, run=lambda net, batch: net(*batch[0]))


Sample = namedtuple("Sample", "x weight")


class OfSample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(32, 64, 64, 5)

    def forward(self, sample: Any) -> Tensor:
        return self.net(sample.x) * sample.weight


@case
def named_tuple_as_input() -> Case:
    def batch(net: nn.Module) -> tuple[Sample, Tensor]:
        sample = Sample(torch.randn(32, 32), torch.ones(32, 1))
        return sample, drawn_classes(net(sample))

    return Case(OfSample, batch)


@dataclass
class Graph:
    x: Tensor
    edge_index: Tensor


class GraphNet(nn.Module):
    """Mean over neighbours, the manner of PyTorch Geometric without the package."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.near, self.out = nn.Linear(24, 64), nn.Linear(24, 64, bias=False), mlp(64, 64, 5)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        degree = torch.zeros(len(x)).index_add_(0, target, torch.ones(len(target))).clamp_min(1)
        mean = torch.zeros_like(x).index_add_(0, target, x[source]) / degree[:, None]
        return self.out(F.relu(self.own(x) + self.near(mean)))


class GraphNetOfGraph(GraphNet):
    def forward(self, graph: Graph) -> Tensor:  # type: ignore[override]
        return super().forward(graph.x, graph.edge_index)


def edges(n: int) -> Tensor:
    return torch.randint(0, n, (2, 4 * n))


@case
def graph_network() -> Case:
    def batch(net: nn.Module) -> dict[str, Tensor]:
        inputs = {"x": torch.randn(40, 24), "edge_index": edges(40)}
        return {**inputs, "labels": drawn_classes(net(**inputs))}

    return Case(GraphNet, batch, measure=True)  # at batch 1 the edges lead nowhere: no timing, but a result


@case
def graph_as_a_dataclass() -> Case:
    def batch(net: nn.Module) -> Graph:
        n = int(torch.randint(30, 50, ()))
        return Graph(torch.randn(n, 24), edges(n))

    return Case(GraphNetOfGraph, batch)


@case
def last_batch_of_one_with_batchnorm() -> Case:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), mlp(64, 64, 10))

    def extra(net: nn.Module) -> list[Any]:
        return [classified(net, 32, n=1)]

    return Case(build, lambda net: classified(net, 32), extra=extra)


class Stream(IterableDataset):
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


@case
def stream_without_a_length() -> Case:
    return Case(
        lambda: mlp(32, 64, 64, 10),
        lambda net: classified(net, 32),
        data=lambda batches: DataLoader(Stream(batches), batch_size=None),
        heal={"steps": 12},
    )


class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(32, 64, 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.sub_(5).div_(3))


@case
def input_changed_in_place() -> Case:
    return Case(ChangesItsInput, lambda net: torch.randn(32, 32) * 3 + 5)


class Recommender(nn.Module):
    """Hashed tags in bags, a table per feature, one number for the click."""

    def __init__(self) -> None:
        super().__init__()
        self.tags = nn.EmbeddingBag(400, 16, mode="mean")
        self.features = nn.ModuleList(nn.Embedding(n, 16) for n in (300, 40, 7))
        self.top = mlp(4 * 16 + 5, 64, 1)

    def forward(self, tags: Tensor, offsets: Tensor, features: Tensor, dense: Tensor) -> Tensor:
        found = [table(features[:, k]) for k, table in enumerate(self.features)]
        return self.top(torch.cat([self.tags(tags, offsets), *found, dense], dim=1)).squeeze(1)


@case
def recommender() -> Case:
    def batch(net: nn.Module) -> dict[str, Tensor]:
        features = torch.stack([torch.randint(0, n, (64,)) for n in (300, 40, 7)], dim=1)
        offsets = torch.arange(0, 192, 3)
        x = {"tags": torch.randint(0, 400, (192,)), "offsets": offsets, "features": features}
        x["dense"] = torch.randn(64, 5)
        return {**x, "labels": torch.bernoulli(net(**x).sigmoid())}

    return Case(Recommender, batch)


class Audio(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv1d(1, 16, 9, stride=4), nn.BatchNorm1d(16), nn.ReLU()),
            *(nn.Conv1d(16, 48, 5, stride=2), nn.BatchNorm1d(48), nn.ReLU()),
            *(nn.Conv1d(48, 48, 5, stride=2, dilation=2), nn.ReLU()),
        )
        self.head = nn.Linear(48, 6)

    def forward(self, wave: Tensor) -> Tensor:
        return self.head(self.net(wave.unsqueeze(1)).mean(-1))


@case
def audio_conv1d() -> Case:
    return Case(Audio, lambda net: classified(net, 256))


class Forecast(nn.Module):
    """A GRU with its first state as input; batch axis second."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.gru, self.out = nn.Linear(48, 96), nn.GRU(96, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.gru(self.inputs(x).relu(), h0)
        return self.out(y), h


@case
def gru_with_a_state() -> Case:
    return Case(Forecast, lambda net: {"x": torch.randn(8, 32, 48), "h0": torch.randn(1, 32, 16)}, "1.2x")


# -- what people do to modules ----------------------------------------------------------------------------


@case
def weight_norm_by_parametrization() -> Case:
    def build() -> nn.Module:
        net = mlp(32, 64, 64, 64, 10)
        parametrizations.weight_norm(net[2])
        return net

    return Case(build, lambda net: classified(net, 32), "1.5x")


@case
def weight_norm_by_hooks() -> Case:
    def build() -> nn.Module:
        net = mlp(32, 64, 64, 64, 10)
        torch.nn.utils.weight_norm(net[2])
        return net

    return Case(build, lambda net: classified(net, 32), "1.5x")


@case
def frozen_body() -> Case:
    def build() -> nn.Module:
        net = mlp(32, 64, 64, 64, 10)
        net[0].requires_grad_(False)
        net[2].requires_grad_(False)
        return net

    return Case(build, lambda net: classified(net, 32))


class Swish(torch.autograd.Function):
    """Keeps its input alone for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


class WithSwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(32, 64, 64), mlp(64, 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(Swish.apply(self.a(x)))


@case
def custom_autograd_function() -> Case:
    return Case(WithSwish, lambda net: classified(net, 32))


@case
def bfloat16() -> Case:
    def batch(net: nn.Module) -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 32, dtype=torch.bfloat16)
        return x, drawn_classes(net(x))

    return Case(lambda: mlp(32, 64, 64, 10).to(torch.bfloat16), batch)


@case
def float16() -> Case:
    return Case(lambda: mlp(32, 64, 64, 10).half(), lambda net: torch.randn(32, 32).half())


@case
def float64() -> Case:
    return Case(lambda: mlp(32, 64, 64, 2).double(), lambda net: torch.randn(32, 32).double())


class LightningLike(nn.Module):
    """The methods of a LightningModule, without the package."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss, self.logged = mlp(32, 64, 64, 10), nn.CrossEntropyLoss(), {}

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = self.loss(self(batch[0]), batch[1])
        self.logged["loss"] = loss.detach()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


@case
def lightning_like() -> Case:
    return Case(LightningLike, lambda net: classified(net, 32))


class KeepsActivation(nn.Module):
    """For a penalty that is added to the loss elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.last = mlp(32, 64, 64), nn.Linear(64, 10), None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.body(x)
        return self.head(self.last.relu())


@case
def keeps_its_last_activation() -> Case:
    return Case(KeepsActivation, lambda net: classified(net, 32))


class InAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(32, 64, 64, 10)
        self.layers = [self.net[0], self.net[2], self.net[4]]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


@case
def layers_in_a_python_list() -> Case:
    return Case(InAList, lambda net: classified(net, 32))


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(input=F.relu(self.a(input=x)))))


@case
def layers_called_by_keyword() -> Case:
    return Case(ByKeyword, lambda net: classified(net, 32))


def tripled(self: nn.Linear, x: Tensor) -> Tensor:
    return 3 * F.linear(x, self.weight, self.bias)


class Replaced(nn.Module):
    """One forward is replaced on the instance, one layer carries a buffer for somebody else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = mlp(32, 64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.b.forward = MethodType(tripled, self.b)  # type: ignore[method-assign]
        self.c.register_buffer("gain", torch.full((10,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).tanh()) * self.c.gain


@case
def forward_replaced_on_the_instance() -> Case:
    return Case(Replaced, lambda net: classified(net, 32), "1.5x")


class Scale:
    """A hook that can be copied and compared."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 2 * output


@case
def hooked() -> Case:
    def build() -> nn.Module:
        net = mlp(32, 64, 64, 10)
        net[2].register_forward_hook(Scale())
        return net

    return Case(build, lambda net: classified(net, 32))


class Shared(nn.Module):
    """One block that runs three times, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.block, self.head = nn.Linear(32, 64), mlp(64, 64, 64), nn.Linear(64, 10)
        self.also = self.block

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        for block in (self.block, self.also, self.block):
            x = F.layer_norm(x + block(x), (64,))
        return self.head(x)


@case
def one_block_many_times() -> Case:
    return Case(Shared, lambda net: classified(net, 32))


class Experts(nn.Module):
    """Every row goes to the expert that its router likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 4)
        self.experts = nn.ModuleList(mlp(32, 64, 32) for _ in range(4))
        self.head = nn.Linear(32, 10)
        with torch.no_grad():
            self.router.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -1e4]))  # nobody goes to the last one

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chances = self.router(x).softmax(-1)
        gate, chosen = chances.max(-1)
        y = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            y[chosen == k] = gate[chosen == k, None] * expert(x[chosen == k])
        return self.head(x + y), chances


@case
def mixture_of_experts() -> Case:
    def batch(net: nn.Module) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 32)
        return x, drawn_classes(net(x)[0])

    return Case(Experts, batch)


@case
@needs("lightning")
def lightning() -> Case:
    import lightning

    class Module(LightningLike, lightning.LightningModule):
        pass

    return Case(Module, lambda net: classified(net, 32))


@case
def data_parallel() -> Case:
    return Case(lambda: nn.DataParallel(mlp(32, 64, 64, 10)), lambda net: classified(net, 32))


# -- what is refused --------------------------------------------------------------------------------------


@case
def nothing_to_heal() -> Case:
    def build() -> nn.Module:
        return mlp(32, 64, 64, 10).requires_grad_(False)

    return Case(build, lambda net: classified(net, 32), refuses="something to heal")


@case
def weights_that_are_not_finite() -> Case:
    def spoilt_(net: nn.Module) -> nn.Module:
        net.get_parameter("2.weight").data[3, 5] = torch.nan
        return net

    return Case(lambda: mlp(32, 64, 64, 10), lambda net: torch.randn(32, 32), trained=spoilt_, refuses="finite")


@case
def budget_out_of_reach() -> Case:
    return Case(lambda: mlp(32, 64, 64, 10), lambda net: classified(net, 32), "200x", refuses="budget")
