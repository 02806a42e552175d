import dataclasses
import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
pytest.importorskip("soxr", reason="soxr is not installed")

from ajepa import export
from ajepa.config import PRESETS
from ajepa.encoder import Encoder, EncoderConfig
from ajepa.utils.folders import claim_file
from ajepa_kernels import LOG_MEL_PRESETS, LogMelSpec

TINY = PRESETS["tiny"].front_end
DECIBELS = LogMelSpec(
    n_fft=1024, win_length=1000, hop_length=496, n_mels=64, n_frames=64, f_min=0.0, convention="torchaudio",
    mel_scale="slaney", mel_norm="slaney", log="db", top_db=60.0, waveform_norm="mean", patch=(8, 8),
)  # fmt: skip
MIRRORED = dataclasses.replace(TINY, snip_edges=False, preemphasis=0.0, window="povey", power=1, std=1.5)
TEN_SECONDS = dataclasses.replace(TINY, n_fft=4096, win_length=3760, hop_length=2480)
CASES = {
    "tiny": EncoderConfig(TINY, "tiny", 32_000),
    "zero_concat": EncoderConfig(TINY, "tiny", 32_000, pad="zero", pooling="concat"),
    "rotary_silence": EncoderConfig(TINY, "tiny", 32_000, pad="silence", positions="rotary", norm_eps=1e-5),
    "ten_seconds": EncoderConfig(TEN_SECONDS, "tiny", 160_000),
    "audio_jepa_16k": EncoderConfig(LOG_MEL_PRESETS["audio-jepa-16k"], "tiny", 160_000),
    "decibels": EncoderConfig(DECIBELS, "tiny", 32_000, pad="zero"),
    "mirrored": EncoderConfig(MIRRORED, "tiny", 32_000, pad="zero"),
    "mean_layers": EncoderConfig(TINY, "tiny", 32_000, layers="mean"),
    "mean_std": EncoderConfig(DECIBELS, "tiny", 32_000, pooling="mean+std"),
    "concat_std": EncoderConfig(TINY, "tiny", 32_000, pooling="concat+std", positions="rotary", layers="mean"),
    "projection": EncoderConfig(
        MIRRORED, "tiny", 32_000, pooling="projection", projector=(32, 16), positions="rotary", layers="mean"
    ),
}


def load(path):
    """Import the file and return its only name that ends in Encoder, as X-ARES does."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    (name,) = [name for name in dir(module) if name.endswith("Encoder")]
    return getattr(module, name)


def check(encoder) -> None:
    """The contract that X-ARES's checker and its callers rely on."""
    assert type(encoder).__name__.endswith("Encoder") and isinstance(encoder, torch.nn.Module)
    assert not encoder.training
    out = encoder(torch.randn(2, 50_000))
    assert type(out) is torch.Tensor and out.dtype == torch.float32 and out.device.type == "cpu" and out.ndim == 3
    assert out.shape[0] == 2 and out.shape[2] == encoder.output_dim and out.isfinite().all()
    frames = 50_000 / encoder.sampling_rate * 1000 / encoder.hop_size_in_ms
    assert max(1, frames - 1) <= out.shape[1] <= frames + 1
    assert encoder(torch.randn(50_000)).shape == (1, *out.shape[1:])
    out.to("cpu").detach()[0].numpy()


def make_encoder(case: str) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(CASES[case])
    if encoder.projector is not None:
        with torch.no_grad():
            for p in encoder.projector.norm.parameters():
                p.add_(torch.rand_like(p))
    return encoder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xares")

    def make(case: str):
        encoder = make_encoder(case)
        path = folder / f"{case}_encoder.py"
        name = export.write_xares(encoder, path)
        return encoder, path, name

    return make


@pytest.mark.parametrize("case", [case for case in CASES if case != "ten_seconds"])
def test_exported_file_keeps_the_contract_and_agrees(exported, case):
    encoder, path, name = exported(case)
    theirs = load(path)()
    assert type(theirs).__name__ == name and encoder.fingerprint() in name
    assert theirs.sampling_rate == encoder.sampling_rate and theirs.hop_size_in_ms == encoder.hop_size_in_ms
    check(theirs)
    generator = torch.Generator().manual_seed(0)
    clip = CASES[case].clip_samples
    for samples in (1, 900, clip // 3, clip, 3 * clip + 7):
        x = 0.1 * torch.randn(2, samples, generator=generator)
        with torch.inference_mode():
            ours = encoder(x)
        torch.testing.assert_close(theirs(x), ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["rotary_silence", "decibels", "projection"])
def test_onnx_model_agrees_at_any_batch(tmp_path, case):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    encoder = make_encoder(case)
    export.write_onnx(encoder, tmp_path / "encoder.onnx")
    claim_file(tmp_path / "encoder.onnx", export._is_onnx)  # the next export may replace it
    model = runtime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = 0.1 * torch.randn(batch, CASES[case].clip_samples)
        (frames,) = model.run(["frames"], {"audio": x.numpy()})
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(frames), encoder(x), rtol=0, atol=1e-4)


def test_ten_minutes_and_large_batches(exported):
    encoder, path, _ = exported("ten_seconds")
    theirs = load(path)()
    minutes = theirs(torch.randn(1, 600 * 16_000))
    assert abs(minutes.shape[1] - 600_000 / theirs.hop_size_in_ms) <= 1
    x = torch.randn(37, 8_000)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(x), encoder(x), rtol=0, atol=1e-4)


