"""The front end against torchaudio, and without it: a missing or a broken torchaudio stops no command."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import SMALL

from ajepa.config import PRESETS
from ajepa.model._torchaudio import has_torchaudio
from ajepa.model.frontend import FrontEnd
from ajepa_kernels import LOG_MEL_PRESETS, log_mel_reference

needs_torchaudio = pytest.mark.skipif(not has_torchaudio(), reason="torchaudio, the reference, cannot be imported")
BROKEN = "raise OSError('libtorch_cuda.so: undefined symbol')"


def noise(spec, seconds=10.0, clips=3):
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([[20000.0], [300.0], [3.0]])
    loud = torch.randn(3, round(seconds * spec.sample_rate), generator=generator) * scale
    return loud[:clips].clamp(-32768, 32767).short()


@needs_torchaudio
@pytest.mark.parametrize("name", ["audio-jepa", "audio-jepa-16k", "a-jepa", "tiny"])
def test_the_plain_engines_front_end_is_torchaudio_and_agrees(name):
    spec = PRESETS[name].front_end if name == "tiny" else LOG_MEL_PRESETS[name]
    pcm = noise(spec, 2.0 if name == "tiny" else 10.0)
    ours, theirs = FrontEnd(spec)(pcm), FrontEnd(spec, "torchaudio")(pcm)
    assert ours.shape == theirs.shape == (3, spec.n_patches, spec.patch_dim)
    tolerance = 1e-2 if spec.log == "db" else 2e-3
    assert (ours - theirs).abs().max() * spec.std < tolerance


@needs_torchaudio
def test_ragged_lengths_agree_too():
    spec = LOG_MEL_PRESETS["a-jepa"]
    pcm, lengths = noise(spec), torch.tensor([160_000, 31_234, 400])
    ours, theirs = FrontEnd(spec)(pcm, lengths), FrontEnd(spec, "torchaudio")(pcm, lengths)
    assert (ours - theirs).abs().max() * spec.std < 2e-3


def test_audio_jepa_has_254_frames_and_two_rows_of_zeros():
    spec = PRESETS["audio-jepa"].front_end
    assert spec.frames(320_000) == 254 and spec.n_frames == 256
    patches = FrontEnd(spec)(noise(spec, clips=1)).view(8, 16, 16, 16)
    assert not patches[:, -1, :, -2:].any() and (patches[:, -1, :, -3] != 0).all()


def test_silence_is_finite_in_every_preset():
    for name in PRESETS:
        cfg = PRESETS[name]
        silent = torch.zeros(1, math.ceil(cfg.data.clip_seconds * cfg.front_end.sample_rate), dtype=torch.int16)
        for impl in ("auto", "torchaudio"):
            assert FrontEnd(cfg.front_end, impl)(silent).isfinite().all()


@pytest.fixture
def without_torchaudio(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)  # its import raises ModuleNotFoundError
    has_torchaudio.cache_clear()
    yield
    has_torchaudio.cache_clear()


@pytest.mark.usefixtures("without_torchaudio")
@pytest.mark.filterwarnings("error")
def test_without_torchaudio_the_plain_definition_takes_its_place():
    spec = LOG_MEL_PRESETS["a-jepa"]
    pcm, lengths = noise(spec), torch.tensor([160_000, 31_234, 400])
    front_end = FrontEnd(spec, "torchaudio")
    assert front_end.impl == "reference"
    assert torch.equal(front_end(pcm, lengths), log_mel_reference(pcm, spec, lengths=lengths))


def run(code: str, *arguments: str, path: str = "") -> tuple[str, str]:
    """What `code` prints and says in a process of its own. `path`: a folder whose modules come first."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


EVERY_COMMAND = """
import functools, sys, warnings
sys.modules["torchaudio"] = None
import torch
from ajepa import doctor, embed, train
torch.compile = functools.partial(torch.compile, backend="eager")  # traces the step and spares the minutes of Inductor
warnings.filterwarnings("error", message=".*torchaudio")
data, out, *options = sys.argv[1:]
for impl in ("fused", "reference", "compile"):
    assert train.main(["--data", data, "--out", f"{out}/{impl}", "--impl", impl, *options]) == 0, impl
assert embed.main([f"{out}/fused", f"{data}/low/00.wav", "--out", f"{out}/rows.npz"]) == 0
for check in (doctor.versions, doctor.imports):
    print(*check(), sep="\\n")
"""


@pytest.mark.slow
def test_training_embedding_and_the_doctor_work_without_torchaudio(tones, tmp_path):
    import nvidia.dali  # noqa: F401 (the doctor asks for it)

    out, _ = run(EVERY_COMMAND, str(tones), str(tmp_path), *SMALL, "--steps", "3", "--compare-steps", "0")
    for impl in ("fused", "reference", "compile"):
        assert json.loads((tmp_path / impl / "summary.json").read_text())["steps"] == 3, impl
    assert (tmp_path / "rows.npz").stat().st_size > 0
    assert "torchaudio" in out


def test_a_torchaudio_that_does_not_match_is_said_once(tmp_path):
    """Its import fails with and without its extension. Two engines say so once, and later imports fail alike."""
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio/__init__.py").write_text(BROKEN)
    code = """
import sys
from ajepa.model.frontend import FrontEnd
from ajepa_kernels import LOG_MEL_PRESETS
print(*(FrontEnd(LOG_MEL_PRESETS[name], "torchaudio").impl for name in ("a-jepa", "audio-jepa")))
try:
    import torchaudio
except OSError as error:
    print(error)
print([name for name in sys.modules if name.startswith("torchaudio")])
"""
    out, errors = run(code, path=str(tmp_path))
    assert out.splitlines() == ["reference reference", "libtorch_cuda.so: undefined symbol", "[]"]
    assert errors.count("does not match the installed torch") == errors.count("undefined symbol") == 1


def test_a_torchaudio_whose_extension_alone_is_broken_is_used(tmp_path):
    """As beside a CPU build of torch: the Python parts work once a stub replaces the extension."""
    for name in ("compliance", "transforms", "functional"):
        (tmp_path / "torchaudio" / name).mkdir(parents=True)
        (tmp_path / "torchaudio" / name / "__init__.py").touch()
    (tmp_path / "torchaudio/compliance/kaldi.py").touch()
    (tmp_path / "torchaudio/__init__.py").write_text("from . import _extension\n")
    (tmp_path / "torchaudio/_extension.py").write_text(BROKEN)
    code = "from ajepa.model._torchaudio import has_torchaudio; print(has_torchaudio())"
    assert run(code, path=str(tmp_path)) == ("True\n", "")
