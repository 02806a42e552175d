"""A labelled set of synthetic sounds, for a first run without data and for tests of what an encoder learns.

Classes come in pairs that have nearly the same average spectrum and differ in time: rising or falling, slow or fast,
steady or modulated. A spectrum averaged over the clip therefore separates them poorly. Pitch, timbre, level, onset,
length and background vary within every class.
"""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import uuid
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ajepa.data.sources.listing import DataError, cache_root
from ajepa.utils.progress import Progress

VERSION = 2  # increase it with any change to the sounds: the folder name depends on it
TABLE = 2048  # samples of one period in a wavetable
FORMANTS_HZ = {"a": (730, 1090, 2440), "i": (270, 2290, 3010), "u": (300, 870, 2240)}  # Peterson & Barney, men
TRAINING_ROWS = "split=train"
Generator = np.random.Generator


@dataclass(frozen=True)
class _Event:
    """The part of a clip that holds sound: `t` `[T]` is the time in seconds since its onset, `u` the same as 0 to 1."""

    rng: Generator
    t: np.ndarray
    sample_rate: int

    @property
    def u(self) -> np.ndarray:
        return self.t / max(self.t[-1], 1e-9)

    def log_uniform(self, low: float, high: float) -> float:
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def sine(self, hertz: float) -> np.ndarray:
        return np.sin(2 * np.pi * (hertz * self.t + self.rng.uniform()))

    def play(self, hertz: np.ndarray | float, amplitudes: np.ndarray) -> np.ndarray:
        """A tone of the given pitch (constant or `[T]`) whose harmonics 1, 2... below Nyquist have `amplitudes`."""
        pitch = np.broadcast_to(hertz, self.t.shape)
        harmonics = max(1, min(len(amplitudes), int(0.48 * self.sample_rate / pitch.max())))
        spectrum = np.zeros(TABLE // 2 + 1, complex)
        spectrum[1 : harmonics + 1] = amplitudes[:harmonics] * np.exp(2j * np.pi * self.rng.random(harmonics))
        table = np.fft.irfft(spectrum)
        phase = np.cumsum(pitch) / self.sample_rate
        return table[(phase * TABLE).astype(np.int64) % TABLE] / np.sqrt((table**2).mean())

    def timbre(self) -> np.ndarray:
        """Amplitudes of 24 harmonics: bright or dull, all or only odd ones."""
        number = np.arange(1, 25)
        return number ** -self.rng.uniform(0.6, 2.0) * np.where(number % 2, 1.0, self.rng.choice([1.0, 0.05]))

    def vowel(self, name: str, pitch: float) -> np.ndarray:
        """Amplitudes of the harmonics of `pitch` under the vowel's formants (resonances 10 % wide)."""
        hertz = pitch * np.arange(1, 61)
        tract = self.rng.uniform(0.9, 1.2)  # a shorter vocal tract moves all formants up
        gain = sum(1 / (1 + ((hertz - f * tract) / (0.05 * f + 30)) ** 2) for f in FORMANTS_HZ[name])
        return gain * (hertz / pitch) ** -0.7

    def band_noise(self, low: float, high: float) -> np.ndarray:
        size = 1 << (len(self.t) - 1).bit_length()
        spectrum = np.fft.rfft(self.rng.standard_normal(size))
        hertz = np.fft.rfftfreq(size, 1 / self.sample_rate)
        return np.fft.irfft(spectrum * ((hertz >= low) & (hertz <= high)))[: len(self.t)]


def _note(event: _Event) -> np.ndarray:
    return event.play(event.log_uniform(110, 880), event.timbre())


def _vibrato(event: _Event) -> np.ndarray:
    depth = event.rng.uniform(0.02, 0.05)
    pitch = event.log_uniform(110, 880) * (1 + depth * event.sine(event.rng.uniform(4.5, 7.5)))
    return event.play(pitch, event.timbre())


def _tremolo(low: float, high: float) -> Callable[[_Event], np.ndarray]:
    def sound(event: _Event) -> np.ndarray:
        return _note(event) * (1 + event.rng.uniform(0.7, 1.0) * event.sine(event.rng.uniform(low, high)))

    return sound


def _decay(event: _Event) -> np.ndarray:
    return _note(event) * np.exp(-event.t * event.rng.uniform(3, 7))


def _swell(event: _Event) -> np.ndarray:
    return _note(event) * np.exp((event.t - event.t[-1]) * event.rng.uniform(3, 7))


def _glide(event: _Event, up: bool) -> np.ndarray:
    low = event.log_uniform(200, 900)
    ratio = event.rng.uniform(1.5, 2 + 0.1 * event.sample_rate / 1000)
    return low * np.minimum(ratio, 0.4 * event.sample_rate / low) ** (event.u if up else 1 - event.u)


def _chirp(up: bool) -> Callable[[_Event], np.ndarray]:
    return lambda event: event.play(_glide(event, up), event.timbre()[:4])


def _siren(event: _Event) -> np.ndarray:
    pitch = event.log_uniform(400, 1200) * 2 ** (event.rng.uniform(0.3, 0.8) * event.sine(event.rng.uniform(1.5, 3)))
    return event.play(pitch, event.timbre()[:4])


def _noise(event: _Event) -> np.ndarray:
    low = event.log_uniform(100, 0.25 * event.sample_rate)
    return event.band_noise(low, low * event.rng.uniform(1.5, 3))


def _bursts(event: _Event) -> np.ndarray:
    return _noise(event) * (event.sine(event.rng.uniform(3, 8)) > event.rng.uniform(-0.3, 0.5))


def _sweep(up: bool) -> Callable[[_Event], np.ndarray]:
    def sound(event: _Event) -> np.ndarray:
        return event.band_noise(0, event.rng.uniform(60, 250)) * event.play(_glide(event, up), np.ones(1))

    return sound


def _clicks(low: float, high: float) -> Callable[[_Event], np.ndarray]:
    def sound(event: _Event) -> np.ndarray:
        period = 1 / event.rng.uniform(low, high)
        since = (event.t + event.rng.uniform() * period) % period
        ring = np.sin(2 * np.pi * event.log_uniform(500, 0.35 * event.sample_rate) * since)
        return ring * np.exp(-since * event.rng.uniform(150, 500))

    return sound


def _vowels(first: str, last: str) -> Callable[[_Event], np.ndarray]:
    """A voice that holds one vowel, or glides from one to the other."""

    def sound(event: _Event) -> np.ndarray:
        pitch = event.log_uniform(90, 260)
        glide = pitch * 2 ** (event.rng.uniform(-0.3, 0.3) * event.u)
        begin = event.play(glide, event.vowel(first, pitch))
        return begin if first == last else (1 - event.u) * begin + event.u * event.play(glide, event.vowel(last, pitch))

    return sound


def _arpeggio(up: bool) -> Callable[[_Event], np.ndarray]:
    def sound(event: _Event) -> np.ndarray:
        steps = np.cumsum(event.rng.integers(2, 6, 4))  # semitones
        step = (
            steps[np.minimum((event.u * 4).astype(int), 3)]
            if up
            else steps[3 - np.minimum((event.u * 4).astype(int), 3)]
        )
        return event.play(event.log_uniform(130, 500) * 2 ** (step / 12), event.timbre())

    return sound


def _mixture(event: _Event) -> np.ndarray:
    tonal = (_note, _vibrato, _siren)[event.rng.integers(3)](event)
    noisy = (_bursts, _clicks(2, 25))[event.rng.integers(2)](event)
    return tonal / (tonal.std() + 1e-9) + noisy / (noisy.std() + 1e-9)


CLASSES: dict[str, Callable[[_Event], np.ndarray]] = {
    "note": _note,
    "note_vibrato": _vibrato,
    "note_tremolo_slow": _tremolo(2, 4),
    "note_tremolo_fast": _tremolo(9, 16),
    "note_decay": _decay,
    "note_swell": _swell,
    "arpeggio_up": _arpeggio(True),
    "arpeggio_down": _arpeggio(False),
    "chirp_up": _chirp(True),
    "chirp_down": _chirp(False),
    "siren": _siren,
    "noise": _noise,
    "noise_bursts": _bursts,
    "noise_up": _sweep(True),
    "noise_down": _sweep(False),
    "clicks_slow": _clicks(2, 5),
    "clicks_fast": _clicks(12, 30),
    "vowel_a": _vowels("a", "a"),
    "vowel_u": _vowels("u", "u"),
    "vowel_ai": _vowels("a", "i"),
    "vowel_ia": _vowels("i", "a"),
    "mixture": _mixture,
}


def make_synthetic(
    folder: str | os.PathLike,
    *,
    n_clips: int = 2000,
    seconds: float = 2.0,
    sample_rate: int = 16000,
    seed: int = 0,
) -> Path:
    """Writes the set unless it is already complete, and returns the path of its manifest (`filename,label,split`).

    The set holds `n_clips` 16-bit mono WAV files, spread evenly over `CLASSES`. A quarter of each class has the split
    "test", the rest "train". The set lies in a sub-folder of `folder` whose name is derived from the arguments. It is
    written to a temporary folder and moved into place, and written again if a file is missing or has the wrong size.
    Progress is reported on stderr if this takes more than a second.

    Raises:
        DataError: `n_clips` is below the number of classes, `seconds` below 0.5, or `sample_rate` below 8 kHz.
        OSError: the folder cannot be written.
    """
    if n_clips < len(CLASSES) or seconds < 0.5 or sample_rate < 8000:
        raise DataError(
            f"n_clips must be {len(CLASSES)} or more, seconds 0.5 or more and sample_rate 8000 Hz or more; "
            f"got {n_clips}, {seconds} and {sample_rate}"
        )
    spec = {"version": VERSION, "n_clips": n_clips, "seconds": seconds, "sample_rate": sample_rate, "seed": seed}
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]
    home = Path(folder).expanduser() / f"synthetic-{digest}"
    samples = round(seconds * sample_rate)
    if not _complete(home, n_clips, samples):
        aside = home.with_name(f".{home.name}-{uuid.uuid4().hex[:8]}")
        aside.mkdir(parents=True)
        try:
            _write(aside, n_clips, samples, sample_rate, seed)
            (aside / "spec.json").write_text(json.dumps(spec) + "\n")
            if not _complete(home, n_clips, samples):  # otherwise another process has finished the set first
                shutil.rmtree(home, ignore_errors=True)
                _move(aside, home, n_clips, samples)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return home / "manifest.csv"


