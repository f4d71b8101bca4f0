"""One side of one row, in a process of its own: told what to do by lines on its standard input.

    python benchmarks/worker.py ROW SIDE THREADS SHARED_FOLDER

`run N` does the work N times and answers with the mean of their seconds and the peak of memory
since the work began, on a GPU that of the GPU; `check` answers with the file of what the work
gives; `flops` counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
DEVICE = os.environ.get("BENCH_DEVICE", "cpu")


def peak_memory() -> float:
    """MiB that this process held at most since `forget_peak`; nan where there is no /proc."""
    if DEVICE == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return float("nan")


def finished() -> None:
    """Waits for what a GPU was given to do."""
    if DEVICE == "cuda":
        import torch

        torch.cuda.synchronize()


def forget_peak() -> None:
    if DEVICE == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main(row: str, side: str, threads: int, shared: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr

    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    from benchmarks.rows import ROWS
    from unet.memory import keep_freed_memory

    if side == next(iter(ROWS[row].sides)) or ROWS[row].axis:  # ours run as our scripts do
        keep_freed_memory()
    work = ROWS[row].sides[side](shared)
    forget_peak()
    answer: dict[str, object] = {"parameters": work.parameters, "before": peak_memory()}
    while True:
        print(json.dumps(answer), file=answers, flush=True)
        words = sys.stdin.readline().split()
        if not words:
            return
        if words[0] == "run":
            finished()
            start = time.perf_counter()
            for _ in range(int(words[1])):
                work.run()
            finished()
            seconds = (time.perf_counter() - start) / int(words[1])
            answer = {"seconds": seconds, "peak": peak_memory()}
        elif words[0] == "check":
            import numpy as np

            file = shared / f"{row}-{side}.npy".replace(" ", "-")
            if work.check:
                np.save(file, work.check())
            answer = {"file": str(file) if work.check else None}
        elif words[0] == "flops":
            from torch.utils.flop_counter import FlopCounterMode

            with FlopCounterMode(display=False) as counter:
                work.run()
            answer = {"flops": counter.get_total_flops()}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
