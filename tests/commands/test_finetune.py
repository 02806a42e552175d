"""Fine-tuning: its parts against their definitions, and the command run to the end, interrupted and on bad input."""

import csv
import json
import os
import shutil
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ajepa import finetune, probe
from ajepa.config import PRESETS, SIZES
from ajepa.data.index import build_index
from ajepa.data.sources.listing import DataError
from ajepa.encoder import Encoder, EncoderConfig, open_encoder
from ajepa.evaluation import classifier
from ajepa.evaluation.classifier import Classifier, key_mask, mixup, parameter_groups, spec_augment, split_labels
from ajepa.evaluation.labelled import materials, seen_in_training
from ajepa.finetune import Arguments, Tuner, learning_rate, load_classifier
from ajepa.model.frontend import FrontEnd
from ajepa.model.jepa import Encoder as ViT
from ajepa.utils.errors import UserError
from ajepa.utils.json_files import read_json
from ajepa.utils.lock import locked
from ajepa.utils.run_folder import checkpoints
from ajepa.utils.tensor_files import tensors_hash

CFG = PRESETS["tiny"]


def classifier_of(classes):
    return Classifier(ViT(CFG.model, CFG.front_end), CFG.front_end, classes)


@pytest.fixture(scope="module")
def manifest(tones, tmp_path_factory):
    """The tones with one label, with several ("tags": the class and sometimes "loud"), and with a fold."""
    path = tmp_path_factory.mktemp("manifest") / "meta.csv"
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label", "tags", "fold"])
        for i, wav in enumerate(sorted(tones.rglob("*.wav"))):
            kind = wav.parent.name
            rows.writerow([wav, kind, kind if i % 4 == 0 else f"{kind}; loud" if i % 4 < 3 else f"loud,{kind}", i % 4])
    return path


def arguments(run, manifest, out, *more):
    return [str(a) for a in (run, "--data", manifest, "--label", "label", "--test", "fold=3", "--epochs", "2",
                             "--batch-size", "8", "--lr", "3e-3", "--out", out, *more)]  # fmt: skip


def test_masked_keys_attend_but_are_not_attended_to():
    torch.manual_seed(0)
    model = classifier_of(5).eval()
    N = CFG.front_end.n_patches
    patches, lengths = torch.randn(2, N, CFG.front_end.patch_dim), torch.tensor([32_000, 9_000])
    real = torch.tensor([N, 24])  # 9,000 samples make 17 frames, or three columns of eight patches
    keys = key_mask(torch.arange(N) < real[:, None], 0.25, torch.Generator().manual_seed(0))
    dropped = [int((~k).sum()) for k in keys.split(real.tolist())]
    assert dropped == [16, 6]

    latents = []
    model.encoder.register_forward_hook(lambda module, inputs, output: latents.append(output))
    changed, token = patches.clone(), int((~keys[:N]).nonzero()[0])
    changed[0, token] += 5
    with torch.no_grad():
        for x in (patches, changed):
            model(x, lengths, 0.25, torch.Generator().manual_seed(0))
        model(patches, lengths)
    masked, other, whole = latents
    assert ((masked - other).abs().amax(-1) > 1e-6).nonzero()[:, 0].tolist() == [token]
    assert not torch.allclose(masked, whole, atol=1e-3)  # masking is off by default


def test_logits_pool_real_tokens_only():
    model = classifier_of(3).eval()
    pcm = torch.randint(-9999, 9999, (1, 32_000), dtype=torch.int16)
    lengths = torch.tensor([9_000])
    loud = pcm.clone()
    loud[:, 9_000:] = 32_000
    with torch.no_grad():
        a, b = (model(FrontEnd(CFG.front_end)(x, lengths), lengths) for x in (pcm, loud))
    assert torch.equal(a, b)


def test_deeper_layers_have_lower_learning_rates():
    model = classifier_of(3)
    scale = {p: (g["scale"], g["weight_decay"]) for g in parameter_groups(model, 0.5, 0.05) for p in g["params"]}
    assert len(scale) == len(list(model.parameters()))
    assert scale[model.head.weight] == (1, 0.05) and scale[model.head.bias] == (1, 0)
    assert scale[model.encoder.norm.weight] == (1, 0)
    assert [scale[b.fc1.weight][0] for b in model.encoder.blocks] == [1 / 16, 1 / 8, 1 / 4, 1 / 2]
    assert scale[model.encoder.embed.weight][0] == 1 / 32