def default_set(clip_seconds: float, sample_rate: int) -> Path:
    """The manifest of the set that a run without --data trains on, for the length and rate of its clips."""
    n_clips = max(220, round(4_000 / clip_seconds))  # about an hour for any clip length
    seconds = max(0.5, clip_seconds)
    return make_synthetic(cache_root() / "synthetic", n_clips=n_clips, seconds=seconds, sample_rate=sample_rate)


def _move(aside: Path, home: Path, n_clips: int, samples: int) -> None:
    try:
        os.replace(aside, home)
    except OSError:  # another process has moved its own set there, and a full folder is not replaced
        if not _complete(home, n_clips, samples):
            raise


def _complete(home: Path, n_clips: int, samples: int) -> bool:
    try:
        with open(home / "manifest.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        return len(rows) == n_clips and all(
            os.stat(home / row["filename"]).st_size == 44 + 2 * samples for row in rows
        )  # the header has 44 bytes
    except (OSError, KeyError, TypeError, ValueError, csv.Error):
        return False


def _write(home: Path, n_clips: int, samples: int, sample_rate: int, seed: int) -> None:
    names = list(CLASSES)
    backgrounds = _backgrounds(np.random.default_rng([seed, n_clips, samples]), samples)
    for name in names:
        (home / name).mkdir()
    report = Progress(n_clips, "making the synthetic set")
    with contextlib.closing(report), open(home / "manifest.csv", "w", newline="") as file:
        manifest = csv.writer(file, lineterminator="\n")
        manifest.writerow(["filename", "label", "split"])
        for i in range(n_clips):
            name, take = names[i % len(names)], i // len(names)
            clip = _render(CLASSES[name], np.random.default_rng([seed, i]), backgrounds, sample_rate)
            with wave.open(str(home / name / f"{take:05d}.wav"), "wb") as out:  # soundfile would fsync every file
                out.setparams((1, 2, sample_rate, samples, "NONE", ""))
                out.writeframes(clip.astype("<i2").tobytes())
            manifest.writerow([f"{name}/{take:05d}.wav", name, "test" if take % 4 == 3 else "train"])
            report.step()


