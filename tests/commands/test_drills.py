"""Drills with counts: what commands do in folders that are for something else, and with inputs that are wrong."""

import importlib
import os
import shutil
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import SMALL

from ajepa import convert, embed, export, finetune, pack, probe, train
from ajepa.encoder import Encoder
from ajepa.utils.errors import ConfigError
from ajepa.utils.folders import kind_of
from ajepa_kernels import LOG_MEL_PRESETS

KINDS = ("run", "checkpoint", "fine-tuning", "encoder", "shards", "probe", "headless run", "other", "file")
# The commands that write a folder, and the kinds of folders that each may write into although they hold something.
MAY = {
    "train": (),
    "finetune": (),
    "probe": ("run", "fine-tuning", "encoder", "probe"),
    "export": ("encoder",),
    "convert": ("encoder",),
    "pack": (),
    "save_pretrained": ("encoder",),
}
OF_A_PROBE = {"probe.json", "confusion.png"}


@pytest.fixture(scope="module")
def places(run, tones, tmp_path_factory) -> dict[str, Path]:
    """A folder of each of KINDS, and what the commands need: recordings with folds, and a checkpoint to convert."""
    root = tmp_path_factory.mktemp("places")
    found = {kind: root / kind.replace(" ", "_") for kind in KINDS}
    rows = [f"{tones}/{label}/{i:02d}.wav,{label},{i % 2}" for label in ("low", "high") for i in range(6)]
    found["data"] = root / "tones.csv"
    found["data"].write_text("\n".join(["filename,label,fold", *rows]) + "\n")
    shutil.copytree(run, found["run"])
    labelled = ["--data", str(found["data"]), "--test", "fold=1"]
    assert finetune.main([str(run), *labelled, "--epochs", "1", "--out", str(found["fine-tuning"])]) == 0
    assert export.main([str(run), str(found["encoder"])]) == 0
    assert pack.main([str(tones), str(found["shards"]), "--rate", "16000"]) == 0
    assert probe.main([str(run), *labelled, "--heads", "knn", "--map", "none", "--out", str(found["probe"])]) == 0
    shutil.copytree(sorted((run / "checkpoints").iterdir())[-1], found["checkpoint"])
    shutil.copytree(run / "checkpoints", found["headless run"] / "checkpoints")
    found["other"].mkdir()
    (found["other"] / "thesis.tex").write_text("years of work")
    (found["other"] / "config.json").write_text('{"mine": 1}')
    found["file"].write_text("a file")
    found["theirs"] = root / "JEPA.ckpt"
    torch.save({"state_dict": audio_jepa(LOG_MEL_PRESETS["audio-jepa"])}, found["theirs"])
    assert all(kind_of(found[kind]) == kind for kind in KINDS[:-1])
    return found