def test_warmup_and_cosine():
    args = Arguments("r", "d", "t", lr=1.0, warmup=0.1)
    rates = [learning_rate(args, s, 100) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1 and rates[10] == 1 and rates[99] == pytest.approx(0)
    assert all(a >= b for a, b in pairwise(rates[9:]))


def test_mixup_mixes_sound_and_labels_alike():
    pcm = torch.full((6, 10), 1000, dtype=torch.int16) * torch.arange(1, 7, dtype=torch.int16)[:, None]
    lengths = torch.tensor([10, 4, 10, 10, 10, 10])
    mixed, longer, targets = mixup(pcm, lengths, torch.eye(6), 0.5, np.random.default_rng(0))
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    torch.testing.assert_close(mixed[:, 0].float(), targets @ torch.arange(1000.0, 7000, 1000), atol=0.51, rtol=0)
    torch.testing.assert_close(mixed[:, 9].float(), targets @ (pcm[:, 9] * (lengths > 9)).float(), atol=0.51, rtol=0)
    assert all(n == max(lengths[t > 0].tolist()) for n, t in zip(longer.tolist(), targets, strict=True))
    assert ((targets > 0).sum(1) == 2).any()


def test_spec_augment_hides_whole_bands_and_frames():
    spec = CFG.front_end
    patches = torch.randn(64, spec.n_patches, spec.patch_dim)
    out = spec_augment(patches, spec, 16, 24, torch.Generator().manual_seed(0))

    def image(x):
        return x.view(64, *spec.grid, *spec.patch).transpose(2, 3).reshape(64, 64, 64)

    hidden = image(out) != image(patches)
    bands, frames = hidden.all(2), hidden.all(1)
    assert torch.equal(hidden, bands[:, :, None] | frames[:, None])
    for runs, most in ((bands, 16), (frames, 24)):
        counts = runs.sum(1)
        assert counts.min() == 0 and most - 3 <= counts.max() <= most
        assert (runs.int().diff(dim=1) == 1).sum(1).max() <= 1  # a single run of bands or frames
    means = patches.mean((1, 2))[:, None, None].expand_as(hidden)
    assert torch.equal(image(out)[hidden], means[hidden])


def test_several_labels_are_split():
    classes, targets = split_labels(["dog;rain", "rain, cat", "dog"], True)
    assert classes == ["cat", "dog", "rain"] and targets.tolist() == [[0, 1, 1], [1, 0, 1], [0, 1, 0]]
    assert split_labels(["a;b", "c"], False)[0] == ["a;b", "c"]


def test_labels_that_are_lists_give_their_parts():
    classes, targets = split_labels(['["dog", "rain, heavy"]', "dog", '["rain, heavy"]', "[noise]"], True)
    assert classes == ["[noise]", "dog", "rain, heavy"]
    assert targets.tolist() == [[0, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    classes, targets = split_labels(['["a, b"]', "a, b", "c"], False)
    assert classes == ["a, b", "c"] and targets.tolist() == [[1, 0], [1, 0], [0, 1]]
    with pytest.raises(DataError, match=r"several labels \(dog, cat\): add --multi-label"):
        split_labels(["dog", '["dog", "cat"]'], False)


def test_the_command_learns_the_tones_and_writes_loadable_results(run, manifest, tmp_path, capsys):
    out = tmp_path / "out"
    more = ("--mixup", "0.1", "--freq-mask", "2", "--time-mask", "2", "--label-smoothing", "0.1", "--epochs", "8")
    assert finetune.main(arguments(run, manifest, out, *more)) == 0
    result = json.loads((out / "finetune.json").read_text())
    assert result["accuracy"] >= 0.9 and f"accuracy {result['accuracy']:.1%}" in capsys.readouterr().out
    assert result["train"] == 30 and result["test"] == 10 and result["classes"] == ["high", "low"]
    model, classes = load_classifier(out)
    pcm = torch.randint(-9999, 9999, (2, 8_000), dtype=torch.int16)
    assert model(FrontEnd(model.spec)(pcm), torch.tensor([8_000, 4_000])).shape == (2, len(classes))
    start, end = (open_encoder(folder).encoder for folder in (run, out))
    assert end.config == replace(start.config, pad="zero", projector=None)
    assert any(not torch.equal(a, b) for a, b in zip(start.vit.parameters(), end.vit.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), end.vit.parameters(), strict=True))
    assert probe.main([str(out), "--data", str(manifest), "--test", "fold=3", "--heads", "knn", "--map", "none"]) == 0
    capsys.readouterr()
    assert finetune.main(arguments(run, manifest, out, *more, "--resume")) == 0  # the run is already finished
    assert "accuracy" in capsys.readouterr().out


def test_several_labels_are_scored_by_mean_average_precision(run, manifest, tmp_path):
    argv = arguments(run, manifest, tmp_path / "out", "--multi-label", "--label", "tags", "--epochs", "8")
    assert finetune.main(argv) == 0
    result = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert result["classes"] == ["high", "loud", "low"] and result["mAP"] > 0.8


def test_an_interrupted_run_resumes_to_the_same_bits(run, manifest, tmp_path, monkeypatch, capsys):
    more = ("--mixup", "0.3", "--time-mask", "5")
    assert finetune.main(arguments(run, manifest, tmp_path / "whole", *more)) == 0
    step = Tuner.step

    def interrupted(self, pcm, lengths, targets, number):
        if number == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, pcm, lengths, targets, number)

    monkeypatch.setattr(Tuner, "step", interrupted)
    assert finetune.main(arguments(run, manifest, tmp_path / "cut", *more)) == 130
    again = f"stopped after step 6; continue with --out {tmp_path / 'cut'} --resume\n"
    assert capsys.readouterr().err.endswith(again)
    assert [p.name for p in checkpoints(tmp_path / "cut" / "checkpoints")] == ["step_00000004", "step_00000006"]
    monkeypatch.setattr(Tuner, "step", step)
    assert finetune.main(arguments(run, manifest, tmp_path / "cut", *more, "--resume")) == 0
    whole, cut = (load_file(tmp_path / name / "classifier.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    whole, cut = (json.loads((tmp_path / n / "finetune.json").read_text())["history"] for n in ("whole", "cut"))
    assert whole == cut


def test_fine_tuning_starts_from_the_ema_target_encoder(run, manifest, tmp_path, monkeypatch):
    starts = []
    step = Tuner.step

    def spy(self, *args):
        if args[-1] == 0:
            starts.append({k: v.clone() for k, v in self.model.encoder.state_dict().items()})
        return step(self, *args)

    monkeypatch.setattr(Tuner, "step", spy)
    for init in ("pretrained", "random"):
        assert finetune.main(arguments(run, manifest, tmp_path / init, "--init", init, "--epochs", "1")) == 0
    wanted = open_encoder(run).encoder.vit.state_dict()
    assert all(torch.equal(starts[0][k], wanted[k]) for k in wanted)
    assert any(not torch.equal(starts[1][k], wanted[k]) for k in wanted)


def test_masking_is_off_when_scoring(run, manifest, monkeypatch):
    args = Arguments(str(run), str(manifest), "fold=3", label="label")
    task, _ = finetune.open_task(args)
    tuner = Tuner(args, open_encoder(run), 2, 10)
    shares = []
    monkeypatch.setattr(classifier, "key_mask", lambda *a: shares.append(a))
    tuner.score(task, [])
    assert not shares


# --- what can be fine-tuned, and where to --------------------------------------------------------------------------


def test_every_kind_of_encoder_is_fine_tuned_and_scored_alike(run, manifest, tmp_path, monkeypatch):
    """A run, its checkpoint, its export and an id of the hub give the same start; a fine-tuning continues another."""
    exported = tmp_path / "exported"
    open_encoder(run).encoder.save_pretrained(exported)
    last = sorted((run / "checkpoints").iterdir())[-1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ajepa.encoder._from_hub", lambda name: open_encoder(exported)._replace(file=tmp_path / name))
    results = []
    for source, out in ((run, "a"), (last, "b"), (exported, "exported/finetune"), ("owner/name", "finetune/name")):
        argv = arguments(source, manifest, tmp_path / out, "--epochs", "1")
        if "finetune" in out:  # the default
            argv = argv[: argv.index("--out")] + ["--epochs", "1"]
        assert finetune.main(argv) == 0
        results.append((tmp_path / out / "classifier.safetensors").read_bytes())
    assert results == results[:1] * 4
    assert finetune.main(arguments("a", manifest, "c", "--epochs", "1")) == 0
    first, second = (json.loads((tmp_path / name / "finetune.json").read_text()) for name in ("a", "c"))
    assert second["checkpoint"]["file"] == "a/model.safetensors"
    assert second["checkpoint"]["sha256"] == tensors_hash(open_encoder("a").encoder.vit.state_dict())
    assert first["checkpoint"]["sha256"] != second["checkpoint"]["sha256"]


def test_a_converted_encoder_keeps_its_epsilon(tmp_path, tones):
    config = EncoderConfig(CFG.front_end, "tiny", 32_000, pooling="projection", projector=(8, 4), pad="silence",
                           norm_eps=1e-3)  # fmt: skip
    Encoder(config).save_pretrained(tmp_path / "converted")
    argv = [str(tmp_path / "converted"), "--data", str(tones), "--test", "label=low", "--epochs", "1", "--pad", "run"]
    assert finetune.main(argv) == 2  # one class is left to train on
    manifest = tmp_path / "few.csv"
    files = sorted(tones.rglob("*.wav"))[::5]
    manifest.write_text("file,label,fold\n" + "".join(f"{f},{f.parent.name},{i % 2}\n" for i, f in enumerate(files)))
    argv = [str(tmp_path / "converted"), "--data", str(manifest), "--test", "fold=1", "--epochs", "1", "--pad", "run"]
    assert finetune.main(argv) == 0
    model, _ = load_classifier(tmp_path / "converted" / "finetune")
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-3}
    tuned = open_encoder(tmp_path / "converted" / "finetune").encoder.config
    assert (tuned.pad, tuned.pooling, tuned.projector) == ("zero", "mean", None)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_of_another_kind_is_left_as_it_is(run, manifest, tmp_path, capsys):
    exported, other, headless = tmp_path / "exported", tmp_path / "other", tmp_path / "headless"
    open_encoder(run).encoder.save_pretrained(exported)
    for folder, name in ((other, "notes.txt"), (headless, "metrics.jsonl")):
        folder.mkdir()
        (folder / name).write_text("")
    last = sorted((run / "checkpoints").iterdir())[-1]
    for folder, what in ((run, "a pretraining run"), (exported, "an exported encoder"), (other, "other files"),
                         (headless, "without the config.json"), (last, "a checkpoint")):  # fmt: skip
        before = contents(folder)
        for more in ((), ("--resume",), ("--overwrite",)):
            assert finetune.main(arguments(run, manifest, folder, *more)) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"error: --out {folder} holds") and what in error and error.count("\n") == 1
        assert contents(folder) == before


def test_overwrite_begins_anew_and_keeps_the_old_folder(run, manifest, tmp_path, capsys):
    out = tmp_path / "out"
    assert finetune.main(arguments(run, manifest, out, "--epochs", "1")) == 0
    first = contents(out)
    assert finetune.main(arguments(run, manifest, out, "--epochs", "1", "--lr", "1e-3")) == 2
    assert "--resume to continue it, --overwrite to begin anew" in capsys.readouterr().err
    assert finetune.main(arguments(run, manifest, out, "--epochs", "1", "--lr", "1e-3", "--resume")) == 2
    assert "leave as they were --lr" in capsys.readouterr().err
    first_checkpoint = sorted((run / "checkpoints").iterdir())[0]
    assert finetune.main(arguments(first_checkpoint, manifest, out, "--epochs", "1", "--resume")) == 2
    assert f"leave as they were the encoder (it was that of {run / 'encoder.safetensors'})" in capsys.readouterr().err
    assert finetune.main(arguments(run, manifest, out, "--epochs", "1", "--lr", "1e-3", "--overwrite")) == 0
    (old,) = tmp_path.glob("out.old-*")
    assert contents(old) == first
    assert json.loads((out / "finetune.json").read_text())["arguments"]["lr"] == 1e-3


def test_two_fine_tunings_do_not_share_a_folder(run, manifest, tmp_path, capsys):
    with locked(tmp_path):
        assert finetune.main(arguments(run, manifest, tmp_path)) == 2
    assert f"error: {tmp_path} is in use by process {os.getpid()} on" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_wrong_data_leaves_a_folder_that_right_data_can_use(run, manifest, tmp_path, capsys):
    wrong = arguments(run, manifest, tmp_path / "out", "--epochs", "1")
    wrong[wrong.index("label")] = "lable"
    assert finetune.main(wrong) == 2 and "no column 'lable'" in capsys.readouterr().err
    assert finetune.main(arguments(run, manifest, tmp_path / "out", "--epochs", "1")) == 0


# --- kills and damage -----------------------------------------------------------------------------------------------


def shrink(patch):
    patch.setitem(SIZES, "tiny", (32, 1, 4))


def main_with_a_micro_model(argv):
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        return finetune.main(argv)


# Before which call of which function a fine-tuning is killed, or so many seconds later.
MOMENTS = """
ajepa.utils.lock.os.link 1
ajepa.finetune.write_json 1
ajepa.finetune.write_json 2
ajepa.finetune.Tuner 1
ajepa.finetune.Tuner.step 1
ajepa.finetune.Tuner.step 3 0.002
ajepa.training.checkpoint.write_synced 1
ajepa.training.checkpoint.write_synced 3
ajepa.training.checkpoint._sync 1
ajepa.training.checkpoint._sync 2
ajepa.finetune.load_latest 1
ajepa.finetune.Tuner.loss 6
ajepa.training.checkpoint.write_synced 6
ajepa.training.checkpoint.load_checkpoint 1
ajepa.finetune.Tuner.step 9 0.004
ajepa.training.checkpoint._sync 3
ajepa.finetune.Tuner.score 1
ajepa.finetune.finish 1
ajepa.finetune.write_tensors 2
ajepa.finetune.write_json 3
""".strip().splitlines()


def test_killed_at_20_moments_a_fine_tuning_resumes_to_the_same_bits(manifest, tmp_path, forks, monkeypatch):
    shrink(monkeypatch)
    config = EncoderConfig(replace(CFG.front_end, n_frames=16), "tiny", 8_000)
    Encoder(config).save_pretrained(tmp_path / "micro")
    more = ("--epochs", "16", "--eval-every", "10", "--keep", "100", "--mixup", "0.3", "--time-mask", "5")
    micro, log = {"call": "test_finetune:main_with_a_micro_model"}, tmp_path / "log"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert forks.run(arguments(tmp_path / "micro", manifest, whole, *more), log, **micro) == 0, log.read_text()
    again = arguments(tmp_path / "micro", manifest, broken, *more, "--resume")
    reached = []
    for moment in MOMENTS:
        assert forks.wait(forks.start(again, log, **micro, KILL=moment)) == -signal.SIGKILL, (moment, log.read_text())
        reached.append(len(checkpoints(broken / "checkpoints")))
    assert len(reached) == 20 and len(set(reached)) > 5 and reached[-1] == 16, reached
    assert forks.run(again, log, **micro) == 0, log.read_text()
    ours, theirs = contents(broken), contents(whole)
    for name in ("finetune.json", "arguments.json"):
        assert json.loads(ours.pop(Path(name)))["classes" if name == "finetune.json" else "data"]
        theirs.pop(Path(name))
    assert ours == theirs and len(checkpoints(broken / "checkpoints")) == 16
    ours, theirs = (json.loads((folder / "finetune.json").read_text()) for folder in (broken, whole))
    assert {k: v for k, v in ours.items() if k not in ("arguments", "sha256")} == {
        k: v for k, v in theirs.items() if k not in ("arguments", "sha256")
    }


@pytest.fixture(scope="module")
def tuned(run, manifest, tmp_path_factory):
    """A finished fine-tuning."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    assert finetune.main(arguments(run, manifest, out, "--epochs", "1")) == 0
    return out


def test_every_damaged_byte_is_noticed_in_one_line(tuned, run, manifest, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(tuned, folder)
    rng = np.random.default_rng(0)
    for name in ("finetune.json", "arguments.json", "config.json", "classifier.safetensors", "model.safetensors"):
        data = (folder / name).read_bytes()
        for position in rng.integers(len(data), size=8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << rng.integers(7)
            (folder / name).write_bytes(damaged)
            if name == "arguments.json":
                assert finetune.main(arguments(run, manifest, folder, "--epochs", "1", "--resume")) == 2
                error = capsys.readouterr().err
                assert error.startswith(f"error: {folder / name} ") and error.count("\n") == 1
            else:
                with pytest.raises(UserError, match=name):
                    load_classifier(folder) if name != "model.safetensors" else open_encoder(folder)
        (folder / name).write_bytes(data)
    assert load_classifier(folder)[1] == ["high", "low"]


def test_a_folder_of_an_earlier_version_is_read(tuned, run, manifest, tmp_path, monkeypatch):
    """It holds the run's configuration and encoder.safetensors, and no checksums."""
    old = tmp_path / "old"
    shutil.copytree(tuned, old)
    (old / "config.json").write_bytes((run / "config.json").read_bytes())
    vit = {k.removeprefix("vit."): x for k, x in load_file(old / "model.safetensors").items()}
    save_file(vit, old / "encoder.safetensors", {"format": "pt"})
    (old / "model.safetensors").unlink()
    save_file(load_file(old / "classifier.safetensors"), old / "classifier.safetensors", {"format": "pt"})
    for name in ("finetune.json", "arguments.json"):
        (old / name).write_text(json.dumps(read_json(old / name)))
    monkeypatch.setenv("HOME", str(tmp_path))
    pcm, lengths = torch.randint(-9999, 9999, (2, 8_000), dtype=torch.int16), torch.tensor([8_000, 4_000])
    (now, classes), (before, old_classes) = load_classifier(tuned), load_classifier("~/old")
    with torch.no_grad():
        assert torch.equal(*(m(FrontEnd(m.spec)(pcm, lengths), lengths) for m in (now, before)))
    assert classes == old_classes
    assert finetune.main(arguments(run, manifest, "~/old", "--epochs", "1", "--resume")) == 0


# --- warnings and wrong input ---------------------------------------------------------------------------------------


def test_classes_without_training_rows_are_named(run, tones, tmp_path, capsys):
    manifest = tmp_path / "meta.csv"
    rows = [f"{f},{f'rare{i:02d}' if i % 5 == 4 else f.parent.name},{int(i % 5 == 4)}"
            for i, f in enumerate(sorted(tones.rglob("*.wav")))]  # fmt: skip
    manifest.write_text("\n".join(["file,label,fold", *rows]))
    argv = [str(run), "--data", str(manifest), "--test", "fold=1", "--epochs", "1", "--out", str(tmp_path / "out")]
    assert finetune.main(argv) == 0
    message = (
        "8 of 10 classes occur in no training row and cannot be recognised: rare04, rare09, rare14, rare19, rare24"
    )
    assert f"warning: {message}, ...\n" in capsys.readouterr().err


def test_recordings_that_a_fine_tuning_learned_from_are_recognised(tuned, manifest, tmp_path, capsys):
    """So are those that the run behind it was pretrained on, here all of them."""
    known = materials(None, tuned / "model.safetensors")
    index = build_index(manifest, label_column="label")
    fold = np.array(index.metadata["fold"])
    assert (seen_in_training(index, known[-1:]) == np.where(fold == "3", "", "path")).all()
    assert (seen_in_training(index, known) == "path").all() and len(known) == 2


def test_memory_is_estimated_before_it_is_taken(run, manifest, tmp_path, capsys, monkeypatch):
    assert finetune.main(arguments(run, manifest, tmp_path / "out", "--batch-size", "1000000000")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --batch-size 1000000000: its clips need") and error.count("\n") == 1
    monkeypatch.setattr(classifier, "available_memory", lambda: 10**11)
    with pytest.raises(DataError, match=r"200,000 different labels with 200,000 classes need 160\.0 GB"):
        split_labels([str(i) for i in range(200_000)], False)


def test_wrong_input_is_named_in_one_line(run, manifest, tmp_path, capsys):
    def refused(*more, start=run):
        capsys.readouterr()
        assert finetune.main(arguments(start, manifest, tmp_path / "out", *more)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    assert "--epochs" in refused("--epochs", "0")
    assert "--masked-keys" in refused("--masked-keys", "1")
    if not torch.cuda.is_available():
        assert "no CUDA device is here" in refused("--device", "cuda")
    assert "--lr nan: must be a finite number" in refused("--lr", "nan")
    assert "--epochs 99999999999: too large" in refused("--epochs", "99999999999")
    assert "--float-scale 0.0: the scale must be" in refused("--float-scale", "0")
    assert "no such folder" in refused(start=tmp_path / "nothing")
    assert "config.json" in refused(start=tmp_path)
    assert "none to train on" in refused("--test", "fold=0,1,2,3")
    assert "arguments" not in refused("--test", "fold=9") and (tmp_path / "out").exists()
