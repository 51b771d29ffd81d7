"""Examples made into batches for PaddleNLP's Trainer, in an order that a seed and an epoch decide."""

from __future__ import annotations

from peft_deploy.environment import require_paddle

require_paddle("training")

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import paddle.io

from peft_deploy.text import pad_batch
from peft_deploy.training.encoding import Example

IGNORED = -100  # the label of a position that does not count


class Examples(paddle.io.Dataset):  # type: ignore[misc]
    """The encoded examples as what Paddle calls a dataset."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def __len__(self) -> int:
        return len(self._examples)


class Collator:
    """Makes a batch: rows padded on the right to the longest of them.

    Args:
        pad_id: what stands in the padding.
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, npt.NDArray[np.int64]]:
        """``input_ids``, ``attention_mask`` and ``labels``, all int64 [B, S].

        The labels are shifted: at each position stands the token that follows it, because
        PaddleNLP's losses compare position by position and shift nothing themselves.
        """
        batch = pad_batch([example.ids for example in examples], self._pad_id, "right")
        labels = np.full_like(batch.input_ids, IGNORED)  # [B, S]
        for row, example in enumerate(examples):
            following = np.where(example.learned[1:], example.ids[1:], IGNORED)
            labels[row, : len(following)] = following
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": labels,
        }


class SeededBatches(paddle.io.DistributedBatchSampler):  # type: ignore[misc]
    """Batches of example numbers, shuffled anew for each epoch.

    The order depends on nothing but the seed and the epoch that the Trainer announces, so a
    resumed run sees the batches that the first one would have seen. Batches at the end of an epoch
    that fill no step are left out: the Trainer would add their gradients to the first step of the
    next epoch.

    Args:
        dataset: the examples.
        batch_size: examples in a batch, on each rank.
        seed: decides the order.
        accumulation: batches in a step.
        ranks: number of data-parallel processes.
        rank: this one's.
    """

    def __init__(
        self,
        dataset: Examples,
        batch_size: int,
        seed: int,
        accumulation: int = 1,
        ranks: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(dataset, batch_size, num_replicas=ranks, rank=rank, shuffle=True)
        self._seed = seed
        self._accumulation = accumulation
        self.set_epoch(0)

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(super().__iter__(), len(self))

    def __len__(self) -> int:
        return int(super().__len__()) // self._accumulation * self._accumulation

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch."""
        super().set_epoch(_mixed(self._seed, epoch))


def _mixed(*numbers: int) -> int:
    """One seed of several numbers; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def step_seed(seed: int, step: int, part: int, rank: int) -> int:
    """The seed of dropout in one forward pass."""
    return _mixed(seed, step, part, rank)
