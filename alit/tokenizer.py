"""Alit: images in, adaptive-length tokens out, and back.

Shapes: B batch, C code width, G base tokens, n latents per iteration, N latents, K iterations, S sequence, D width,
O prediction width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from alit.encoding.criteria import Candidate, Criterion, parse
from alit.encoding.pool import Pool, State, pooled
from alit.encoding.results import Encoded, ImageResult
from alit.model.base import BaseTokens
from alit.model.codebook import LatentCodebook, Quantized
from alit.model.config import AlitConfig, KLConfig, VQGANConfig
from alit.model.distillation import LatentDecoder, LatentEncoder, initialize
from alit.model.kl import KL
from alit.model.vqgan import VQGAN

Images = UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]


Batches = Iterable[UInt8[Tensor, "_ 3 H W"] | Float[Tensor, "_ 3 H W"]]


Ids = Tensor | np.ndarray | Sequence[int]


class Step(NamedTuple):
    """One iteration of a full rollout, every image still in it."""

    latents_BND: Tensor
    codes_BNC: Tensor
    """What the latent decoder reads: unit codebook rows, or continuous codes."""
    ids_BN: Tensor | None
    unquantized_BNC: Tensor
    """The codes as the encoder gives them."""
    quantizer_loss: Tensor
    predictions_BGO: Tensor | None
    """The latent decoder's output, where it was asked for or halting needed it."""


