"""Rollouts that share iterations: the state of the images in them, and the choice of images that run together.

An image leaves the rollout when it has enough tokens, so late iterations of one batch run on few rows. The pool joins
the images of several batches that wait for the same iteration, and runs them in slices of one size.

Shapes: B batch, H W pixels, S sequence, D width, N latents.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alit.encoding.criteria import Candidate, Criterion
from alit.encoding.results import ImageResult
from alit.model.base import BaseTokens


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutState:
    """Images of one or more batches between two iterations, with everything that the next iteration needs.

    Attributes:
        results: One per image, filled in during the rollout.
        images: Floats in [0, 1].
        base: The images' base tokens; None before the first iteration.
        x_BSD: The sequences after the last iteration; None before the first one.
    """

    results: list[ImageResult]
    images: Float[Tensor, "B 3 H W"]
    base: BaseTokens | None = None
    x_BSD: Float[Tensor, "B S D"] | None = None

    @staticmethod
    def start(images: Float[Tensor, "B 3 H W"], criterion: Criterion) -> RolloutState:
        """Creates the state before the first iteration, with one criterion for all images."""
        return RolloutState(results=[ImageResult(criterion=criterion) for _ in range(len(images))], images=images)

    def __len__(self) -> int:
        return len(self.results)

    def score(self, length: int, candidate_of: Callable[[Int[Tensor, "_"] | None], Candidate]) -> Bool[Tensor, "B"]:
        """Scores each image at one length by its own criterion, and appends the values to the traces.

        Args:
            length: The number of tokens.
            candidate_of: Returns the candidate for some rows (numbers on the CPU), or for all rows when None.

        Returns:
            Which images satisfy their criteria, on the CPU.
        """
        satisfied_B = torch.zeros(len(self), dtype=torch.bool)
        for criterion, rows in self._by_criterion():
            selected = slice(None) if rows is None else rows
            if criterion.is_fixed:
                satisfied_B[selected] = length == criterion.length
                continue
            score_B = criterion.score(candidate_of(rows))
            assert score_B is not None
            score_B = score_B.cpu()
            satisfied_B[selected] = criterion.satisfied(score_B)
            self.record(score_B, rows)
        return satisfied_B

    def record(self, score_B: Float[Tensor, "_"], rows: Int[Tensor, "_"] | None = None) -> None:
        """Appends scores to the traces of some images, or of all when `rows` is None; both tensors are on the CPU."""
        results = self.results if rows is None else [self.results[row] for row in rows.tolist()]
        for result, value in zip(results, score_B.tolist(), strict=True):
            result.trace.append(value)

    def _by_criterion(self) -> list[tuple[Criterion, Int[Tensor, "_"] | None]]:
        """Returns the criteria with the rows under each, on the CPU; None for all rows."""
        rows: dict[Criterion, list[int]] = {}
        for row, result in enumerate(self.results):
            rows.setdefault(result.criterion, []).append(row)
        if len(rows) == 1:
            return [(criterion, None) for criterion in rows]
        return [(criterion, torch.tensor(numbers)) for criterion, numbers in rows.items()]

    def at_limit(self, length: int, max_tokens: int) -> Bool[Tensor, "B"]:
        """Returns which images may not get more tokens than `length`; `max_tokens` is the limit of those without."""
        return torch.tensor([length >= (result.max_tokens or max_tokens) for result in self.results], dtype=torch.bool)

    def finish(self, done_B: Bool[Tensor, "B"], tokens_BN: Tensor, satisfied_B: Bool[Tensor, "B"]) -> None:
        """Writes the tokens of this length into the results that are done; both masks are on the CPU."""
        if done_B.any():
            rows = done_B.nonzero().squeeze(-1)
            for row, tokens in zip(rows.tolist(), tokens_BN[rows.to(tokens_BN.device)].cpu(), strict=True):
                self.results[row].tokens = tokens
                self.results[row].satisfied = bool(satisfied_B[row])

    @torch.inference_mode()
    def take(self, rows: Int[Tensor, "_"]) -> RolloutState:
        """Returns some images, in order; a copy unless all are taken. The row numbers are on the CPU."""
        if len(rows) == len(self):
            return self
        device_rows = rows.to(self.images.device)
        return RolloutState(
            results=[self.results[row] for row in rows.tolist()],
            images=self.images[device_rows],
            base=None if self.base is None else self.base.take(device_rows),
            x_BSD=None if self.x_BSD is None else self.x_BSD[device_rows],
        )

    def split(self, size: int) -> list[RolloutState]:
        """Splits the images, in order, into states of at most `size` images."""
        return [self.take(rows) for rows in torch.arange(len(self)).split(size)] if len(self) else []

    @staticmethod
    @torch.inference_mode()
    def concatenate(states: Sequence[RolloutState]) -> RolloutState:
        """Joins one or more states that wait for the same iteration."""
        if len(states) == 1:
            return states[0]
        bases = [state.base for state in states if state.base is not None]
        sequences = [state.x_BSD for state in states if state.x_BSD is not None]
        return RolloutState(
            results=[result for state in states for result in state.results],
            images=torch.cat([state.images for state in states]),
            base=BaseTokens.concatenate(bases) if bases else None,
            x_BSD=torch.cat(sequences) if sequences else None,
        )


class Pool:
    """One first-in, first-out queue of waiting images per iteration.

    Args:
        iterations: The number of iterations, K.
        size: The number of rows that run together; the size of the first state added when None.
    """

    def __init__(self, iterations: int, size: int | None = None) -> None:
        self.size = size
        self._waiting: list[deque[RolloutState]] = [deque() for _ in range(iterations)]

    def add(self, iteration: int, state: RolloutState) -> None:
        """Queues images for an iteration (0, 1, ...)."""
        self.size = self.size or len(state)
        self._waiting[iteration].extend(state.split(self.size))

    def ready(self, *, flush: bool = False) -> int | None:
        """Returns the iteration to run next: the deepest for which a full slice waits, or None.

        Args:
            flush: Where no slice is full, choose the shallowest iteration for which any image waits: its remaining
                images join those that wait for deeper ones.
        """
        rows = {k: count for k, states in enumerate(self._waiting) if (count := sum(map(len, states)))}
        full = [k for k, count in rows.items() if count >= (self.size or 1)]
        if full:
            return max(full)
        return min(rows) if flush and rows else None

    def take(self, iteration: int) -> RolloutState:
        """Removes and returns the next slice for an iteration: `size` images, or all that wait if fewer."""
        assert self.size is not None
        states, room, waiting = [], self.size, self._waiting[iteration]
        while room and waiting:
            state = waiting.popleft()
            if len(state) > room:
                first, rest = torch.arange(len(state)).tensor_split([room])
                waiting.appendleft(state.take(rest))
                state = state.take(first)
            states.append(state)
            room -= len(state)
        return RolloutState.concatenate(states)


def pooled(
    arrivals: Iterable[RolloutState], advance: Callable[[RolloutState, int], RolloutState | None], pool: Pool
) -> Iterator[list[ImageResult]]:
    """Runs batches of images through their iterations, pulling the next batch only when no full slice waits.

    With K iterations and slices of `size` images, at most K * (size - 1) images wait when a batch is pulled.

    Args:
        arrivals: The batches, before their first iteration.
        advance: Runs one iteration, fills in the results that it completes, and returns the images that need another.
        pool: An empty pool.

    Yields:
        The results of each batch, in order, as soon as they and those of all earlier batches are complete.
    """
    pending: deque[list[ImageResult]] = deque()
    for state in chain(arrivals, [None]):
        if state is not None:
            pending.append(state.results)
            pool.add(0, state)
        yield from _complete(pending)  # an empty batch needs no iteration
        while (k := pool.ready(flush=state is None)) is not None:
            remaining = advance(pool.take(k), k)
            if remaining is not None:
                pool.add(k + 1, remaining)
            yield from _complete(pending)


def _complete(batches: deque[list[ImageResult]]) -> Iterator[list[ImageResult]]:
    while batches and all(result.tokens is not None for result in batches[0]):
        yield batches.popleft()