def _render(sound: Callable[[_Event], np.ndarray], rng: Generator, backgrounds: np.ndarray, rate: int) -> np.ndarray:
    """One clip, int16 `[samples]`: the event at a random onset, over background noise or digital silence."""
    samples = backgrounds.shape[1]
    length = int(samples * rng.uniform(0.5, 1.0))
    onset = int(rng.integers(0, samples - length + 1))
    body = sound(_Event(rng, np.arange(length) / rate, rate))
    fade = np.minimum(1, np.arange(length) / (0.01 * rate))
    body = body * fade * fade[::-1]
    clip = np.zeros(samples)
    clip[onset : onset + length] = body / (np.sqrt((body**2).mean()) + 1e-12)
    if rng.random() > 0.15:  # otherwise digital silence surrounds the event
        noise = np.roll(backgrounds[rng.integers(len(backgrounds))], rng.integers(samples))
        clip += noise * 10 ** (-rng.uniform(20, 50) / 20)
    peak = 10 ** (rng.uniform(-30, 0) / 20)
    return np.rint(clip * (peak * 32767 / np.abs(clip).max())).astype(np.int16)


def _backgrounds(rng: Generator, samples: int) -> np.ndarray:
    """Noises of unit power from white to brown, `[32, samples]`. Each can be looped without a seam."""
    spectrum = np.fft.rfft(rng.standard_normal((32, samples)))
    spectrum *= np.maximum(np.arange(spectrum.shape[1]), 20.0) ** -np.linspace(0, 1, 32)[:, None]
    noise = np.fft.irfft(spectrum, samples)
    return noise / noise.std(axis=1, keepdims=True)
