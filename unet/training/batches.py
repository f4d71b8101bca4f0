"""The order of training samples, and the randomness of each, as functions of the seed alone.

Sample `index` of `epoch` draws from a generator seeded by (seed, epoch, index). So nothing of it
needs restoring when a run resumes, and neither the number of worker processes nor the number of
training processes changes a sample.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, default_collate

from unet.errors import InputError, RunError

Key = tuple[int, int]  # (epoch, index)
Draw = tuple[int, int, int]  # (position, epoch, index)


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


class BatchKeys(Sampler[list[Draw]]):
    """The draws of every batch from a step on, without end.

    The stream of keys is one random permutation of the indices after the other. A step takes the
    next `batch_size` of them, cut into equal parts for `accumulate` rounds of `processes`. With
    each key comes its position in the stream, and so in the batch of all processes.
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
        self.part = batch_size // (accumulate * processes)  # samples at a time
        self._order: tuple[int, list[int]] = (-1, [])  # an epoch and its permutation

    def __iter__(self) -> Iterator[list[Draw]]:
        part, step = self.part, self.start_step
        while True:
            for turn in range(self.accumulate):
                first = step * self.batch_size + (turn * self.processes + self.process) * part
                yield [self._draw(first + i) for i in range(part)]
            step += 1

    def _draw(self, position: int) -> Draw:
        epoch, place = divmod(position, self.length)
        if self._order[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._order = (epoch, rng.permutation(self.length).tolist())
        return position, epoch, self._order[1][place]


class _Indexed(torch.utils.data.Dataset[dict[str, Any]]):
    """The samples with their index, which leads to the file, and their position in the stream."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        position, epoch, index = draw
        return {**self.samples[epoch, index], "index": index, "position": position}


class _Collate:
    """Samples to a batch, and what is made of it; a class, as workers may be spawned."""

    def __init__(self, finish: Callable[[dict[str, Any]], dict[str, Any]] | None) -> None:
        self.finish = finish

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = default_collate(samples)
        return self.finish(batch) if self.finish else batch


def _outlive_one_signal(worker: int) -> None:
    """A signal to the whole process group is for the training process, which ends its workers."""

    def pass_over(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_over)


def make_batches(
    samples: Samples,
    keys: BatchKeys,
    workers: int,
    *,
    pin: bool,
    finish: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Generator[Any, None, None]:
    """Collated batches in the order of `keys`, without end; to be closed. See `next_batch`.

    Args:
        finish: what is made of each batch, in the process that prepares it.
    """
    loader = DataLoader(
        _Indexed(samples),
        batch_sampler=keys,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_outlive_one_signal,
        collate_fn=_Collate(finish),
        generator=torch.Generator(),  # else each start draws from the generator of the dropout
    )
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    started = set(multiprocessing.active_children()) - others
    if started and hasattr(signal, "SIGCHLD"):
        # The loader's handler raises wherever a worker's death meets this process, be it in the
        # middle of a save. Without it the loader tells so when it is asked for the next batch.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from batches
    finally:
        # An error holds the loader, and the end of the interpreter would wait for its workers.
        del batches
        for worker in started:
            worker.kill()


def next_batch(batches: Iterator[Any]) -> Any:
    """The next batch; errors of a worker process, and its death, become errors of this process.

    Raises:
        InputError: a sample cannot be read.
        RunError: a worker process was killed.
    """
    try:
        return next(batches)
    except InputError as error:  # a worker's comes with its traceback in the text
        raise InputError(str(error).rstrip().rpartition("InputError: ")[2]) from None
    except (RuntimeError, OSError, EOFError) as error:
        # Killed before the batch was asked for, or while its tensors came over.
        cut = isinstance(error, EOFError) or getattr(error, "filename", "") is None
        if not cut and "DataLoader worker" not in str(error):
            raise
        raise RunError(
            "a process that prepares batches was killed, perhaps as memory is short: go on with "
            "--resume, with fewer --workers"
        ) from error
