"""An encoder exported by `python -m ajepa.export --xares`. It needs only torch and is for inference only.

The class at the end has the interface of X-ARES: an `nn.Module` with a no-argument constructor and the attributes
`sampling_rate`, `output_dim` and `hop_size_in_ms`. Called with waveforms `[B, T]` or `[T]` in [-1, 1] at
`sampling_rate`, it returns float32 `[B, T', D]`. Recordings are cut into chunks of the training length. With the
poolings "mean" and "concat" there is a frame for each time patch; a short chunk is padded, and the frames of the
padding are dropped. With the other poolings there is a frame for each chunk, and padding is not encoded.

Shapes: B clips, M mel bands, N patches, C width.
"""

import base64
import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# The exporter fills these in. Without WEIGHTS (base64), a file of the same name with the suffix .safetensors is read.
CONFIG: dict = {}
WEIGHTS = ""
ROWS = 16  # chunks encoded at once; this bounds the memory


def read_safetensors(data: bytes) -> dict[str, torch.Tensor]:
    """Read the float32 tensors of a safetensors file: the length of the header, the header (JSON) and the values."""
    start = 8 + int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8:start]), {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            values = torch.frombuffer(bytearray(data[start + first : start + last]), dtype=torch.float32)
            tensors[name] = values.view(entry["shape"])
    return tensors


class LogMel(nn.Module):
    """Waveforms `[B, T]` -> log-mel `[B, M, frames]` before padding: `ajepa_kernels.log_mel`, in plain PyTorch."""

    def __init__(self, spec: dict, window: torch.Tensor, mel: torch.Tensor):
        super().__init__()
        self.spec = spec
        self.register_buffer("window", window)
        self.register_buffer("mel", mel)

    def forward(self, x):
        spec = self.spec
        x = self.normalise(x)
        kaldi, samples, hop = spec["convention"] == "kaldi", x.shape[1], spec["hop_length"]
        frames = min((samples + spec["frame_bias"]) // hop + spec["frame_add"], spec["n_frames"])
        index = spec["first_sample"] + torch.arange((frames - 1) * hop + spec["win_length"], device=x.device)
        edge, last = int(kaldi), samples - 1  # the clip is mirrored at both ends
        index = torch.where(index < 0, -edge - index, index)
        index = torch.where(index > last, 2 * last + edge - index, index).clamp_min(0)
        x = x[:, index].unfold(1, spec["win_length"], hop)
        if kaldi and spec["remove_dc_offset"]:
            x = x - x.mean(-1, keepdim=True)
        if kaldi and spec["preemphasis"]:
            x = x - spec["preemphasis"] * torch.cat([x[..., :1], x[..., :-1]], -1)
        spectrum = torch.fft.rfft(x * self.window, n=spec["n_fft"])
        power = spectrum.real.square() + spectrum.imag.square()
        x = ((power if spec["power"] == 2 else power.sqrt()) @ self.mel).clamp_min(spec["log_floor"]).log()
        if spec["log"] == "db":
            x = x * ((10.0 if spec["power"] == 2 else 20.0) / 2.302585092994046)
            if spec["top_db"] is not None:
                x = torch.maximum(x, x.amax((1, 2), keepdim=True) - spec["top_db"])
        return x.transpose(1, 2)

    def normalise(self, x):
        kind = self.spec["waveform_norm"]
        if kind != "none":
            x = x - x.mean(1, keepdim=True)
        return x / (x.abs().amax(1, keepdim=True) + 1e-6) if kind == "peak" else x


class Block(nn.Module):
    def __init__(self, width: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x, rotary):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def rotate(x, rotary):
    (cos, sin), (a, b) = rotary.unbind(1), x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class ViT(nn.Module):
    """Patches `[B, N, P]`, of the grid cells `cell` `[N]` -> latents `[B, N, C]`."""

    positions: torch.Tensor

    def __init__(self, config: dict, positions: torch.Tensor):
        super().__init__()
        width, eps = config["width"], config["norm_eps"]
        self.rotary, self.layers = config["positions"] == "rotary", config["layers"]
        self.register_buffer("positions", positions, persistent=False)
        self.embed = nn.Linear(config["front_end"]["patch"][0] * config["front_end"]["patch"][1], width)
        self.blocks = nn.ModuleList(Block(width, config["heads"], eps) for _ in range(config["depth"]))
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x, cell):
        x, positions, outputs = self.embed(x), self.positions[cell], []
        if not self.rotary:
            x = x + positions
        for block in self.blocks:
            x = block(x, positions if self.rotary else None)
            outputs.append(x)
        if self.layers == "last":
            return self.norm(x)
        return torch.stack([F.layer_norm(x, x.shape[-1:], eps=self.norm.eps) for x in outputs]).mean(0)


class Projector(nn.Module):
    """The projector of a clip objective, its batch norm folded into the first layer."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        (hidden, pooled), width = weights["fc1.weight"].shape, len(weights["fc2.weight"])
        self.fc1 = nn.Linear(pooled, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.load_state_dict(weights)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Portable(nn.Module):
    def __init__(self, config: dict | None = None, weights: bytes | None = None):
        super().__init__()
        self.config = config = config or CONFIG
        self.sampling_rate = config["front_end"]["sample_rate"]
        self.output_dim = config["output_dim"]
        self.hop_size_in_ms = config["hop_size_in_ms"]
        if weights is None:
            weights_file = Path(__file__).with_suffix(".safetensors")
            weights = base64.b64decode(WEIGHTS) if WEIGHTS else weights_file.read_bytes()
        if hashlib.sha256(weights).hexdigest() != config["sha256"]:
            raise ValueError(f"the weights of {__file__} are not those that it was exported with: export it again")
        tensors = read_safetensors(weights)
        self.log_mel = LogMel(config["front_end"], tensors.pop("window"), tensors.pop("mel"))
        prefix = "projector."
        ours = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        self.projector = Projector(ours) if ours else None
        self.vit = ViT(config, tensors.pop("positions"))
        self.vit.load_state_dict(tensors)
        self.eval()

    @torch.inference_mode()
    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        audio = (audio[None] if audio.ndim == 1 else audio).float().to(self.vit.norm.weight.device)
        clip, kept, stride = (self.config[name] for name in ("clip_samples", "frames_kept", "stride"))
        full_chunks, parts = max(0, -(-(audio.shape[1] - clip) // stride)), []
        group = -(-ROWS // len(audio))
        for first in range(0, full_chunks, group):
            last = min(first + group, full_chunks)
            chunks = audio[:, first * stride : (last - 1) * stride + clip].unfold(1, clip, stride)
            frames = self.encode(chunks.flatten(0, 1))[:, :kept]
            parts.append(frames.unflatten(0, (len(audio), last - first)).flatten(1, 2))
        tail = audio[:, full_chunks * stride :]
        frames = self.frames(tail.shape[1])
        if frames or not parts:
            parts.append(self.encode(tail)[:, : max(1, frames)])
        return torch.cat(parts, 1)

    def frames(self, samples: int) -> int:
        """Number of frames that hold audio in a chunk of `samples` samples."""
        return min(self.columns(samples), self.config["front_end"]["grid"][1] if self.config["per_frame"] else 1)

    def columns(self, samples: int) -> int:
        """Number of time patches that hold audio in a chunk of `samples` samples."""
        spec = self.config["front_end"]
        if samples < spec["min_samples"]:
            return 0
        rows = (samples + spec["frame_bias"]) // spec["hop_length"] + spec["frame_add"]
        return -(-min(rows, spec["n_frames"]) // spec["patch"][1])

    def encode(self, chunk):
        """Frames `[B, grid columns, D]` of chunks of at most `clip_samples` samples; `[B, 1, D]` if a chunk has one."""
        return torch.cat([self.encode_rows(rows) for rows in chunk.split(ROWS)])

    def encode_rows(self, chunk):
        spec, clip, per_frame = self.config["front_end"], self.config["clip_samples"], self.config["per_frame"]
        pad, samples = self.config["pad"] if per_frame else "zero", chunk.shape[1]
        if pad == "cyclic":
            chunk = chunk.repeat(1, -(-clip // samples))[:, :clip]
        elif pad == "silence":
            chunk = F.pad(chunk, (0, clip - samples))
        (height, width), (rows, columns) = spec["patch"], spec["grid"]
        mel = chunk.new_zeros(chunk.shape[0], spec["n_mels"], 0)
        if chunk.shape[1] >= spec["min_samples"]:
            mel = self.log_mel(chunk)
        mel = (F.pad(mel, (0, columns * width - mel.shape[-1])) - spec["mean"]) / spec["std"]
        count = columns if per_frame else max(1, self.columns(samples))
        patches = mel.view(-1, rows, height, columns, width).transpose(2, 3)[:, :, :count].flatten(3).flatten(1, 2)
        cell = torch.arange(rows * columns, device=mel.device).view(rows, columns)[:, :count].flatten()
        return self.pool(self.vit(patches, cell).unflatten(1, (rows, count)))

    def pool(self, grid):
        """Latents `[B, F, T', C]` -> frames."""
        pooling = self.config["pooling"]
        if pooling == "mean":
            return grid.mean(1)
        if pooling == "concat":
            return grid.transpose(1, 2).flatten(2)
        over = (1, 2) if pooling == "mean+std" else (2,)
        mean = grid.mean(over, keepdim=True)
        variance = (grid - mean).square().mean(over, keepdim=True)
        deviation = (variance + 1e-5 if self.projector else variance).sqrt()
        x = torch.cat([mean, deviation], 2).flatten(1)  # [B, F, 2, C] flattened; F is 1 for mean+std
        return (self.projector(x) if self.projector else x)[:, None]