def audio_jepa(spec) -> dict[str, torch.Tensor]:
    """The weights of an Audio-JEPA checkpoint with one size of encoder, as its authors name them."""
    from ajepa.config import SIZES
    from ajepa.model.layers import sincos_positions

    width, depth, _ = SIZES["tiny"]
    rows, columns = spec.grid
    positions = sincos_positions(width, spec.grid).unflatten(0, (rows, columns)).transpose(0, 1).flatten(0, 1)
    shapes = {"norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
              "attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
              "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
              "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,)}  # fmt: skip
    weights = {f"blocks.{i}.{name}": torch.zeros(shape) for i in range(depth) for name, shape in shapes.items()}
    patch = {"patch_embed.proj.weight": torch.zeros(width, 1, spec.patch[1], spec.patch[0]),
             "patch_embed.proj.bias": torch.zeros(width), "norm.weight": torch.ones(width),
             "norm.bias": torch.zeros(width), "pos_embed": positions[None]}  # fmt: skip
    return {f"target_encoder.{name}": value for name, value in (weights | patch).items()}


def write_into(command: str, folder: Path, places: dict[str, Path]) -> int:
    labelled = ["--data", str(places["data"]), "--test", "fold=1"]
    if command == "train":
        return train.main(["--data", str(places["data"]), "--out", str(folder), *SMALL])
    if command == "finetune":
        return finetune.main([str(places["run"]), *labelled, "--epochs", "1", "--out", str(folder)])
    if command == "probe":
        options = ["--heads", "knn", "--map", "none", "--out", str(folder)]
        return probe.main([str(places["run"]), *labelled, *options])
    if command == "export":
        return export.main([str(places["run"]), str(folder)])
    if command == "convert":
        return convert.main([str(places["theirs"]), str(folder)])
    if command == "pack":
        return pack.main([str(places["data"]), str(folder)])
    try:
        Encoder.from_pretrained(places["run"]).save_pretrained(folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def contents(path: Path) -> dict[str, str]:
    """The files of a folder, or a file, with their hashes."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", MAY)
def test_63_pairs_of_command_and_folder_lose_nothing(command, kind, places, tmp_path, capsys):
    folder = places[kind]
    if kind in MAY[command]:  # works in a copy
        folder = tmp_path / kind
        shutil.copytree(places[kind], folder)
    before = contents(folder)
    capsys.readouterr()
    status = write_into(command, folder, places)
    errors = capsys.readouterr().err.strip().splitlines()
    if kind in MAY[command]:
        assert status == 0, errors
        replaced = OF_A_PROBE if command == "probe" else set(before)
        kept = {name: digest for name, digest in before.items() if name not in replaced}
        assert kept.items() <= contents(folder).items()
        assert kind_of(folder) == kind
    else:
        assert status == 2 and len(errors) == 1, errors
        assert errors[0].startswith("error: ") and str(folder) in errors[0]
        assert contents(folder) == before


@pytest.mark.parametrize("name", ["run/encoder.safetensors", "encoder/model.safetensors", "mine.npz", "mine.parquet",
                                  "fine-tuning/classifier.safetensors", "mine.py", "mine.onnx"])  # fmt: skip
def test_files_of_others_are_not_replaced(name, places, capsys):
    file = places["run"].parent / name
    if name.startswith("mine"):
        file.write_bytes(b"print('my own work')\n")
    before = file.read_bytes()
    if name.endswith((".py", ".onnx")):
        status = export.main([str(places["run"]), str(file), "--xares" if name.endswith(".py") else "--onnx"])
    else:
        recording = next(places["data"].parent.parent.glob("tones*/low/*.wav"))
        status = embed.main([str(places["run"]), str(recording), "--out", str(file)])
    errors = capsys.readouterr().err.strip().splitlines()
    assert (status, len(errors)) == (2, 1) and str(file) in errors[0], errors
    assert file.read_bytes() == before


# --- wrong inputs -----------------------------------------------------------------------------------------------------

# In these words, capitals stand for the places of the fixture `wrong`.
WRONG = {
    "train": [
        "--data NOWHERE", "--data EMPTY", "--data TEXT", "--data BROKEN", "--data CSV --where fold=9",
        "--data CSV --where color=red", "--data CSV --where fold", "--data CSV --label color", "--data FIFO",
        "--data CSV --eval-data NOWHERE", "--data CSV --eval-where fold=9 --eval-data CSV",
        "--data CSV --eval-test x=1", "--data GZ", "--data DEEP", "--data NAN", "--data SEMICOLON",
        "--steps 0", "--steps -5", "--lr nan", "--lr inf",
        "--lr -1", "--batch-size 0", "--batch-size 99999999999", "--clip-seconds 0", "--clip-seconds nan",
        "--clip-seconds 1e9", "--n-mels 0", "--n-fft 3", "--hop-length 0", "--patch 0 8", "--patch 7 8",
        "--n-frames 1000000000", "--sample-rate 0", "--mask-ratio 0.9 0.2", "--mask-ratio 0.5 1",
        "--mask-ratio nan 0.5", "--min-context 99", "--warmup-steps 5000", "--weight-decay -1", "--betas 0.9 1.0",
        "--ema-start 2",
        "--target-layers 9", "--predictor-heads 5", "--clip-norm 0", "--seed -1", "--eval-clips 0", "--keep 0",
        "--log-every 0", "--micro-batch 99", "--objective masked --pooling projection", "--views 1 --objective clip",
        "--teacher NOWHERE", "--out FILE", "--out /proc/x", "--preset huge", "--resume --compare", "--log-to paper",
        "--init-from NOWHERE", "--init-from EMPTY", "--init-from TEXT", "--config NOWHERE", "--config TEXT",
        "--config DEEPCONFIG", "--config DIGITS", "--config UNKNOWN", "--cooldown-from NOWHERE", "--decoder dali2",
        "--schedule sawtooth", "--float-scale 0", "--prefetch 0", "--loader-threads -1", "--rank-timeout 0",
    ],
    "probe": [
        "NOWHERE --data CSV", "EMPTY --data CSV", "TEXT --data CSV", "RUN --data NOWHERE", "RUN --data CSV --label x",
        "RUN --data CSV --test fold=9", "RUN --data CSV --test fold=0,1", "RUN --data CSV --folds x",
        "RUN --data CSV --folds filename --test fold=1", "RUN --data CSV --seeds 0", "RUN --data CSV --pooling pool",
        "RUN --data CSV --heads nobody", "RUN --data ONECLASS", "DAMAGED --data CSV", "RUN --data CSV --out FILE",
        "RUN --data CSV --where fold=9", "HEADLESS --data CSV",
    ],
    "finetune": [
        "NOWHERE --data CSV --test fold=1", "RUN --data CSV", "RUN --data CSV --test fold=0,1",
        "RUN --data CSV --test fold=9", "RUN --data CSV --test fold=1 --epochs 0",
        "RUN --data CSV --test fold=1 --lr 0", "RUN --data CSV --test fold=1 --lr nan",
        "RUN --data CSV --test fold=1 --mixup -1", "RUN --data CSV --test fold=1 --layer-decay 2",
        "RUN --data ONECLASS --test fold=1", "RUN --data CSV --test fold=1 --out FILE",
        "RUN --data CSV --test fold=1 --masked-keys 1", "DAMAGED --data CSV --test fold=1",
        "RUN --data CSV --test fold=1 --batch-size 0", "RUN --data CSV --test fold=1 --clip-norm nan",
    ],
    "embed": [
        "NOWHERE WAV", "EMPTY WAV", "TEXT WAV", "RUN WAV --out x.txt", "RUN WAV --out FILE/x.npz", "DAMAGED WAV",
        "RUN WAV --pooling pool", "RUN WAV --layers first", "own/er/name WAV", "./nowhere WAV",
    ],
    "export": [
        "NOWHERE OUT", "EMPTY OUT", "RUN FILE", "RUN RUN", "RUN OUT --xares", "RUN my-encoder.py --xares",
        "RUN class.py --xares", "RUN OUT --xares --onnx", "DAMAGED OUT", "TEXT OUT",
    ],
    "convert": ["NOWHERE OUT", "TEXT OUT", "WAV OUT", "EMPTY OUT", "FIFO OUT", "PICKLE OUT", "LIST OUT"],
    "pack": [
        "NOWHERE OUT", "EMPTY OUT", "TEXT OUT", "CSV FILE", "CSV OUT --rate 0", "CSV OUT --shard-mb 0",
        "CSV OUT --max-hours 0", "CSV OUT --max-hours nan", "CSV OUT --where fold=9", "CSV OUT --label x",
        "CSV OUT --float-scale 0", "CSV OUT --threads -1", "CSV OUT --codec mp3", "CSV OUT --silence-db nan",
    ],
}  # fmt: skip
LINES = [(command, line) for command, lines in WRONG.items() for line in lines]


@pytest.fixture(scope="module")
def wrong(places, tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("wrong")
    first = places["data"].read_text().splitlines()[1]
    files = {
        "TEXT": "notes.txt", "GZ": "all.csv.gz", "DEEP": "deep.jsonl", "NAN": "nan.csv", "SEMICOLON": "semicolon.csv",
        "ONECLASS": "one.csv", "DEEPCONFIG": "deep.json", "DIGITS": "digits.json", "UNKNOWN": "unknown.yaml",
    }  # fmt: skip
    found = {name: root / file for name, file in files.items()}
    found["TEXT"].write_text("a shopping list")
    found["GZ"].write_bytes(b"\x1f\x8b")
    found["DEEP"].write_text("[" * 100_000)
    found["NAN"].write_text(f"filename,start,end\n{first.split(',')[0]},nan,nan\n")
    found["SEMICOLON"].write_text(f"filename;label\n{first.replace(',', ';')}\n")
    rows = places["data"].read_text().replace(",low,", ",high,")
    found["ONECLASS"].write_text(rows)
    found["DEEPCONFIG"].write_text('{"a":' * 50_000)
    found["DIGITS"].write_text(f'{{"seed": {"9" * 5_000}}}')
    found["UNKNOWN"].write_text("learning_rate: 0.1\n")
    for name in ("EMPTY", "BROKEN", "OUTSIDE"):
        found[name] = root / name.lower()
        found[name].mkdir()
    (found["BROKEN"] / "a.wav").write_bytes(b"RIFF....WAVE")
    found["FIFO"] = root / "pipe"
    os.mkfifo(found["FIFO"])
    found["PICKLE"], found["LIST"] = root / "pickle.ckpt", root / "list.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(2)}, "other": Path("x")}, found["PICKLE"])
    torch.save([1, 2, 3], found["LIST"])
    found["DAMAGED"] = root / "damaged"
    shutil.copytree(places["run"], found["DAMAGED"])
    data = bytearray((found["DAMAGED"] / "encoder.safetensors").read_bytes())
    data[-100] ^= 4
    (found["DAMAGED"] / "encoder.safetensors").write_bytes(data)
    found |= {"NOWHERE": root / "nowhere", "OUT": root / "out", "RUN": places["run"], "CSV": places["data"],
              "FILE": places["file"], "HEADLESS": places["headless run"], "WAV": Path(first.split(",")[0])}  # fmt: skip
    return {name: str(path) for name, path in found.items()}


def test_there_are_more_than_100_wrong_inputs():
    assert len(LINES) == len(set(LINES)) > 100


@pytest.mark.parametrize(("command", "line"), LINES, ids=[f"{command} {line}" for command, line in LINES])
def test_wrong_inputs_give_one_line_and_leave_nothing(command, line, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [wrong.get(word.partition("/")[0], word.partition("/")[0]) + "".join(word.partition("/")[1:])
             for word in line.split(" ")]  # fmt: skip
    if command == "train" and "--data" not in words:
        words += ["--data", wrong["CSV"]]
    before = contents(Path(wrong["RUN"]))
    capsys.readouterr()
    try:
        status = importlib.import_module(f"ajepa.{command}").main(words)
        lines = [text for text in capsys.readouterr().err.splitlines() if not text.startswith("warning: ")]
        assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1_000, lines
    except SystemExit as stopped:  # the flag itself is unknown, or its value is none of its type
        status = stopped.code
        assert "Traceback" not in capsys.readouterr().err
    assert status == 2
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {"runs/tiny/config.json"}  # a run that never began stands in nobody's way
    assert not Path(wrong["OUT"]).exists()
    assert contents(Path(wrong["RUN"])) == before


# --- files that changed -----------------------------------------------------------------------------------------------


def refuses(kind: str, folder: Path) -> bool:
    """Whether the program notices that a file of a run, an export or a fine-tuning has changed."""
    try:
        Encoder.from_pretrained(folder)
        if kind == "run":
            train.read_summary(folder / "summary.json")
        if kind == "fine-tuning":
            finetune.load_classifier(folder)
    except (ConfigError, ValueError):
        return True
    return False


@pytest.mark.parametrize(("kind", "name"), [
    ("run", "config.json"), ("run", "encoder.safetensors"), ("run", "summary.json"), ("encoder", "config.json"),
    ("encoder", "model.safetensors"), ("fine-tuning", "config.json"), ("fine-tuning", "classifier.safetensors"),
    ("fine-tuning", "finetune.json"),
])  # fmt: skip
def test_40_flipped_bits_of_each_file_are_all_noticed(kind, name, places, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(places[kind], folder, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    assert not refuses(kind, folder)
    whole = (folder / name).read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = min(len(whole), 2_000)
    for i in range(40):
        at = int(torch.randint(header if i % 2 else len(whole), (), generator=generator))
        data = bytearray(whole)
        data[at] ^= 1 << int(torch.randint(8, (), generator=generator))
        (folder / name).write_bytes(data)
        assert refuses(kind, folder), f"byte {at} of {name}: {whole[at]:#x} became {data[at]:#x}"
