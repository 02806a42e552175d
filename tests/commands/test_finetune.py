"""Fine-tuning: its parts against their definitions, and the command run to the end, interrupted and on bad input."""

import csv
import json
import os
import signal
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ajepa import finetune, probe
from ajepa.config import PRESETS
from ajepa.data.sources.listing import DataError
from ajepa.encoder import open_encoder
from ajepa.evaluation import classifier
from ajepa.evaluation.classifier import Classifier, key_mask, mixup, parameter_groups, spec_augment, split_labels
from ajepa.finetune import Arguments, Tuner, learning_rate, load_classifier
from ajepa.model.frontend import FrontEnd
from ajepa.model.jepa import Encoder as ViT
from ajepa.utils.run_folder import checkpoints

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
    start, end = load_file(run / "encoder.safetensors"), load_file(out / "encoder.safetensors")
    assert start.keys() == end.keys() and any(not torch.equal(start[k], end[k]) for k in start)
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
    assert "--resume" in capsys.readouterr().out
    assert [p.name for p in checkpoints(tmp_path / "cut" / "checkpoints")] == ["step_00000004", "step_00000006"]
    monkeypatch.setattr(Tuner, "step", step)
    assert finetune.main(arguments(run, manifest, tmp_path / "cut", *more, "--resume")) == 0
    whole, cut = (load_file(tmp_path / name / "classifier.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    whole, cut = (json.loads((tmp_path / n / "finetune.json").read_text())["history"] for n in ("whole", "cut"))
    assert whole[-1]["accuracy"] == cut[-1]["accuracy"]


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
    wanted = load_file(run / "encoder.safetensors")
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


def test_wrong_input_is_named_in_one_line(run, manifest, tmp_path, capsys):
    def refused(*more, start=run):
        capsys.readouterr()
        assert finetune.main(arguments(start, manifest, tmp_path / "out", *more)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    assert "--epochs" in refused("--epochs", "0")
    assert "--masked-keys" in refused("--masked-keys", "1")
    assert "config.json" in refused(start=tmp_path)
    assert "none to train on" in refused("--test", "fold=0,1,2,3")
    assert "arguments" not in refused("--test", "fold=9") and (tmp_path / "out").exists()
