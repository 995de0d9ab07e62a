"""Rollouts that share iterations: what each image carries along, and which images run together.

An image leaves the rollout when it has enough tokens, so that late iterations of one batch run on few rows. Here the
images of several batches that wait for the same iteration run it together, in slices of one size.

Shapes: B batch, H W pixels, S sequence, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alit.encoding.criteria import Criterion
from alit.encoding.results import ImageResult
from alit.model.base import BaseTokens


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """Images between two iterations, of one batch or of several, with all that moves along with them.

    Attributes:
        answers: one per image, filled in on the way.
        images: floats in [0, 1].
        base: their base tokens; None before the first iteration.
        x_BSD: what the last iteration left of their sequences; None before the first one.
    """

    answers: list[ImageResult]
    images: Float[Tensor, "B 3 H W"]
    base: BaseTokens | None = None
    x_BSD: Float[Tensor, "B S D"] | None = None

    @staticmethod
    def of(images: Float[Tensor, "B 3 H W"], criterion: Criterion) -> State:
        """Images before their first iteration, all under one criterion."""
        return State(answers=[ImageResult(criterion=criterion) for _ in range(len(images))], images=images)

    def __len__(self) -> int:
        return len(self.answers)

    def by_criterion(self) -> list[tuple[Criterion, Int[Tensor, "_"] | None]]:
        """The criteria with the rows that are under each, on the CPU; None for all rows."""
        rows: dict[Criterion, list[int]] = {}
        for row, answer in enumerate(self.answers):
            rows.setdefault(answer.criterion, []).append(row)
        if len(rows) == 1:
            return [(criterion, None) for criterion in rows]
        return [(criterion, torch.tensor(found)) for criterion, found in rows.items()]

    def may_end_at(self, length: int, longest: int) -> Bool[Tensor, "B"]:
        """Which images may get no longer code than this one."""
        return torch.tensor([length >= (answer.most or longest) for answer in self.answers], dtype=torch.bool)

    def record(self, score_B: Float[Tensor, "_"], rows: Int[Tensor, "_"] | None) -> None:
        """Adds the criterion's values of some images at one more length; all of it lies on the CPU."""
        answers = self.answers if rows is None else [self.answers[row] for row in rows.tolist()]
        for answer, score in zip(answers, score_B.tolist(), strict=True):
            answer.trace.append(score)

    def finish(self, done_B: Bool[Tensor, "B"], tokens_BN: Tensor, satisfied_B: Bool[Tensor, "B"]) -> None:
        """Answers the images that are done, with the tokens of this length; both masks lie on the CPU."""
        if done_B.any():
            rows = done_B.nonzero().squeeze(-1)
            for row, tokens in zip(rows.tolist(), tokens_BN[rows.to(tokens_BN.device)].cpu(), strict=True):
                self.answers[row].tokens = tokens
                self.answers[row].satisfied = bool(satisfied_B[row])

    @torch.inference_mode()
    def take(self, rows: Int[Tensor, "_"]) -> State:
        """Some of the images in their order, copied unless it is all of them; the row numbers lie on the CPU."""
        if len(rows) == len(self):
            return self
        here = rows.to(self.images.device)
        return State(
            answers=[self.answers[row] for row in rows.tolist()],
            images=self.images[here],
            base=None if self.base is None else self.base.take(here),
            x_BSD=None if self.x_BSD is None else self.x_BSD[here],
        )

    def split(self, size: int) -> list[State]:
        """The images in order, at most `size` of them in a state."""
        return [self.take(rows) for rows in torch.arange(len(self)).split(size)] if len(self) else []

    @staticmethod
    @torch.inference_mode()
    def concatenate(states: Sequence[State]) -> State:
        """The images of one or more states that wait for the same iteration."""
        if len(states) == 1:
            return states[0]
        bases = [state.base for state in states if state.base is not None]
        sequences = [state.x_BSD for state in states if state.x_BSD is not None]
        return State(
            answers=[answer for state in states for answer in state.answers],
            images=torch.cat([state.images for state in states]),
            base=BaseTokens.concatenate(bases) if bases else None,
            x_BSD=torch.cat(sequences) if sequences else None,
        )


class Pool:
    """Images that wait, by the iteration that they wait for; first come, first served.

    Args:
        iterations: how many there are, K.
        size: how many rows run together; as many as come first when None.
    """

    def __init__(self, iterations: int, size: int | None = None) -> None:
        self.size = size
        self._waiting: list[deque[State]] = [deque() for _ in range(iterations)]

    def add(self, iteration: int, state: State) -> None:
        """Lets images wait for an iteration (0, 1, ...)."""
        self.size = self.size or len(state)
        self._waiting[iteration].extend(state.split(self.size))

    def ready(self, *, flush: bool = False) -> int | None:
        """The iteration to run next, or None: the deepest for which a full slice waits.

        Args:
            flush: where no slice is full, the shallowest for which any image waits: its survivors join deeper ones.
        """
        rows = {k: count for k, states in enumerate(self._waiting) if (count := sum(map(len, states)))}
        full = [k for k, count in rows.items() if count >= (self.size or 1)]
        if full:
            return max(full)
        return min(rows) if flush and rows else None

    def take(self, iteration: int) -> State:
        """The next slice for an iteration: `size` images, or as many as wait."""
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
        return State.concatenate(states)


def pooled(
    arrivals: Iterable[State], advance: Callable[[State, int], State | None], pool: Pool
) -> Iterator[list[ImageResult]]:
    """Runs batches of images through their iterations, pulling the next batch only when no full slice waits.

    Of a pool of K iterations and a size no more than K * (size - 1) images wait when a batch is pulled.

    Args:
        arrivals: the batches, before their first iteration.
        advance: runs one iteration, fills in the answers that it finds, and returns the images that need another one.
        pool: an empty one.

    Yields:
        The answers of each batch, in order, as soon as they and those of all earlier batches are complete.
    """
    unanswered: deque[list[ImageResult]] = deque()
    for state in chain(arrivals, [None]):
        if state is not None:
            unanswered.append(state.answers)
            pool.add(0, state)
        yield from _complete(unanswered)  # an empty batch needs no iteration
        while (k := pool.ready(flush=state is None)) is not None:
            survivors = advance(pool.take(k), k)
            if survivors is not None:
                pool.add(k + 1, survivors)
            yield from _complete(unanswered)


def _complete(batches: deque[list[ImageResult]]) -> Iterator[list[ImageResult]]:
    while batches and all(answer.tokens is not None for answer in batches[0]):
        yield batches.popleft()
