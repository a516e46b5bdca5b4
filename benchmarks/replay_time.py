"""How long it takes to replay a step: 512 pipeline ranks of 64 micro-batches, and other sizes.

    python benchmarks/replay_time.py

The target of 512 ranks is 5 s; CPU seconds of this process are shown.
"""

from __future__ import annotations

import time

from paraplan.simulate import StageSeconds, replay

SIZES = ((512, 1, 64), (512, 2, 64), (64, 1, 1024), (16, 4, 1024))  # ranks, chunks, micro-batches


def main() -> None:
    for ranks, chunks, micro_batches in SIZES:
        stages = [StageSeconds(1.0 + i % 3 / 10, 2.0, 0.05) for i in range(ranks * chunks)]
        began = time.process_time()
        done = replay(stages, pipeline=ranks, micro_batches=micro_batches)
        seconds = time.process_time() - began
        passes = sum(map(len, done.ranks))
        print(
            f"{ranks:4d} ranks x {chunks} chunks x {micro_batches:4d} micro-batches: "
            f"{passes:7,d} passes in {seconds:.2f} s, {passes / seconds:,.0f} passes a second"
        )


if __name__ == "__main__":
    main()
