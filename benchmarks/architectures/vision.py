"""Images in patches: transformers and mixers."""

from __future__ import annotations

import torch
from torch import nn

from architectures.architecture import Applied, Architecture, Block, Positions, Residual, mean_over_time, swap


class VisionTransformer(nn.Module):
    """Patches, a token for the class, positions and blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 48, 4, 4), nn.Parameter(torch.zeros(1, 1, 48))
        self.body = nn.Sequential(Positions(65, 48), Block(48, 4), Block(48, 4), nn.LayerNorm(48))
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.head(self.body(x)[:, 0])


def mlp_mixer() -> nn.Module:
    """Linear maps over patches and over channels in turn."""

    def block() -> nn.Module:
        across = nn.Sequential(
            nn.LayerNorm(32), Applied(swap), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64), Applied(swap)
        )
        within = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        return nn.Sequential(Residual(across), Residual(within))

    return nn.Sequential(
        nn.Conv2d(3, 32, 4, 4),
        nn.Flatten(2),
        Applied(swap),
        block(),
        block(),
        Applied(mean_over_time),
        nn.Linear(32, 10),
    )


def conv_mixer() -> nn.Module:
    """Depthwise and pointwise convolutions of patches, with BatchNorm after each activation."""

    def block() -> list[nn.Module]:
        depthwise = nn.Sequential(nn.Conv2d(32, 32, 5, padding=2, groups=32), nn.GELU(), nn.BatchNorm2d(32))
        return [Residual(depthwise), nn.Conv2d(32, 32, 1), nn.GELU(), nn.BatchNorm2d(32)]

    patches = [nn.Conv2d(3, 32, 4, 4), nn.GELU(), nn.BatchNorm2d(32)]
    return nn.Sequential(*patches, *block(), *block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


IMAGE = (3, 32, 32)
ARCHITECTURES = (
    Architecture(name="ViT", make=VisionTransformer, shape=IMAGE),
    Architecture(name="MLP-Mixer", make=mlp_mixer, shape=IMAGE),
    Architecture(name="ConvMixer", make=conv_mixer, shape=IMAGE, batchnorm="group"),
)
