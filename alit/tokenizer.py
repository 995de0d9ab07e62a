"""Alit: images to adaptive-length tokens, and back.

Shapes: B batch, C code width, G base tokens, g base tokens along one side, N latents, K iterations, S sequence,
D width, O prediction width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from alit.encoding.criteria import Candidate, Criterion, parse
from alit.encoding.pool import Pool, RolloutState, pooled
from alit.encoding.results import Encoded, ImageResult, RolloutStep
from alit.encoding.tokens import Tokens, check_tokens
from alit.model.base import BaseTokens
from alit.model.codebook import LatentCodebook
from alit.model.config import AlitConfig, KLConfig, VQGANConfig
from alit.model.distillation import LatentDecoder, LatentEncoder, initialize
from alit.model.halting import fixed_noise, halting_mask
from alit.model.kl import KL
from alit.model.vqgan import VQGAN
from alit.validation import require_range

Images = UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]
Batches = Iterable[UInt8[Tensor, "_ 3 H W"] | Float[Tensor, "_ 3 H W"]]


class Alit(nn.Module):
    """The adaptive-length image tokenizer of arXiv 2411.02393.

    The inference methods (`encode`, `encode_batches`, `encode_each`, `encode_all`, `decode`, `attention_maps`) record
    no gradients, draw no random numbers and give each image the result that it would get alone. `rollout` is the
    differentiable path for training.

    Args:
        config: The architecture; all weights start at random values.
    """

    halting_KG: Tensor

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
        """Recomputes the buffer that weights files do not store: the fixed noise of sampled halting, [K, G]."""
        self.halting_KG = fixed_noise(self.config).to(self.encoder.positions.device)

    # ---------------------------------------------------------------- steps of one iteration

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

    def _halt(
        self, x_BSD: Tensor, base: BaseTokens, predictions_BGO: Tensor, iteration: int, noise: Tensor | None = None
    ) -> Tensor:
        """Masks the base tokens that are predicted well enough after an iteration."""
        assert base.ids_BG is not None, "the config allows halting with a discrete base only"
        noise = self.halting_KG if noise is None else noise
        halted_BG = halting_mask(predictions_BGO, base.ids_BG, noise, iteration, self.config)
        return self.encoder.mask(x_BSD, halted_BG)

    # ---------------------------------------------------------------- encoding

    def encode(self, images: Images, criterion: Criterion | str | None = None) -> Encoded:
        """Encodes each image with as many tokens as it needs.

        Each iteration runs only on the images that need more tokens; the others leave the batch.

        Args:
            images: [B, 3, H, W] at the model's size, uint8 or floats in [0, 1].
            criterion: `name:threshold` or a parsed criterion; the config's default when None.

        Returns:
            The tokens, on the CPU.

        Raises:
            ValueError: The images have another shape or type, or the model cannot follow the criterion.
        """
        (encoded,) = self.encode_batches([images], criterion)
        return encoded

    def encode_batches(
        self, batches: Batches, criterion: Criterion | str | None = None, batch_size: int | None = None
    ) -> Iterator[Encoded]:
        """Encodes a stream of batches; images of several batches share iterations.

        Every iteration runs on exactly `batch_size` images, on fewer only at the end of the stream, and the next batch
        is pulled only when fewer than that wait for each iteration. The same batches give the same bits again; split
        into other batches, images get the same tokens within rounding, as with `encode`.

        Args:
            batches: Each [B, 3, H, W] as in `encode`, of any size, empty ones too. Images may wait, so a batch must
                not change before its result is returned.
            criterion: `name:threshold` or a parsed criterion; the config's default when None.
            batch_size: The number of images per iteration; the size of the first batch that is not empty when None.

        Returns:
            One `Encoded` per batch, in order, each as soon as its last image and all earlier batches are done. When a
            batch is pulled, fewer than K * batch_size images wait on the device. An image may wait for the end of the
            stream where few others need as many tokens; the results of later batches wait with it, on the CPU.

        Raises:
            ValueError: At once if `batch_size` is below 1 or the model cannot follow the criterion; when a batch is
                pulled if its images have another shape or type.
        """
        if not isinstance(criterion, Criterion):
            criterion = parse(criterion or self.config.criterion)
        criterion.check(self.config)
        require_range("batch_size", batch_size, 1, error=ValueError)
        arrivals = (RolloutState.start(self._prepare(images), criterion) for images in batches)
        completed = pooled(arrivals, self._advance, Pool(self.config.iterations, batch_size))
        return (Encoded.join(results, self.config) for results in completed)

    def encode_each(
        self, images: Images, criteria: Sequence[Criterion], max_tokens: Sequence[int | None] | None = None
    ) -> Iterator[list[tuple[int, ImageResult]]]:
        """Encodes images in one rollout, each under its own criterion.

        Args:
            images: [B, 3, H, W] as in `encode`.
            criteria: One per image.
            max_tokens: The longest code that each image may get, whatever its criterion; None for the model's longest.

        Returns:
            After every iteration, the images that it completed, with their indices in the batch.

        Raises:
            ValueError: The images have another shape or type, or the model lacks a criterion or a length.
        """
        for criterion in dict.fromkeys(criteria):
            criterion.check(self.config)
        limits = [limit or self.config.max_tokens for limit in max_tokens or [None] * len(criteria)]
        if unknown := set(limits).difference(self.config.lengths):
            choices = ", ".join(map(str, self.config.lengths))
            raise ValueError(f"this model gives {choices} tokens, not {min(unknown)}")
        results = [ImageResult(criterion=c, max_tokens=n) for c, n in zip(criteria, limits, strict=True)]
        indices = {id(result): index for index, result in enumerate(results)}
        state = RolloutState(results=results, images=self._prepare(images)) if results else None

        def rounds(state: RolloutState | None) -> Iterator[list[tuple[int, ImageResult]]]:
            iteration = 0
            while state is not None:
                running = state.results
                state, iteration = self._advance(state, iteration), iteration + 1
                yield [(indices[id(result)], result) for result in running if result.tokens is not None]

        return rounds(state)

    @torch.inference_mode()
    def _advance(self, state: RolloutState, iteration: int) -> RolloutState | None:
        """Runs one iteration, fills in the results that it completes, and returns the other images; None if none."""
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

        def candidate_of(rows: Int[Tensor, "_"] | None) -> Candidate:
            if rows is None:
                return candidate
            rows = rows.to(images.device)
            return self._candidate(images[rows], base.take(rows), tokens_BN[rows])

        satisfied_B = state.score(length, candidate_of)
        done_B = satisfied_B | state.at_limit(length, self.config.max_tokens)
        state.finish(done_B, tokens_BN, satisfied_B)
        if done_B.all():
            return None
        if self.config.halting != "off":  # on completed images too, so that the model only ever runs on whole slices
            x_BSD = self._halt(x_BSD, base, candidate.predictions, iteration)
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
        """Returns the tokens of every length, shortest first: ids [B, N], or codes [B, N, C] of continuous latents."""
        steps = self.rollout(self._prepare(images))
        return tuple((step.codes_BNC if step.ids_BN is None else step.ids_BN).cpu() for step in steps)

    @torch.inference_mode()
    def attention_maps(self, images: Images) -> tuple[Float[Tensor, "B N g g"], ...]:
        """Returns each latent's attention over the base grid at every iteration, on the CPU.

        Maps are means over the encoder's blocks and heads, and sum to 1.
        """
        steps = self.rollout(self._prepare(images), attention=True)
        shares = (step.attention_BNG for step in steps)
        grid = (self.config.grid, self.config.grid)
        return tuple(share.unflatten(-1, grid).cpu() for share in shares if share is not None)

    def rollout(
        self,
        images: Float[Tensor, "B 3 H W"],
        *,
        base: BaseTokens | None = None,
        iterations: int | None = None,
        predict: Sequence[int] = (),
        halting_noise: Float[Tensor, "K B G"] | None = None,
        strength: float = 1.0,
        attention: bool = False,
    ) -> Iterator[RolloutStep]:
        """Runs iterations on the whole batch, one `RolloutStep` each, with gradients where they are enabled.

        Args:
            images: Floats in [0, 1] at the model's size.
            base: The images' base tokens, where they are already known.
            iterations: The number of iterations; all by default.
            predict: The iterations (0, 1, ...) at which to run the latent decoder.
            halting_noise: Uniform in [0, 1), for each image (training); the config's fixed noise when None.
            strength: The degree of quantization, see `LatentCodebook.forward`.
            attention: Also return the attention of latents to base tokens.

        Yields:
            The state after each iteration.
        """
        if base is None:
            base = self.base.encode(images)
        count = iterations or self.config.iterations
        x_BSD = self.encoder.begin(images, base.latents_BDhw)
        for k in range(count):
            x_BSD, attention_BNG = self.encoder.attention(x_BSD) if attention else (self.encoder.iterate(x_BSD), None)
            latents_BND = self.encoder.latents(x_BSD)
            codes_BNC = unquantized_BNC = self.encoder.codes(latents_BND)
            quantized = self.codebook(codes_BNC, strength) if self.codebook is not None else None
            if quantized is not None:
                codes_BNC = quantized.codes_BNC
            halts = self.config.halting != "off" and k + 1 < count
            predictions_BGO = self.decoder(codes_BNC) if halts or k in predict else None
            yield RolloutStep(
                latents_BND,
                codes_BNC,
                quantized.ids_BN if quantized else None,
                unquantized_BNC,
                quantized.loss if quantized else codes_BNC.new_zeros(()),
                predictions_BGO,
                attention_BNG,
            )
            if k + 1 < count:
                if predictions_BGO is not None and halts:
                    x_BSD = self._halt(x_BSD, base, predictions_BGO, k, halting_noise)
                x_BSD = self.encoder.grow(x_BSD, k + 1)

    # ---------------------------------------------------------------- decoding

    @torch.inference_mode()
    def decode(self, tokens: Tensor | Sequence[Tokens]) -> Float[Tensor, "B 3 H W"]:
        """Decodes a batch of tokens of mixed lengths, each image as if alone.

        Args:
            tokens: One row of ids per image, of any of the model's lengths (rows of codes for continuous latents).

        Returns:
            Images clamped to [0, 1], on the model's device.

        Raises:
            ValueError: The model does not have a row's length, or an id is outside its codebook.
        """
        rows = [check_tokens(index, torch.as_tensor(row), self.config) for index, row in enumerate(tokens)]
        size = self.config.image_size
        images = self.encoder.positions.new_empty(len(rows), 3, size, size)
        for length in sorted({len(row) for row in rows}):
            indices = [index for index, row in enumerate(rows) if len(row) == length]
            codes_BNC = self.to_codes(torch.stack([rows[index] for index in indices]))
            images[indices] = self.reconstruct(codes_BNC).clamp(0, 1)
        return images

    def to_codes(self, tokens: Tensor) -> Float[Tensor, "B N C"]:
        """Returns the codes of ids [B, N]; codes of continuous latents pass unchanged."""
        tokens = tokens.to(self.encoder.positions.device)
        return tokens if self.codebook is None else self.codebook.lookup(tokens.long())

    def reconstruct(self, codes_BNC: Float[Tensor, "B N C"]) -> Float[Tensor, "B 3 H W"]:
        """Decodes codes of one length to images, unclamped."""
        return self.base.decode(self.base.predicted(self.decoder(codes_BNC), self.config.mixing))


def build_base(config: VQGANConfig | KLConfig) -> VQGAN | KL:
    """Builds the base tokenizer that a config describes, with random weights."""
    return VQGAN(config) if isinstance(config, VQGANConfig) else KL(config)
