"""PCM to log-mel patches: `ajepa_kernels.log_mel`, or torchaudio's own transforms for the plain engine."""

import math
from functools import lru_cache

import torch

from ajepa.model._torchaudio import has_torchaudio, import_torchaudio
from ajepa_kernels import LogMelSpec, log_mel


class FrontEnd:
    """Log-mel patches `[B, N, P]` of int16 PCM `[B, S]`, by `impl` "auto", "reference" or "torchaudio".

    Where torchaudio cannot be imported, "torchaudio" becomes "reference", the plain definition of `log_mel`.
    """

    def __init__(self, spec: LogMelSpec, impl: str = "auto", dtype: torch.dtype = torch.float32):
        self.spec, self.dtype = spec, dtype
        self.impl = "reference" if impl == "torchaudio" and not has_torchaudio() else impl

    def __call__(self, pcm: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        if self.impl == "torchaudio":
            return torchaudio_patches(pcm, lengths, self.spec).to(self.dtype)
        return log_mel(pcm, self.spec, lengths=lengths, dtype=self.dtype, impl=self.impl)


def torchaudio_patches(pcm: torch.Tensor, lengths: torch.Tensor | None, spec: LogMelSpec) -> torch.Tensor:
    """The same patches computed by torchaudio: `compliance.kaldi.fbank` clip by clip, or a batched `MelSpectrogram`."""
    sizes = [pcm.shape[1]] * len(pcm) if lengths is None else lengths.tolist()
    uniform = spec.convention == "torchaudio" and len(set(sizes)) == 1 and spec.top_db is None
    groups = [pcm[:, : sizes[0]]] if uniform else [clip[None, :size] for clip, size in zip(pcm, sizes, strict=True)]
    wanted = spec.n_frames or spec.frames(pcm.shape[1])
    rows, columns = spec.patch_grid(pcm.shape[1])
    frames = columns * spec.patch[1]
    parts = []
    for clips in groups:
        if clips.shape[1] < spec.min_samples:
            mel = clips.new_zeros(len(clips), spec.n_mels, 0, dtype=torch.float32)
        else:
            mel = _spectrogram(_normalised(clips.float() / 32768, spec.waveform_norm), spec)[..., :wanted]
        parts.append(torch.nn.functional.pad(mel, (0, frames - mel.shape[-1])))
    x = (torch.cat(parts) - spec.mean) / spec.std
    return (
        x.view(-1, rows, spec.patch[0], columns, spec.patch[1])
        .transpose(2, 3)
        .reshape(len(pcm), rows * columns, spec.patch_dim)
    )


def _normalised(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "none":
        return x
    x = x - x.mean(1, keepdim=True)
    return x / (x.abs().amax(1, keepdim=True) + 1e-6) if kind == "peak" else x


def _spectrogram(x: torch.Tensor, spec: LogMelSpec) -> torch.Tensor:
    if spec.convention == "torchaudio":
        mel, to_db = _mel_transforms(spec, x.device)
        return to_db(mel(x)) if spec.log == "db" else mel(x).clamp_min(spec.log_floor).log()
    fbank = import_torchaudio().compliance.kaldi.fbank
    # fbank takes times in ms and truncates them to samples: half a sample more keeps the intended count.
    per_ms = 1000.0 / spec.sample_rate
    features = torch.stack(
        [
            fbank(
                clip[None],
                sample_frequency=spec.sample_rate,
                frame_length=(spec.win_length + 0.5) * per_ms,
                frame_shift=(spec.hop_length + 0.5) * per_ms,
                round_to_power_of_two=True,
                num_mel_bins=spec.n_mels,
                low_freq=spec.f_min,
                high_freq=spec.f_max or 0.0,
                window_type={"hann": "hanning"}.get(spec.window, spec.window),
                preemphasis_coefficient=spec.preemphasis,
                remove_dc_offset=spec.remove_dc_offset,
                snip_edges=spec.snip_edges,
                use_power=spec.power == 2,
            ).T
            for clip in x
        ]
    )
    return features.clamp_min(math.log(spec.log_floor))  # fbank's own floor is always float32 epsilon


@lru_cache(maxsize=8)
def _mel_transforms(spec: LogMelSpec, device: torch.device):
    transforms = import_torchaudio().transforms
    mel = transforms.MelSpectrogram(
        sample_rate=spec.sample_rate,
        n_fft=spec.n_fft,
        win_length=spec.win_length,
        hop_length=spec.hop_length,
        f_min=spec.f_min,
        f_max=spec.f_max,
        n_mels=spec.n_mels,
        window_fn={"hann": torch.hann_window, "hamming": torch.hamming_window}[spec.window],
        power=float(spec.power),
        center=spec.center,
        mel_scale=spec.mel_scale,
        norm=spec.mel_norm,
    )
    to_db = transforms.AmplitudeToDB("power" if spec.power == 2 else "magnitude", spec.top_db)
    if not math.isclose(spec.log_floor, 1e-10):
        to_db.amin = spec.log_floor
    return mel.to(device), to_db.to(device)
