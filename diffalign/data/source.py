"""The source of training batches: which pairs an optimizer step sees, and the random numbers of each visit.

Nothing is remembered between calls. The run visits the pairs in one endless sequence, epoch after epoch, each a
permutation of all pairs that depends on (seed, epoch) only; optimizer step s takes the next `global_batch_size`
of it. Resuming at a step is therefore asking for that step, and what a pair draws does not depend on the number of
processes or on how a step is cut into micro-batches.

Pairs of several sizes (`data.aspect_ratio_buckets`) are visited in another sequence, of whole micro-batches of one size
each; see `ShuffledBuckets`. It depends on the pairs of a micro-batch too, and on nothing else: processes and
accumulation may be traded for one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import torch

from diffalign.batches import Moments, PairBatch
from diffalign.data.encoded import EncodedPairs
from diffalign.data.order import Order, ShuffledBuckets, ShuffledEpochs
from diffalign.helper_threads import helper_threads
from diffalign.randomness import Draw, generator

VALIDATION_EPOCH = -1
"""The epoch of `fixed_batches`: no training visit draws the same numbers."""


class PairSource:
    """Batches of encoded pairs as a pure function of (step, micro step).

    The step's pairs are cut into consecutive slices of `batch_size`: micro step 0 of process 0, of process 1, ...,
    then micro step 1. Any split of the same global batch gives the same set of pairs with the same numbers.

    Args:
        encoded: The pairs.
        seed: Seed of the run.
        batch_size: Pairs per process and micro step.
        gradient_accumulation_steps: Micro steps per optimizer step.
        num_processes: Processes that share a step.
        process_index: Which of them this is.
        caption_dropout: Probability that a visit sees the empty prompt, for both images of the pair.
        draws_per_pair: After so many visits a pair repeats its draws, from the first one on; None draws anew always.
        prefetch: Read the next batch in a thread while this one is trained on.

    Raises:
        ValueError: If there is no pair, or a number is out of range.
    """

    def __init__(
        self,
        encoded: EncodedPairs,
        *,
        seed: int,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        caption_dropout: float = 0.0,
        draws_per_pair: int | None = None,
        prefetch: bool = True,
    ) -> None:
        if len(encoded) == 0:
            raise ValueError("there is no pair to train on")
        sizes = (batch_size, gradient_accumulation_steps, num_processes)
        if min(sizes) < 1:
            raise ValueError(f"batch size, accumulation steps and processes must be at least 1, got {sizes}")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index must be in 0..{num_processes - 1}, got {process_index}")
        if not 0.0 <= caption_dropout <= 1.0:
            raise ValueError(f"caption_dropout must be a probability in [0, 1], got {caption_dropout}")
        if draws_per_pair is not None and draws_per_pair < 1:
            raise ValueError(f"draws_per_pair must be at least 1, got {draws_per_pair}")
        self.encoded = encoded
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.draws_per_pair = draws_per_pair
        self.global_batch_size = batch_size * gradient_accumulation_steps * num_processes
        self._batch_size = batch_size
        self._micro_steps = gradient_accumulation_steps
        self._num_processes = num_processes
        self._process_index = process_index
        buckets = encoded.buckets
        self._order: Order = (
            ShuffledEpochs(len(encoded), seed) if buckets is None else ShuffledBuckets(buckets, seed, batch_size)
        )
        self._thread = helper_threads(1, "pairs") if prefetch else None
        self._next: tuple[tuple[int, int], Future[PairBatch]] | None = None

    def batch(self, step: int, micro_step: int) -> PairBatch:
        """This process's batch of one micro step, `batch_size` pairs on the CPU, latents float32.

        Of data with winners only, `rejected` is `chosen`.

        Args:
            step: Optimizer step, from 0.
            micro_step: 0 to `gradient_accumulation_steps - 1`.
        """
        if step < 0 or not 0 <= micro_step < self._micro_steps:
            raise ValueError(f"no micro step {micro_step} of step {step}; steps have {self._micro_steps}")
        if self._thread is None:
            return self._load(step, micro_step)
        ready = self._next
        result = ready[1].result() if ready and ready[0] == (step, micro_step) else self._load(step, micro_step)
        following = (step, micro_step + 1) if micro_step + 1 < self._micro_steps else (step + 1, 0)
        self._next = (following, self._thread.submit(self._load, *following))
        return result

    def visits(self, step: int, first: int = 0, count: int | None = None) -> list[tuple[int, Draw]]:
        """The rows of an optimizer step over all processes, each with the random numbers of its visit.

        Args:
            step: Optimizer step, from 0.
            first: Where in the global batch to start.
            count: How many; None takes all.
        """
        start = step * self.global_batch_size + first
        visits = []
        for position in range(start, start + (self.global_batch_size - first if count is None else count)):
            row, epoch = self._order.at(position)
            drawn = epoch % self.draws_per_pair if self.draws_per_pair else epoch
            visits.append((row, Draw(self.seed, drawn, self.encoded.pair_id(row))))
        return visits

    def own_visits(self, step: int, micro_step: int) -> list[tuple[int, Draw]]:
        """As `visits`, of this process's batch of one micro step."""
        first = (micro_step * self._num_processes + self._process_index) * self._batch_size
        return self.visits(step, first, self._batch_size)

    def at(self, visits: Sequence[tuple[int, int]]) -> PairBatch:
        """The batch of any visits, given as rows and epochs, with the draws that training has there."""
        draws = [(row, Draw(self.seed, epoch, self.encoded.pair_id(row))) for row, epoch in visits]
        return self._assemble(draws, training=True)

    def update(self, step: int) -> None:
        """Nothing: a fixed data set does not follow the policy."""

    def fixed_batches(self, count: int, batch_size: int | None = None) -> list[PairBatch]:
        """The same pairs with the same draws at every call and in every process, for validation.

        The draws are those of epoch -1; no caption is dropped and no image mirrored.

        Args:
            count: How many pairs, chosen by the seed; all if there are fewer.
            batch_size: Pairs per batch; None takes that of training. The last batch may be smaller, that of each
                size of pictures.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        order = torch.randperm(len(self.encoded), generator=generator(self.seed, "validation"))[:count].tolist()
        buckets, size = self.encoded.buckets, batch_size or self._batch_size
        alike: dict[int, list[tuple[int, Draw]]] = {}
        for row in order:
            visit = (row, Draw(self.seed, VALIDATION_EPOCH, self.encoded.pair_id(row)))
            alike.setdefault(0 if buckets is None else int(buckets[row]), []).append(visit)
        cut = [visits[i : i + size] for _, visits in sorted(alike.items()) for i in range(0, len(visits), size)]
        return [self._assemble(visits, training=False) for visits in cut]

    def _load(self, step: int, micro_step: int) -> PairBatch:
        return self._assemble(self.own_visits(step, micro_step), training=True)

    def _assemble(self, visits: Sequence[tuple[int, Draw]], *, training: bool) -> PairBatch:
        rows = [row for row, _ in visits]
        draws = tuple(draw for _, draw in visits)
        flip = training and self.encoded.flipped
        mirrored = [draw.uniform("flip") < 0.5 for draw in draws] if flip else None
        dropout = self.caption_dropout if training else 0.0
        dropped = [dropout > 0.0 and draw.uniform("caption") < dropout for draw in draws]
        moments = self.encoded.moments(rows, mirrored)
        chosen = self._latents(moments[0], draws, "posterior/chosen")
        winners = self.encoded.winners_only
        batch = PairBatch(
            conditioning=self.encoded.conditioning(rows, dropped),
            chosen=chosen,
            rejected=chosen if winners else self._latents(moments[1], draws, "posterior/rejected"),
            weight=self.encoded.weights(rows),
            draws=draws,
        )
        # Pinned here, in the thread that reads ahead, so that the copy to the GPU does not wait.
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def _latents(self, moments: Moments, draws: Sequence[Draw], purpose: str) -> torch.Tensor:
        if self.encoded.sampled:
            return moments.mean
        noise = torch.stack([draw.normal(purpose, moments.mean.shape[1:]) for draw in draws])
        return moments.mean + moments.std * noise
