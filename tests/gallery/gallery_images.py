"""Models of images: classes, masks, boxes, codes, noise."""

from __future__ import annotations

from typing import Any

import torch
from gallery_case import Case, case, drawn_classes, forward
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def conv_norm(n: int, m: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n, m, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(m), nn.ReLU())


def images(n: int = 16, size: int = 12) -> Tensor:
    """Smooth ones, as pictures are."""
    return F.interpolate(torch.randn(n, 3, size // 2, size // 2), size=(size, size), mode="bilinear")


def classified_images(net: nn.Module) -> tuple[Tensor, Tensor]:
    x = images()
    return x, drawn_classes(forward(net, x))


class Residual(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b = conv_norm(n, n), nn.Sequential(nn.Conv2d(n, n, 3, 1, 1, bias=False), nn.BatchNorm2d(n))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(self.a(x)))


def small_resnet() -> nn.Sequential:
    return nn.Sequential(
        conv_norm(3, 24), Residual(24), conv_norm(24, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )


@case
def resnet() -> Case:
    return Case(small_resnet, classified_images)


@case
def resnet_with_frozen_statistics() -> Case:
    def build() -> nn.Module:
        net = small_resnet().train()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)
        return net

    return Case(build, classified_images)


@case
def channels_last() -> Case:
    def batch(net: nn.Module) -> tuple[Tensor, Tensor]:
        x = images().to(memory_format=torch.channels_last)
        return x, drawn_classes(net(x))

    return Case(lambda: small_resnet().to(memory_format=torch.channels_last), batch)


@case
def mobile_net() -> Case:
    def build() -> nn.Module:
        separable = [nn.Sequential(conv_norm(n, n, groups=n), nn.Conv2d(n, m, 1)) for n, m in ((24, 48), (48, 64))]
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
        return nn.Sequential(conv_norm(3, 24, 2), *separable, nn.Conv2d(64, 64, 3, groups=4), *pool)

    return Case(build, classified_images)


@case
def segmentation() -> Case:
    def build() -> nn.Module:
        return nn.Sequential(conv_norm(3, 32), conv_norm(32, 32), nn.Conv2d(32, 5, 1))

    return Case(build, classified_images)


class Detector(nn.Module):
    """Takes a list of images of any size, gives a dictionary for each, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.ReLU())
        self.boxes, self.scores = nn.Conv2d(48, 4, 3, 1, 1), nn.Conv2d(48, 6, 1)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            h = self.body(image[None])
            boxes, scores = (head(h)[0].flatten(1).T for head in (self.boxes, self.scores))
            found.append({"boxes": boxes.sigmoid(), "scores": scores, "labels": scores.argmax(1)})
        return found


@case
def detector_of_lists_of_images() -> Case:
    def batch(net: nn.Module) -> list[Tensor]:
        return [images(1, size)[0] for size in (12, 16, 20, 12)]

    return Case(Detector, lambda net: (batch(net), [{"boxes": torch.rand(2, 4)} for _ in range(4)]))


class Yolo(nn.Module):
    """Layers know their number and where they take their input from; gives one map for each scale."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 32, 3, 1, 1), nn.Conv2d(32, 48, 3, 2, 1), nn.Conv2d(32, 9, 1),
            nn.Conv2d(48, 9, 1),
        )  # fmt: skip
        for k, (layer, source) in enumerate(zip(self.layers, (-1, -1, -1, 1, 2), strict=True)):
            layer.i, layer.f = k, source

    def forward(self, x: Tensor) -> list[Tensor]:
        kept: list[Tensor] = []
        for layer in self.layers:
            x = layer(x if layer.f == -1 else kept[layer.f])
            x = F.silu(x) if layer.i < 3 else x
            kept.append(x)
        return kept[3:]


@case
def yolo_with_feature_maps() -> Case:
    return Case(Yolo, lambda net: images())


class Vae(nn.Module):
    """Draws its code in every call, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(144, 64), nn.ReLU())
        self.mean, self.log_var = nn.Linear(64, 8), nn.Linear(64, 8)
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 144))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mean, log_var = self.mean(h), self.log_var(h).clamp(-4, 0)
        code = mean + (log_var / 2).exp() * torch.randn_like(mean)
        return self.decoder(code).view_as(x), mean, log_var


@case
def vae() -> Case:
    return Case(Vae, lambda net: images(32)[:, :1])


@case
def autoencoder_with_transposed_convolutions() -> Case:
    def build() -> nn.Module:
        down = nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 24, 4, 2, 1), nn.ReLU()
        up = nn.ConvTranspose2d(24, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1)
        return nn.Sequential(*down, *up)

    return Case(build, lambda net: images())


class UNet(nn.Module):
    """Predicts the noise in an image from the image and the time step."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.first, self.down = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.middle, self.norm = nn.Conv2d(32, 32, 3, 1, 1), nn.GroupNorm(4, 32)
        self.up, self.last = nn.ConvTranspose2d(32, 16, 2, 2), nn.Conv2d(32, 3, 3, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.logspace(0, -3, 8, dtype=x.dtype)
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        a = F.silu(self.first(x))
        b = F.silu(self.down(a)) + time[:, :, None, None]
        b = b + F.silu(self.norm(self.middle(b)))
        return self.last(torch.cat([a, self.up(b)], dim=1))


@case
def diffusion_unet() -> Case:
    return Case(UNet, lambda net: {"x": torch.randn(16, 3, 12, 12), "t": torch.randint(0, 1000, (16,))})


class Block(nn.Module):
    def __init__(self, n: int, n_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.n_heads = nn.LayerNorm(n), nn.LayerNorm(n), n_heads
        self.qkv, self.out = nn.Linear(n, 3 * n), nn.Linear(n, n)
        self.mlp = nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.patches, self.checkpointed = nn.Conv2d(3, 32, 4, 4), checkpointed
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 10, 32))
        self.blocks, self.norm = nn.ModuleList(Block(32, 4) for _ in range(2)), nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.places
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(self.norm(x)[:, 0])


@case
def vision_transformer() -> Case:
    return Case(VisionTransformer, classified_images)


@case
def gradient_checkpointing() -> Case:
    return Case(lambda: VisionTransformer(checkpointed=True), classified_images)


class WithAuxiliary(nn.Module):
    """Gives its second head only in training, as Inception and DeepLab do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.more = conv_norm(3, 32, 2), conv_norm(32, 32)
        self.head, self.auxiliary = nn.Linear(32, 10), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Any:
        a = self.body(x)
        y = self.head(self.more(a).mean((2, 3)))
        return (y, self.auxiliary(a.mean((2, 3)))) if self.training else y


@case
def auxiliary_head_in_training() -> Case:
    return Case(WithAuxiliary, classified_images)