SPAWNING = """
import sys
for hidden in ("ajepa", "ajepa_kernels", "triton", "torchaudio", "safetensors", "huggingface_hub", "soxr", "soundfile"):
    sys.modules[hidden] = None  # makes its import fail
import multiprocessing, pickle
import torch
from {module} import {name}

def shape(encoder):
    return tuple(encoder(torch.randn(2, 50_000)).shape)

if __name__ == "__main__":
    encoder = pickle.loads(pickle.dumps({name}()))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(shape(encoder), pool.apply(shape, (encoder,)))
"""


def test_the_exported_file_needs_only_torch_and_works_under_spawn(exported):
    _, path, name = exported("tiny")
    script = path.with_name("spawning.py")
    script.write_text(SPAWNING.format(module=path.stem, name=name))
    out = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True, timeout=300)
    assert out.stdout.split("\n")[0] == "(2, 13, 128) (2, 13, 128)"


def test_large_weights_are_a_separate_file_and_names_follow_the_weights(exported, monkeypatch, tmp_path):
    encoder, _, name = exported("tiny")
    monkeypatch.setattr(export, "INSIDE", 1000)
    path = tmp_path / "beside_encoder.py"
    assert export.write_xares(encoder, path) == name
    assert path.stat().st_size < 20_000 and path.with_suffix(".safetensors").exists()
    x = torch.randn(1, 20_000)
    with torch.inference_mode():
        torch.testing.assert_close(load(path)()(x), encoder(x), rtol=0, atol=1e-4)
        encoder.vit.norm.bias[0] += 1
    assert export.write_xares(encoder, path) != name


def test_the_command_writes_both_forms_and_refuses_the_rest(tmp_path, capsys):
    torch.manual_seed(0)
    Encoder(CASES["tiny"]).save_pretrained(tmp_path / "mine")
    assert export.main([str(tmp_path / "mine"), str(tmp_path / "copy"), "--pooling", "concat"]) == 0
    assert Encoder.from_pretrained(tmp_path / "copy").output_dim == 1024
    flags = ["--pooling", "concat+std", "--layers", "mean"]
    assert export.main([str(tmp_path / "mine"), str(tmp_path / "copy"), *flags]) == 0
    copy = Encoder.from_pretrained(tmp_path / "copy")
    assert copy.output_dim == 2048 and copy.config.layers == "mean"
    assert "width 2048 every 2000 ms" in capsys.readouterr().out
    assert export.main([str(tmp_path / "mine"), str(tmp_path / "no"), "--pooling", "projection"]) == 2
    assert "projector of a clip objective" in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert export.main([str(tmp_path / "mine"), str(tmp_path / "x" / "my_encoder.py"), "--xares"]) == 0
    assert load(tmp_path / "x" / "my_encoder.py").__name__ in capsys.readouterr().out
    for out in ("folder", "my-encoder.py", "class.py"):
        assert export.main([str(tmp_path / "mine"), str(tmp_path / out), "--xares"]) == 2
        assert "my_encoder.py" in capsys.readouterr().err
    assert export.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.fixture
def mine(tmp_path):
    torch.manual_seed(0)
    Encoder(CASES["tiny"]).save_pretrained(tmp_path / "mine")
    return str(tmp_path / "mine")


@pytest.mark.parametrize("inside", [True, False])
def test_weights_that_changed_are_noticed(mine, tmp_path, monkeypatch, inside):
    """Fifty bits of the weights in the Python file, or in the file beside it."""
    monkeypatch.setattr(export, "INSIDE", 1 << 30 if inside else 0)
    path = tmp_path / "my_encoder.py"
    assert export.main([mine, str(path), "--xares"]) == 0
    file = path if inside else path.with_suffix(".safetensors")
    data = file.read_bytes()
    start, size = (data.index(b'WEIGHTS = "') + 11, 10_000) if inside else (0, len(data))
    for bit in np.random.default_rng(0).integers(8 * size, size=50):
        damaged = bytearray(data)
        at = start + int(bit) // 8
        damaged[at] = (65 if damaged[at] != 65 else 66) if inside else damaged[at] ^ (1 << int(bit) % 8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"my_encoder\.py are not those"):
            load(path)()
    file.write_bytes(data)
    load(path)()


def test_only_earlier_exports_are_replaced(mine, run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    script, model, weights = tmp_path / "train.py", tmp_path / "model.onnx", tmp_path / "big_encoder.safetensors"
    for path in (script, model, weights):
        path.write_text("mine")
    kept = {path: path.read_bytes() for path in [script, model, weights, *run.rglob("*")] if path.is_file()}
    (tmp_path / "folder.py").mkdir()
    monkeypatch.setattr(export, "INSIDE", 0)
    for argv, message in (
        ([str(script), "--xares"], f"OUT {script} is a file of another kind: delete it"),
        ([str(tmp_path / "folder.py"), "--xares"], "is not a file"),
        ([str(tmp_path / "big_encoder.py"), "--xares"], f"OUT {weights} is a file of another kind"),
        ([str(model), "--onnx"], f"OUT {model} is a file of another kind"),
        ([str(run / "encoder.safetensors"), "--onnx"], "is a file of another kind"),
        ([str(script / "x_encoder.py"), "--xares"], "cannot be written"),
        ([str(run)], f"OUT {run} holds a pretraining run"),
        ([str(tmp_path)], "holds other files"),
        ([str(script)], f"OUT {script}"),
    ):
        assert export.main([mine, *argv]) == 2
        shown = capsys.readouterr().err
        assert message in shown and shown.count("\n") == 1 and not (tmp_path / "big_encoder.py").exists()
    assert kept == {path: path.read_bytes() for path in kept}
    for _ in range(2):
        assert export.main([mine, str(tmp_path / "own_encoder.py"), "--xares"]) == 0
