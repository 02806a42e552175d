"""The converter, on checkpoints that are made here in the authors' layout. Their published file is not tested."""

import functools
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
pytest.importorskip("soxr", reason="soxr is not installed")

from ajepa import convert
from ajepa.encoder import Encoder
from ajepa.model.frontend import FrontEnd
from ajepa_kernels import LOG_MEL_PRESETS

WIDTH, DEPTH, HEADS = 128, 4, 4  # the sizes of --size tiny; the published encoder is a ViT-B
SPEC = LOG_MEL_PRESETS["audio-jepa"]
ROWS, COLUMNS = SPEC.grid


def positions() -> torch.Tensor:
    """The authors' position table: tokens are time-major, and the first half of the channels encodes the frequency
    position (`w` of an image [T, F])."""
    omega = 10_000.0 ** -(torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    angles = torch.arange(COLUMNS, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    place = [torch.cat([axis[f], axis[t]]) for t in range(COLUMNS) for f in range(ROWS)]
    return torch.stack(place).float()[None]


def theirs(prefix: str, seed: int, flash: bool = False, bias: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    qkv, out = ("attn.Wqkv", "attn.out_proj") if flash else ("attn.qkv", "attn.proj")
    shapes = {"patch_embed.proj.weight": (WIDTH, 1, 16, 16), "patch_embed.proj.bias": (WIDTH,)}
    for i in range(DEPTH):
        for name, shape in {
            "norm1.weight": (WIDTH,), "norm1.bias": (WIDTH,), "norm2.weight": (WIDTH,), "norm2.bias": (WIDTH,),
            f"{qkv}.weight": (3 * WIDTH, WIDTH), f"{qkv}.bias": (3 * WIDTH,),
            f"{out}.weight": (WIDTH, WIDTH), f"{out}.bias": (WIDTH,),
            "mlp.fc1.weight": (4 * WIDTH, WIDTH), "mlp.fc1.bias": (4 * WIDTH,),
            "mlp.fc2.weight": (WIDTH, 4 * WIDTH), "mlp.fc2.bias": (WIDTH,),
        }.items():  # fmt: skip
            shapes[f"blocks.{i}.{name}"] = shape
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    weights = {k: 0.05 * torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    weights = {k: v + 1 if "norm" in k and k.endswith("weight") else v for k, v in weights.items()}
    weights = {k: v for k, v in weights.items() if bias or not k.endswith(f"{qkv}.bias")}
    return {prefix + k: v for k, v in {**weights, "pos_embed": positions()}.items()}


def forward(w: dict[str, torch.Tensor], audio: torch.Tensor) -> torch.Tensor:
    """The authors' encoder: image [B, 1, frames, mels] -> convolution -> pre-LN blocks -> mean over frequency."""
    patches = FrontEnd(SPEC, "torchaudio")(audio).view(-1, ROWS, COLUMNS, 16, 16)
    image = patches.permute(0, 2, 4, 1, 3).reshape(-1, 1, 16 * COLUMNS, 16 * ROWS)
    x = F.conv2d(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16).flatten(2).transpose(1, 2)
    x = x + w["pos_embed"]

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    for i in range(DEPTH):
        b = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv").unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attention = ((q @ k.transpose(-2, -1)) * (WIDTH // HEADS) ** -0.5).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f"{b}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
    return norm(x, "norm").unflatten(1, (COLUMNS, ROWS)).mean(2)


@pytest.fixture
def foreign(monkeypatch):
    """A module that exists when the checkpoint is made, but not when it is read."""
    module = types.ModuleType("their_schedules")
    module.Schedule = type("Schedule", (), {"__module__": "their_schedules", "__init__": lambda self: None})
    monkeypatch.setitem(sys.modules, "their_schedules", module)
    return module


def lightning(weights: dict[str, torch.Tensor], **more) -> dict:
    """A checkpoint as PyTorch Lightning saves it around the weights."""
    predictor = {"predictor.mask_token": torch.zeros(1, 1, 64)}
    return {"epoch": 1, "global_step": 2, "pytorch-lightning_version": "2.5.1", "loops": {}, "callbacks": {},
            "state_dict": {**weights, **predictor}, "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
            **more}  # fmt: skip


def run(path, out, *flags: str) -> int:
    return convert.main([str(path), str(out), *flags])


@pytest.mark.parametrize(("flash", "bias", "compiled"), [(False, True, False), (True, False, True)])
def test_converted_encoder_computes_what_theirs_does(tmp_path, foreign, capsys, flash, bias, compiled):
    extra = "_orig_mod." if compiled else ""
    weights = {**theirs(f"encoder.{extra}", 1, flash, bias), **theirs(f"target_encoder.{extra}", 2, flash, bias)}
    schedule = foreign.Schedule()
    schedule.steps = 5
    hyper = {"optimizer": functools.partial(torch.optim.AdamW, lr=1e-3), "lr_scheduler": schedule}
    torch.save(lightning(weights, hyper_parameters=hyper), tmp_path / "JEPA.ckpt")
    del sys.modules["their_schedules"]

    assert run(tmp_path / "JEPA.ckpt", tmp_path / "out") == 0
    assert run(tmp_path / "JEPA.ckpt", tmp_path / "context", "--encoder", "context", "--pooling", "concat") == 0
    audio = (3000 * torch.randn(1, 320_000, generator=torch.Generator().manual_seed(0))).short()
    for seed, folder in ((2, "out"), (1, "context")):
        encoder = Encoder.from_pretrained(tmp_path / folder, pooling="mean")
        assert encoder.sampling_rate == 32_000 and encoder.hop_size_in_ms == 625 and encoder.config.pad == "silence"
        with torch.no_grad():
            wanted = forward(theirs("", seed, bias=bias), audio)
            assert (encoder(audio) - wanted).norm() <= 2.3e-6 * wanted.norm()
    assert Encoder.from_pretrained(tmp_path / "context").output_dim == 8 * WIDTH
    assert run(tmp_path / "JEPA.ckpt", tmp_path / "deviations", "--pooling", "concat+std") == 0
    assert Encoder.from_pretrained(tmp_path / "deviations").output_dim == 16 * WIDTH
    assert "target encoder" in capsys.readouterr().out


ADVICE = ("weights_only", "safe_globals", "This file can still be loaded")  # of torch, to run what is in the file


class Malicious:
    """Runs a function when unpickled."""

    def __init__(self, function, *arguments):
        self.made_of = function, arguments

    def __reduce__(self):
        return self.made_of


@pytest.mark.parametrize("name", ["os.system", "subprocess.call", "builtins.exec", "pathlib.Path.touch"])
def test_code_in_a_checkpoint_does_not_run(tmp_path, name, capsys):
    import pathlib
    import subprocess

    mark = tmp_path / "ran"
    attack = {
        "os.system": Malicious(os.system, f"touch {mark}"),
        "subprocess.call": Malicious(subprocess.call, ["touch", str(mark)]),
        "builtins.exec": Malicious(exec, f"open({str(mark)!r}, 'w')"),
        "pathlib.Path.touch": Malicious(pathlib.Path.touch, mark),
    }[name]
    path = tmp_path / "JEPA.ckpt"
    torch.save(lightning(theirs("target_encoder.", 2), hyper_parameters={"a": attack}), path)
    code = run(path, tmp_path / "out")
    assert not mark.exists() and code in (0, 2)  # the file is refused, or read with a stand-in object
    if code == 2:
        message = capsys.readouterr().err
        assert "without running code" in message and message.count("\n") == 1 and not (tmp_path / "out").exists()
        assert not any(advice in message for advice in ADVICE)
    torch.load(path, weights_only=False)
    assert mark.exists()  # an unrestricted load runs the code


def test_other_files_and_layouts_are_refused(tmp_path, capsys):
    def refused(content, match: str, *flags: str) -> None:
        path = tmp_path / "x.ckpt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        assert run(path, tmp_path / "out", *flags) == 2
        message = capsys.readouterr().err
        assert match in message and message.count("\n") == 1 and not (tmp_path / "out").exists()
        assert not any(advice in message for advice in ADVICE)

    good = theirs("target_encoder.", 2)
    refused(None, "no such file")
    refused(b"garbage", "cannot be read")
    refused(b"", "cannot be read")
    refused(pickle.dumps({"state_dict": {}}), "cannot be read")
    refused([1, 2], "no state_dict")
    refused({"state_dict": {"a": 1}}, "no state_dict")
    refused(lightning(good), "encoder.patch_embed", "--encoder", "context")
    refused(lightning({**good, "target_encoder.cls_token": torch.zeros(1)}), "cls_token")
    refused(lightning({k: v for k, v in good.items() if "blocks.3.norm1" not in k}), "norm1")
    refused(lightning({k: v for k, v in good.items() if "blocks.3" not in k}), "128 wide with 3 layers")
    refused(lightning({**good, "target_encoder.pos_embed": positions().flip(1)}), "sine-cosine")
    refused(lightning({**good, "target_encoder.pos_embed": positions()[:, :64]}), "positions")


ODD_TENSORS = {
    "single-number": lambda x: torch.tensor(1.0),
    "meta": lambda x: torch.empty_like(x, device="meta"),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
    "torch.complex64": lambda x: x + 0j,
    "torch.int64": lambda x: x.long(),
    "states the shape [1000000, 1000000]": lambda x: torch.zeros(1, dtype=torch.half).expand(10**6, 10**6),
    "NaN or infinite": lambda x: x / 0,
    "0 wide": lambda x: torch.zeros(0),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_tensors_that_hold_no_plain_weights_are_refused(tmp_path, kind, capfd):
    weights = theirs("target_encoder.", 2)
    name = "target_encoder.patch_embed.proj.weight"
    torch.save(lightning({**weights, name: ODD_TENSORS[kind](weights[name])}), tmp_path / "x.ckpt")
    capfd.readouterr()
    assert run(tmp_path / "x.ckpt", tmp_path / "out") == 2
    message = capfd.readouterr().err
    assert kind in message and message.count("\n") == 1 and not (tmp_path / "out").exists()


def rewrite(path, change, compression=zipfile.ZIP_STORED) -> None:
    """Write the members of a checkpoint again, with `change(name, data)` in the place of their data."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


def test_files_that_ask_for_too_much_are_refused(tmp_path, capfd):
    """A pipe that never ends, a compressed file that unpacks to gigabytes, and sizes that no memory holds."""
    path = tmp_path / "JEPA.ckpt"

    def refused(match: str) -> None:
        assert run(path, tmp_path / "out") == 2
        message = capfd.readouterr().err
        assert match in message and message.count("\n") == 1 and not (tmp_path / "out").exists()

    torch.save(lightning(theirs("target_encoder.", 2)), path)
    saved = path.read_bytes()
    rewrite(path, lambda name, data: bytes(len(data)) if "/data/" in name else data, zipfile.ZIP_DEFLATED)
    refused("compressed")
    path.write_bytes(saved)
    rewrite(path, lambda name, data: data.replace(b"M\x00\x02", b"J\xff\xff\xff\x7f"))  # every 512 is 2^31 - 1
    refused("cannot be read")
    path.unlink()
    os.mkfifo(path)
    refused("not a regular file")
    path.unlink()
    path.mkdir()
    refused("not a regular file")


def test_damaged_files_give_one_line(tmp_path, capfd):
    path = tmp_path / "JEPA.ckpt"
    torch.save(lightning(theirs("target_encoder.", 2)), path)
    data, rng = path.read_bytes(), np.random.default_rng(0)
    codes = []
    for i in range(40):
        damaged = bytearray(data[: rng.integers(len(data))] if i % 2 else data)
        if i % 2 == 0:
            damaged[rng.integers(3_000)] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        codes.append(run(path, tmp_path / "out"))
        shown = capfd.readouterr()
        assert (shown.err + shown.out).count("\n") == 1 and not any(advice in shown.err for advice in ADVICE)
    assert codes[1::2] == 20 * [2] and set(codes) <= {0, 2}  # a flip may hit what is not used


def test_other_folders_are_kept(tmp_path, capsys):
    torch.save(lightning(theirs("target_encoder.", 2)), tmp_path / "JEPA.ckpt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert run(tmp_path / "JEPA.ckpt", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: OUT {tmp_path}/out holds other files") and message.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