class Alit(nn.Module):
    """The adaptive-length image tokenizer.

    Inference methods (`encode`, `encode_batches`, `encode_all`, `decode`, `attention_maps`) record no gradients, draw
    no random numbers and give each image the answer it would get alone. `rollout` is the differentiable path that
    training takes.
    """

    def __init__(self, config: AlitConfig) -> None:
        super().__init__()
        self.config = config
        self.base = build_base(config.base)
        self.encoder = LatentEncoder(config)
        self.decoder = LatentDecoder(config, self.base.prediction_dim)
        self.codebook = LatentCodebook(config.codebook_size, config.code_dim) if config.codebook_size else None
        initialize(self.encoder)
        initialize(self.decoder)
        self.register_buffer("halting_KG", torch.empty(0), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Makes what is not stored: the fixed noise of sampled halting, uniform in [0, 1), [K, G]."""
        noise = torch.Generator("cpu").manual_seed(self.config.halting_seed)
        shape = (self.config.iterations, self.config.grid**2) if self.config.halting == "sampled" else (0,)
        self.halting_KG = torch.rand(*shape, generator=noise, device="cpu").to(self.encoder.positions.device)

    # ---------------------------------------------------------------- the parts of one iteration

    def _prepare(self, images: Images) -> Float[Tensor, "B 3 H W"]:
        size = self.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(f"images must have the shape (batch, 3, {size}, {size}), got {tuple(images.shape)}")
        weight = self.encoder.positions
        if images.dtype == torch.uint8:
            return images.to(weight.device).to(weight.dtype) / 255
        if not images.is_floating_point():
            raise ValueError(f"images must be uint8 or floats in [0, 1], got {images.dtype}")
        return images.to(weight.device, weight.dtype)

    def _quantize(self, codes_BNC: Tensor, strength: float = 1.0) -> Quantized | None:
        return self.codebook(codes_BNC, strength) if self.codebook is not None else None

    def _pixels(self, predictions_BGO: Tensor) -> Tensor:
        return self.base.decode(self.base.predicted(predictions_BGO, self.config.mixing))

    def _halted(
        self, predictions_BGO: Tensor, ids_BG: Tensor, iteration: int, noise_KBG: Tensor | None = None
    ) -> Tensor:
        """Which base tokens are predicted well enough to be masked from now on, bool [B, G]."""
        probability_BG = predictions_BGO.softmax(-1).gather(-1, ids_BG.unsqueeze(-1)).squeeze(-1)
        halted_BG = probability_BG >= self.config.halting_threshold
        if self.config.halting == "sampled":
            noise = self.halting_KG if noise_KBG is None else noise_KBG
            halted_BG &= noise[iteration] < probability_BG
        return halted_BG

    def _grow(self, x_BSD: Tensor, iteration: int, halted_BG: Tensor | None) -> Tensor:
        return self.encoder.grow(x_BSD if halted_BG is None else self.encoder.mask(x_BSD, halted_BG), iteration)

    # ---------------------------------------------------------------- encoding

    def encode(self, images: Images, criterion: Criterion | str | None = None) -> Encoded:
        """Encodes each image with as many tokens as it needs.

        Iterations run on the images that still need more; the others leave the batch, with all their state.

        Args:
            images: [B, 3, H, W] at the model's size, uint8 or floats in [0, 1].
            criterion: `name:threshold` or a parsed one; the config's default when None.

        Raises:
            ValueError: images of another shape or type, or a criterion that the model cannot follow.
        """
        (encoded,) = self.encode_batches([images], criterion)
        return encoded

    def encode_batches(
        self, batches: Batches, criterion: Criterion | str | None = None, batch_size: int | None = None
    ) -> Iterator[Encoded]:
        """Encodes a stream of batches, in which images of several batches share the iterations that they still need.

        Every iteration runs on exactly `batch_size` images, fewer only at the end of the stream, and the next batch is
        pulled when no iteration has that many. The same batches give the same bits again; in other batches the tokens
        are the same within rounding, as with `encode`.

        Args:
            batches: each [B, 3, H, W] as `encode` takes them, of any sizes, empty ones too; images may wait, so that a
                batch must not change before it is answered.
            criterion: `name:threshold` or a parsed one; the config's default when None.
            batch_size: how many images run together; as many as the first batch that is not empty has when None.

        Returns:
            One `Encoded` per batch, in order, each as soon as its last image is done and the earlier ones are out. When
            a batch is pulled, fewer than K * batch_size images wait on the device. An image may wait for the end of the
            stream where few others need as many tokens, and the results of later batches wait with it, on the CPU.

        Raises:
            ValueError: a `batch_size` below 1 or a criterion that the model cannot follow, at once; images of another
                shape or type, when their batch is pulled.
        """
        if not isinstance(criterion, Criterion):
            criterion = parse(criterion or self.config.criterion)
        criterion.check(self.config)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        arrivals = (State.of(self._prepare(images), criterion) for images in batches)
        every = pooled(arrivals, self._advance, Pool(self.config.iterations, batch_size))
        return (Encoded.of(answers, self.config) for answers in every)

    def encode_each(
        self, images: Images, criteria: Sequence[Criterion], most: Sequence[int | None] | None = None
    ) -> Iterator[list[tuple[int, ImageResult]]]:
        """Encodes images under criteria of their own in one rollout; what is done is answered at once.

        Args:
            images: [B, 3, H, W] as `encode` takes them.
            criteria: one per image.
            most: the longest code that each may get, whatever its criterion says; None for the model's longest.

        Returns:
            After every iteration the images that are done, by their numbers in the batch.

        Raises:
            ValueError: images of another shape or type, or a criterion or length that the model does not have.
        """
        for criterion in dict.fromkeys(criteria):
            criterion.check(self.config)
        longest = [length or self.config.max_tokens for length in most or [None] * len(criteria)]
        if strange := set(longest).difference(self.config.lengths):
            choices = ", ".join(map(str, self.config.lengths))
            raise ValueError(f"this model gives {choices} tokens, not {min(strange)}")
        answers = [ImageResult(criterion=c, most=n) for c, n in zip(criteria, longest, strict=True)]
        numbers = {id(answer): number for number, answer in enumerate(answers)}
        state: State | None = State(answers=answers, images=self._prepare(images)) if answers else None

        def rounds(state: State | None) -> Iterator[list[tuple[int, ImageResult]]]:
            iteration = 0
            while state is not None:
                before = state.answers
                state, iteration = self._advance(state, iteration), iteration + 1
                yield [(numbers[id(answer)], answer) for answer in before if answer.tokens is not None]

        return rounds(state)

    @torch.inference_mode()
    def _advance(self, state: State, iteration: int) -> State | None:
        """Runs one iteration; answers the images that are done and returns the others, None where there are none."""
        length, images, base, x_BSD = self.config.lengths[iteration], state.images, state.base, state.x_BSD
        if base is None or x_BSD is None:
            base = self.base.encode(images)
            x_BSD = self.encoder.begin(images, base.latents_BDhw)
        else:
            x_BSD = self.encoder.grow(x_BSD, iteration)
        x_BSD = self.encoder.iterate(x_BSD)
        tokens_BN = self.encoder.codes(self.encoder.latents(x_BSD))
        if self.codebook is not None:
            tokens_BN = self.codebook.ids(tokens_BN)
        candidate = self._candidate(images, base, tokens_BN)
        good_B = torch.zeros(len(state), dtype=torch.bool)
        for criterion, rows in state.by_criterion():
            here = slice(None) if rows is None else rows
            if criterion.measure is None:
                good_B[here] = length == criterion.length
                continue
            if rows is None:
                score_B = criterion.score(candidate)
            else:
                device_rows = rows.to(images.device)
                score_B = criterion.score(
                    self._candidate(images[device_rows], base.take(device_rows), tokens_BN[device_rows])
                )
            assert score_B is not None
            score_B = score_B.cpu()
            good_B[here] = criterion.satisfied(score_B)
            state.record(score_B, rows)
        done_B = good_B | state.may_end_at(length, self.config.max_tokens)
        state.finish(done_B, tokens_BN, good_B)
        if done_B.all():
            return None
        if self.config.halting != "off":  # of the done ones too: the model only ever sees whole slices
            assert base.ids_BG is not None
            x_BSD = self.encoder.mask(x_BSD, self._halted(candidate.predictions, base.ids_BG, iteration))
        return replace(state, base=base, x_BSD=x_BSD).take((~done_B).nonzero().squeeze(-1))

    def _candidate(self, images: Tensor, base: BaseTokens, tokens_BN: Tensor) -> Candidate:
        return Candidate(
            images,
            base,
            predict=lambda: self.decoder(self.to_codes(tokens_BN)),
            to_latents=lambda predictions: self.base.predicted(predictions, self.config.mixing),
            to_pixels=self.base.decode,
        )

    @torch.inference_mode()
    def encode_all(self, images: Images) -> tuple[Tensor, ...]:
        """The tokens of every length at once, shortest first: ids [B, N] (codes [B, N, C] for continuous latents)."""
        steps = self.rollout(self._prepare(images))
        return tuple((step.codes_BNC if step.ids_BN is None else step.ids_BN).cpu() for step in steps)

    def rollout(
        self,
        images: Float[Tensor, "B 3 H W"],
        *,
        base: BaseTokens | None = None,
        iterations: int | None = None,
        predict: Sequence[int] = (),
        halting_noise: Float[Tensor, "K B G"] | None = None,
        strength: float = 1.0,
    ) -> Iterator[Step]:
        """Runs iterations over the whole batch, one `Step` each, with gradients where they are enabled.

        Args:
            images: floats in [0, 1] at the model's size.
            base: their base tokens, where they are already known.
            iterations: how many; all by default.
            predict: the iterations (0, 1, ...) for which the latent decoder is wanted.
            halting_noise: uniform in [0, 1), of each image (training); the config's fixed noise when None.
            strength: how far codes are quantized, see `LatentCodebook.forward`.
        """
        if base is None:
            base = self.base.encode(images)
        count = iterations or self.config.iterations
        x_BSD = self.encoder.begin(images, base.latents_BDhw)
        for k in range(count):
            x_BSD = self.encoder.iterate(x_BSD)
            latents_BND = self.encoder.latents(x_BSD)
            codes_BNC = unquantized_BNC = self.encoder.codes(latents_BND)
            quantized = self._quantize(codes_BNC, strength)
            if quantized is not None:
                codes_BNC = quantized.codes_BNC
            halting = self.config.halting != "off" and k + 1 < count
            predictions_BGO = self.decoder(codes_BNC) if halting or k in predict else None
            yield Step(
                latents_BND,
                codes_BNC,
                quantized.ids_BN if quantized else None,
                unquantized_BNC,
                quantized.loss if quantized else codes_BNC.new_zeros(()),
                predictions_BGO,
            )
            if k + 1 < count:
                halted_BG = None
                if halting:
                    assert predictions_BGO is not None
                    assert base.ids_BG is not None
                    halted_BG = self._halted(predictions_BGO.detach(), base.ids_BG, k, halting_noise)
                x_BSD = self._grow(x_BSD, k + 1, halted_BG)

    # ---------------------------------------------------------------- decoding

    @torch.inference_mode()
    def decode(self, tokens: Tensor | Sequence[Ids]) -> Float[Tensor, "B 3 H W"]:
        """Images from the tokens of a batch of mixed lengths, each as if decoded alone.

        Args:
            tokens: one row of ids per image, of any of the model's lengths (rows of codes for continuous latents).

        Returns:
            Floats clamped to [0, 1], on the model's device.

        Raises:
            ValueError: a length that the model does not have, or an id outside its codebook.
        """
        rows = [self._check_tokens(i, torch.as_tensor(row)) for i, row in enumerate(tokens)]
        size = self.config.image_size
        images = torch.empty(len(rows), 3, size, size, device=self.encoder.positions.device)
        for length in sorted({len(row) for row in rows}):
            where = [i for i, row in enumerate(rows) if len(row) == length]
            codes_BNC = self.to_codes(torch.stack([rows[i] for i in where]))
            images[where] = self.reconstruct(codes_BNC).clamp(0, 1)
        return images

    def to_codes(self, tokens: Tensor) -> Float[Tensor, "B N C"]:
        """The codes that ids [B, N] stand for; continuous codes pass unchanged."""
        tokens = tokens.to(self.encoder.positions.device)
        return tokens if self.codebook is None else self.codebook.lookup(tokens.long())

    def reconstruct(self, codes_BNC: Float[Tensor, "B N C"]) -> Float[Tensor, "B 3 H W"]:
        """Unclamped images from codes of one length."""
        return self._pixels(self.decoder(codes_BNC))

    def _check_tokens(self, index: int, row: Tensor) -> Tensor:
        expected = 1 if self.codebook is not None else 2
        if row.ndim != expected or len(row) not in self.config.lengths:
            choices = ", ".join(map(str, self.config.lengths))
            raise ValueError(f"image {index}: this model decodes {choices} tokens, got the shape {tuple(row.shape)}")
        if self.codebook is None:
            if row.shape[1] != self.config.code_dim:
                raise ValueError(f"image {index}: codes must be {self.config.code_dim} wide, got {row.shape[1]}")
            return row
        if row.is_floating_point():
            raise ValueError(f"image {index}: ids must be whole numbers, got {row.dtype}")
        size = len(self.codebook.weight)
        row = row.long()
        if int(row.min()) < 0 or int(row.max()) >= size:
            raise ValueError(
                f"image {index}: ids must lie from 0 to {size - 1}, got {int(row.min())} to {int(row.max())}"
            )
        return row

    # ---------------------------------------------------------------- looking inside

    @torch.inference_mode()
    def attention_maps(self, images: Images) -> tuple[Float[Tensor, "B N g g"], ...]:
        """What each latent looks at, per iteration: attention over the base grid, each map summing to 1.

        Mean over the encoder's blocks and heads.
        """
        images = self._prepare(images)
        base, grid = self.base.encode(images), self.config.grid
        x_BSD = self.encoder.begin(images, base.latents_BDhw)
        maps = []
        for k in range(self.config.iterations):
            x_BSD, weights_BNG = self.encoder.attention(x_BSD)
            maps.append(weights_BNG.unflatten(-1, (grid, grid)).cpu())
            if k + 1 < self.config.iterations:
                halted_BG = None
                if self.config.halting != "off":
                    codes = self.encoder.codes(self.encoder.latents(x_BSD))
                    quantized = self._quantize(codes)
                    assert base.ids_BG is not None
                    predictions = self.decoder(codes if quantized is None else quantized.codes_BNC)
                    halted_BG = self._halted(predictions, base.ids_BG, k)
                x_BSD = self._grow(x_BSD, k + 1, halted_BG)
        return tuple(maps)


def build_base(config: VQGANConfig | KLConfig) -> VQGAN | KL:
    """The base tokenizer that a config describes, with random weights."""
    return VQGAN(config) if isinstance(config, VQGANConfig) else KL(config)
