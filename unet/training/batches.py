"""The order of training samples, and the randomness of each, as functions of the seed alone.

Sample `index` of `epoch` draws from a generator seeded by (seed, epoch, index). So nothing of it
needs restoring when a run resumes, and neither the number of worker processes nor the number of
training processes changes a sample.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from unet.errors import InputError

Key = tuple[int, int]  # (epoch, index)


class Samples(Protocol):
    """Training samples. `samples[epoch, index]` is a dictionary of tensors of fixed shapes."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Key) -> dict[str, Any]: ...

    def name(self, index: int) -> str:
        """The file a sample comes from, for messages."""
        ...


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator from which everything random in one sample is drawn."""
    return np.random.default_rng((seed, epoch, index))


class BatchKeys(Sampler[list[Key]]):
    """The keys of every batch from a step on, without end.

    The stream of keys is one random permutation of the indices after the other. A step takes the
    next `batch_size` of them, cut into equal parts for `accumulate` rounds of `processes`.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        start_step: int = 0,
        accumulate: int = 1,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        if batch_size % (accumulate * processes):
            raise InputError(
                f"--batch-size {batch_size} cannot be cut into --accumulate {accumulate} parts for "
                f"{processes} processes: give a multiple of {accumulate * processes}"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start_step, self.accumulate = start_step, accumulate
        self.process, self.processes = process, processes
        self._order: tuple[int, list[int]] = (-1, [])  # an epoch and its permutation

    def __iter__(self) -> Iterator[list[Key]]:
        part = self.batch_size // (self.accumulate * self.processes)
        step = self.start_step
        while True:
            for turn in range(self.accumulate):
                first = step * self.batch_size + (turn * self.processes + self.process) * part
                yield [self._key(first + i) for i in range(part)]
            step += 1

    def _key(self, position: int) -> Key:
        epoch, place = divmod(position, self.length)
        if self._order[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._order = (epoch, rng.permutation(self.length).tolist())
        return epoch, self._order[1][place]


class _Indexed(torch.utils.data.Dataset[dict[str, Any]]):
    """The samples, each with its index, so that a bad batch can be traced to its files."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return {**self.samples[key], "index": key[1]}


def _outlive_one_signal(worker: int) -> None:
    """A signal to the whole process group is for the training process, which ends its workers."""

    def pass_over(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_over)


def make_loader(samples: Samples, keys: BatchKeys, workers: int, *, pin: bool) -> DataLoader[Any]:
    """An endless loader of collated batches in the order of `keys`."""
    return DataLoader(
        _Indexed(samples),
        batch_sampler=keys,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_outlive_one_signal,
        generator=torch.Generator(),  # else each start draws from the generator of the dropout
    )
