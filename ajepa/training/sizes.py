"""An estimate of a run's memory, made before anything is allocated."""

import torch

from ajepa.config import SIZES, Config, ConfigError
from ajepa.utils.devices import available_memory, free_memory

BUFFERS = 3  # batches on the host besides the prefetched ones: being assembled, with the caller, spare


def check_memory(cfg: Config, device: torch.device, world_size: int = 1) -> None:
    """Raise ConfigError where a run cannot fit: where what it needs at least is more than the free memory.

    Activations are not counted, so a run that passes may still be too large.
    """
    model, batch = model_bytes(cfg, world_size), cfg.optim.batch_size // world_size
    patches = batch * cfg.objective.count * cfg.front_end.n_patches * cfg.front_end.patch_dim * 4
    pcm = batch * round(cfg.source_seconds * cfg.front_end.sample_rate) * 2 * (cfg.data.prefetch + BUFFERS)
    needs = {"--size, --predictor-width or --predictor-depth": model, "--batch-size": patches}
    host = {"--batch-size, --prefetch or --clip-seconds": pcm}
    if device.type == "cuda":
        _fits(needs, free_memory(device), str(device))
        needs = {}
    _fits({**needs, **host}, available_memory(), "the CPU")


def model_bytes(cfg: Config, world_size: int = 1) -> int:
    """Bytes of the blocks' matrices on each rank, with gradients, moments and average, all in float32, and of the
    buckets in which several ranks reduce the gradients.

    All other weights are small beside them. Counting them would take a model without values, and its making a second.
    """
    width, depth, _ = SIZES[cfg.model.size]
    encoder = 12 * depth * width**2  # a block has 4 width^2 for attention and 8 width^2 for its MLP
    predictor = 12 * cfg.model.predictor_depth * cfg.model.predictor_width**2 * cfg.objective.masks
    projector = cfg.objective.projector_hidden * (2 * cfg.front_end.grid[0] * width + cfg.objective.projector_width)
    projector *= cfg.objective.clips
    trained, average = encoder + predictor + projector, encoder * cfg.objective.taught
    if cfg.parallel == "fsdp":
        return 4 * (4 * trained + average) // world_size
    moments = 2 * trained // (world_size if cfg.parallel == "zero1" else 1)
    buckets = trained * (0 if world_size == 1 else 4 if cfg.step.reduce == "fp32" else 2)
    return 4 * (2 * trained + moments + average) + buckets


def _fits(needs: dict[str, int], free: int, where: str) -> None:
    if sum(needs.values()) > free:
        flags = max(needs, key=lambda name: needs[name])
        raise ConfigError(
            f"the run needs at least {sum(needs.values()) / 1e9:,.1f} GB on {where}, where {free / 1e9:,.1f} GB are "
            f"free: lower {flags}, which decide {needs[flags] / 1e9:,.1f} GB"
        )
