"""`busy_worker.py SECONDS`: print the milliseconds of training steps, for bench_busy_cores.py.

With AJEPA_PREPARE set, the process starts as the commands of ajepa do. Torch is imported after that, because OpenMP
reads its settings when it is loaded.
"""

import os
import sys
import time

from ajepa.utils.command import prepare

LEAST = 3  # steps


def main(seconds: float) -> None:
    if os.environ.get("AJEPA_PREPARE"):
        prepare()
    assert "torch" not in sys.modules
    import torch

    from ajepa.config import PRESETS
    from ajepa.model.masks import MaskSampler
    from ajepa.training.engine import Engine
    from ajepa.utils.devices import choose_threads

    if os.environ.get("AJEPA_PREPARE"):
        torch.set_num_threads(choose_threads(0))
    cfg = PRESETS["tiny"]
    engine, batch = Engine(cfg, torch.device("cpu")), cfg.optim.batch_size
    samples = round(cfg.source_seconds * cfg.front_end.sample_rate)
    pcm = torch.randint(-9999, 9999, (batch, samples), dtype=torch.int16)
    lengths = torch.full((batch,), samples, dtype=torch.int32)
    sampler = MaskSampler(cfg.mask, cfg.front_end.grid)
    start = time.perf_counter()
    step = 0
    while step <= LEAST or time.perf_counter() < start + seconds:
        begin = time.perf_counter()
        masks = engine.masks(sampler, step, batch)
        engine.step(pcm, lengths, masks, step)
        step += 1
        if step > 1:  # the first step allocates
            print(1e3 * (time.perf_counter() - begin))
        else:
            start = time.perf_counter()


if __name__ == "__main__":
    main(float(sys.argv[1]))
