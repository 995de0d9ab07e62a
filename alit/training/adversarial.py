"""A patch discriminator that knows how many tokens a picture was made from, and the hinge losses around it.

Shapes: B batch, C channels, H W pixels, h w patches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from alit.training import distributed


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit per patch, higher for photographs.

    Group norm in place of batch norm: no statistics that workers would have to share, and none that a step's fakes
    would mix into the photographs'.

    Args:
        lengths: how many token counts there are; a learned vector per count is added to the first features.
        width: channels of the first layer, doubled by each further one up to eight times.
        layers: convolutions of stride 2; each doubles what a patch sees.
    """

    def __init__(self, lengths: int = 1, *, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [min(width * 2**i, width * 8) for i in range(layers + 1)]
        self.first = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.length_embedding = nn.Embedding(lengths, widths[0])
        body: list[nn.Module] = []
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            body += [nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False)]
            body += [nn.GroupNorm(8, widths[i]), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for part in self.modules():
            if isinstance(part, (nn.Conv2d, nn.Embedding)):
                nn.init.normal_(part.weight, std=0.02)

    def forward(self, images_BCHW: Float[Tensor, "B 3 H W"], length: int = 0) -> Float[Tensor, "B 1 h w"]:
        """Logits of images in [0, 1], all made from the `length`-th token count."""
        x = self.first(2 * images_BCHW - 1) + self.length_embedding.weight[length, :, None, None]
        return self.body(F.leaky_relu(x, 0.2))


class DiscriminatorPerLength(nn.Module):
    """A discriminator of its own for every token count."""

    def __init__(self, lengths: int, *, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.each = nn.ModuleList(PatchDiscriminator(width=width, layers=layers) for _ in range(lengths))

    def forward(self, images_BCHW: Float[Tensor, "B 3 H W"], length: int = 0) -> Float[Tensor, "B 1 h w"]:
        return self.each[length](images_BCHW)


def hinge_generator_loss(fake: Tensor) -> Tensor:
    return -fake.mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """The factor at which the adversary pulls the last layer as hard as the reconstruction does (Esser et al. 2021).

    From the gradients' means over all workers, so that every worker weighs alike.
    """
    norms = [
        distributed.averaged(torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()).norm()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)


class Pictures(NamedTuple):
    """What the discriminator learns from after the generator's turn."""

    real: Tensor
    fake: Tensor
    length: int


class Adversary:
    """The discriminator's part in both turns of a step.

    Args:
        discriminator: takes images and the index of their token count.
        weight: of the adversary's pull on the last layer, relative to the reconstruction's.
        start: the step from which both sides play.
        ramp: steps over which the weight grows from 0.
    """

    def __init__(self, discriminator: nn.Module, *, weight: float, start: int, ramp: int) -> None:
        self.discriminator = discriminator
        self.shared = discriminator
        """The same, wrapped where workers share its gradients."""
        self.weight, self.start, self.ramp = weight, start, ramp
        self.pictures: Pictures | None = None

    def generator_loss(
        self, images: Tensor, fake: Tensor, length: int, step: int, reconstruction_loss: Tensor, last_layer: Tensor
    ) -> Tensor | None:
        """What to add to the generator's loss; None before the start."""
        self.pictures = None
        if step < self.start or not self.weight:
            return None
        self.pictures = Pictures(images.detach(), fake.detach(), length)
        self.discriminator.requires_grad_(False)
        loss = hinge_generator_loss(self.discriminator(fake, length).float())
        self.discriminator.requires_grad_(True)
        factor = adaptive_weight(reconstruction_loss, loss, last_layer)
        return self.weight * min(1.0, (step - self.start + 1) / self.ramp) * factor * loss

    def discriminator_loss(self) -> Tensor:
        """The discriminator's own loss on the pictures of the generator's last turn, where there was one."""
        assert self.pictures is not None
        real, fake, length = self.pictures
        # one pass: workers' gradients are shared once per backward
        logits = self.shared(torch.cat([real, fake]), length).float()
        return hinge_discriminator_loss(*logits.chunk(2))
