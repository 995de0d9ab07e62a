"""A patch discriminator conditioned on the number of tokens, and its hinge losses.

Shapes: B batch, C channels, H W pixels, h w patches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from alit.precision import upcast
from alit.training import distributed


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit per patch, higher for real images.

    It uses group norm instead of batch norm, whose statistics would have to be shared between workers and would mix
    real and reconstructed images.

    Args:
        lengths: The number of lengths; a learned vector for each is added to the first features.
        width: The channels of the first layer, doubled by each further layer up to a factor of eight.
        layers: The number of convolutions of stride 2; each doubles the side of a patch.
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
        """Returns the logits of images in [0, 1], all reconstructed from the length of index `length`."""
        x = self.first(2 * images_BCHW - 1) + self.length_embedding.weight[length, :, None, None]
        return self.body(F.leaky_relu(x, 0.2))


class DiscriminatorPerLength(nn.Module):
    """One unconditioned `PatchDiscriminator` for every length.

    Args:
        lengths: The number of lengths.
        width: See `PatchDiscriminator`.
        layers: See `PatchDiscriminator`.
    """

    def __init__(self, lengths: int, *, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.each = nn.ModuleList(PatchDiscriminator(width=width, layers=layers) for _ in range(lengths))

    def forward(self, images_BCHW: Float[Tensor, "B 3 H W"], length: int = 0) -> Float[Tensor, "B 1 h w"]:
        """Returns the logits of images in [0, 1], all reconstructed from the length of index `length`."""
        return self.each[length](images_BCHW)


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """Returns the generator's loss, given the logits of reconstructions."""
    return -fake.mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Returns the discriminator's loss, given the logits of real images and of reconstructions."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Returns the factor that gives both losses equal gradient norms at the last layer (Esser et al. 2021).

    The gradients are averaged over all workers, so that every worker uses the same factor.

    Returns:
        A scalar from 0 to 10,000.
    """
    norms = [
        distributed.averaged(upcast(torch.autograd.grad(loss, last_layer, retain_graph=True)[0])).norm()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)


class AdversarialExamples(NamedTuple):
    """The training examples of the discriminator in one step.

    Attributes:
        real: Images.
        fake: Their reconstructions.
        length: The index of the reconstructions' length.
    """

    real: Tensor
    fake: Tensor
    length: int


class Adversary:
    """The adversarial losses of a step: first the generator's, then the discriminator's.

    Args:
        discriminator: Takes images and the index of their length.
        weight: The weight of the adversarial loss, see `AdversarialRecipe.gan_weight`.
        start: The first step of adversarial training.
        ramp: The number of steps over which the weight rises from 0.

    Attributes:
        shared: The discriminator, wrapped where workers share its gradients.
        examples: The images of the last generator loss; None before `start`.
    """

    def __init__(self, discriminator: nn.Module, *, weight: float, start: int, ramp: int) -> None:
        self.discriminator = discriminator
        self.shared = discriminator
        self.weight, self.start, self.ramp = weight, start, ramp
        self.examples: AdversarialExamples | None = None

    def generator_loss(
        self, images: Tensor, fake: Tensor, length: int, step: int, reconstruction_loss: Tensor, last_layer: Tensor
    ) -> Tensor | None:
        """Returns the weighted adversarial loss of the generator; None before the start.

        Args:
            images: Real images in [0, 1].
            fake: Their reconstructions, with gradients.
            length: The index of the reconstructions' length.
            step: The training step.
            reconstruction_loss: The loss to balance against.
            last_layer: The weight at which gradients are balanced.
        """
        self.examples = None
        if step < self.start or not self.weight:
            return None
        self.examples = AdversarialExamples(images.detach(), fake.detach(), length)
        self.discriminator.requires_grad_(False)
        loss = hinge_generator_loss(upcast(self.discriminator(fake, length)))
        self.discriminator.requires_grad_(True)
        factor = adaptive_weight(reconstruction_loss, loss, last_layer)
        return self.weight * min(1.0, (step - self.start + 1) / self.ramp) * factor * loss

    def discriminator_loss(self) -> Tensor:
        """Returns the discriminator's loss on the images of the last generator loss, which must not have been None."""
        assert self.examples is not None
        real, fake, length = self.examples
        # one forward pass, as DDP synchronizes gradients once per backward pass
        logits = upcast(self.shared(torch.cat([real, fake]), length))
        return hinge_discriminator_loss(*logits.chunk(2))
