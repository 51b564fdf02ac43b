"""PatchGAN: a small network that judges patches, and the hinge losses around it, written as one sum.

Isola et al. 2017 (arXiv 1611.07004) for the network; hinge losses as in Esser et al. 2021 (arXiv 2012.09841).

    generator     -mean D(x')                                       reads D through detached parameters
    judge         (mean relu(1 - D(x)) + mean relu(1 + D(x'))) / 2  reads detached images
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """[B, 3, H, W] -> one logit a patch, [B, 1, h, w]. depth: stride-2 convolutions; group norms, so that images do not mix."""

    def __init__(self, width: int = 64, depth: int = 3):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, depth):
            channels = width * 2**i
            layers += [nn.Conv2d(channels // 2, channels, 4, 2, 1), nn.GroupNorm(8, channels), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers, nn.Conv2d(width * 2 ** (depth - 1), 1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def adversarial_losses(judge: PatchDiscriminator, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """(generator's loss, judge's loss), two scalars whose gradients do not meet: each reaches its own parameters only.

    real, fake: images [B, 3, H, W] in [-1, 1].
    """
    detached = {name: parameter.detach() for name, parameter in judge.named_parameters()}
    generator = -torch.func.functional_call(judge, detached, (fake,)).mean()
    on_real, on_fake = judge(real), judge(fake.detach())
    return generator, (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()) / 2
