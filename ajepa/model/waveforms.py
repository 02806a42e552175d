"""What an encoder takes as audio: tensors, arrays and lists, checked before anything is computed."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

LOWEST = 1_000  # sampling rate in Hz; a smaller number is a rate in kHz
MOST_CHANNELS = 32  # of a recording; clips of as few samples are not audio

Waveform = torch.Tensor | np.ndarray | Sequence


def check_waveform(
    waveform: Waveform, rate: int | None, lengths: Sequence[int] | torch.Tensor | None
) -> tuple[torch.Tensor, list[int]]:
    """The clips `[B, T]`, int16 or float32, and the number of samples of each. See `ajepa.Encoder.forward`.

    Raises TypeError and ValueError.
    """
    if rate is not None and (type(rate) is bool or not isinstance(rate, (int, np.integer)) or rate < LOWEST):
        raise ValueError(f"Encoder: sampling_rate must be whole Hz from {LOWEST} up, such as 44100, got {rate!r}")
    if isinstance(waveform, (list, tuple)) and waveform and not isinstance(waveform[0], (float, int)):
        if lengths is not None:
            raise ValueError("Encoder: a list of clips has lengths of its own: leave out lengths")
        clips = [_tensor(clip) for clip in waveform]
        if {clip.dim() for clip in clips} != {1} or len({clip.dtype for clip in clips}) > 1:
            shapes = ", ".join(f"{clip.dtype} {list(clip.shape)}" for clip in clips[:4])
            raise ValueError(f"Encoder: the clips of a list must be [T] and of one dtype, got {shapes}")
        lengths = [len(clip) for clip in clips]
        pcm = nn.utils.rnn.pad_sequence(clips, batch_first=True)
    else:
        pcm = _tensor(waveform)
    if pcm.dim() not in (1, 2):
        raise ValueError(f"Encoder: waveform must be [B, T] or [T], got {list(pcm.shape)}; average the channels")
    if pcm.dim() == 2 and pcm.shape[1] <= MOST_CHANNELS < len(pcm):
        raise ValueError(
            f"Encoder: waveform must be [B, T] or [T], and {list(pcm.shape)} looks like [T, channels]; average the "
            "channels: waveform.mean(1)"
        )
    if pcm.dtype != torch.int16 and not pcm.is_floating_point():
        raise TypeError(f"Encoder: waveform must be int16 or floating point, got {pcm.dtype}")
    pcm = pcm[None] if pcm.dim() == 1 else pcm
    sizes = [pcm.shape[1]] * len(pcm)
    if lengths is not None:
        lengths = torch.as_tensor(lengths)
        if lengths.shape != pcm.shape[:1] or lengths.is_floating_point():
            raise ValueError(
                f"Encoder: lengths must be integers [{len(pcm)}], got {lengths.dtype} {list(lengths.shape)}"
            )
        sizes = [int(n) for n in lengths.tolist()]
    if not sizes or min(sizes) < 1 or max(sizes) > pcm.shape[1]:
        raise ValueError(f"Encoder: every clip must have samples, {pcm.shape[1]} at most, got {sizes[:8]}")
    pcm = pcm if pcm.dtype == torch.int16 else pcm.float()
    if not torch.compiler.is_compiling() and not pcm.isfinite().all():  # maybe in what `lengths` leaves out
        bad = [b for b, n in enumerate(sizes) if not pcm[b, :n].isfinite().all()]
        if bad:
            raise ValueError(f"Encoder: clips {bad[:8]} have samples that are NaN or infinite: remove or repair them")
    return pcm, sizes


def _tensor(samples: Waveform) -> torch.Tensor:
    if isinstance(samples, torch.Tensor):
        return samples
    try:
        array = np.asarray(samples)
        return torch.tensor(np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape))
    except (TypeError, ValueError) as error:
        raise TypeError(f"Encoder: waveform must be a tensor, an array or a list of numbers: {error}") from None
