"""`python -m ajepa.finetune ENCODER --data ...`: train a whole pretrained encoder and a linear head on labels.

files -> PCM (mixup) -> log-mel patches (SpecAugment) -> encoder (regularised masking) -> mean -> head -> loss.
"""

import contextlib
import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from ajepa.config import ConfigError, ModelConfig
from ajepa.data.index import DataError, Index, build_index
from ajepa.data.loader import AudioLoader
from ajepa.encoder import CONFIG, WEIGHTS, EncoderConfig, Opened, open_encoder
from ajepa.evaluation.classifier import Classifier, mixup, parameter_groups, spec_augment, split_labels
from ajepa.evaluation.feature_cache import CHUNKS_AT_ONCE, read_chunks
from ajepa.evaluation.labelled import (
    SETTINGS,
    Material,
    absent_classes,
    counts_of,
    labelled,
    materials,
    seen_in_training,
    ways,
)
from ajepa.model.frontend import FrontEnd
from ajepa.model.jepa import Encoder as ViT
from ajepa.model.pretrained import load_weights
from ajepa.training.checkpoint import load_latest, save_checkpoint
from ajepa.training.ranks import Ranks
from ajepa.training.schedules import cosine
from ajepa.utils import cli
from ajepa.utils.command import command, describe
from ajepa.utils.devices import autocast_of, available_memory, choose_device
from ajepa.utils.folders import claim, overwrite, results_folder
from ajepa.utils.json_files import read_json, write_json
from ajepa.utils.lock import Lock, locked
from ajepa.utils.signals import catch_signals
from ajepa.utils.tensor_files import read_tensors, tensors_hash, write_tensors
from ajepa_kernels import AdamWEMA

RESULT, CLASSIFIER = "finetune.json", "classifier.safetensors"
# Settings that a continued fine-tuning may change. The encoder may have another name, but not other weights.
MAY_CHANGE = ("run", "resume", "overwrite", "out", "device", "keep")


@dataclass(frozen=True)
class Arguments:
    """Fine-tune an encoder on labelled recordings and score it on others."""

    run: tyro.conf.Positional[str]
    """The encoder: a run folder, one checkpoint in it (RUN/checkpoints/step_...), a fine-tuning, an exported or
    converted encoder, or an id on the Hugging Face hub."""
    data: str
    """Labelled recordings: a folder with one sub-folder per class, a manifest (CSV, JSONL, ...), or webdataset tars."""
    test: str
    """Rows to score, such as "fold=4" or "split=test". All other rows are trained on."""
    where: str | None = None
    """Rows to use, for training and for scoring. None: all rows."""
    label: str | None = None
    """Column that holds the label. None: a column called label, target, category or class."""
    decoder: Literal["auto", "dali", "soundfile"] = "auto"
    """Library that decodes the recordings: see python -m ajepa.train --help-all."""
    float_scale: float = 1.0
    """Full scale of floating-point recordings, such as 32768 for 16-bit values that were stored as floats."""
    multi_label: bool = False
    """A recording has several labels, as a list or separated by "," or ";". The loss is the binary cross-entropy, the
    score the mean average precision."""
    out: str | None = None
    """Folder of the results. None: finetune in the folder of the run or encoder; finetune/NAME for one of the hub."""
    resume: bool = False
    """Continue from the last checkpoint in --out, exactly as if the run had not stopped."""
    overwrite: bool = False
    """Begin anew where --out holds a fine-tuning. The old folder is kept under another name."""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained: start from the pretrained encoder. random: from an untrained one, to see the worth of the
    pretraining."""
    epochs: int = 30
    """Passes over the training rows."""
    batch_size: int = 32
    """Clips per step."""
    lr: float = 1e-3
    """Peak learning rate of the head."""
    layer_decay: float = 0.75
    """Learning rate of a layer, divided by the learning rate of the layer above it."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises to its peak. A cosine to 0 follows."""
    weight_decay: float = 0.05
    """Weight decay of matrices. Biases and norms have none."""
    clip_norm: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""
    masked_keys: float = 0.1
    """A-JEPA's regularised masking: the share of tokens that attend to others but are not attended to. Off when
    scoring."""
    mixup: float = 0.0
    """alpha of the Beta distribution of the mixing weight. 0: no mixing."""
    freq_mask: int = 0
    """SpecAugment: the largest number of mel bands hidden in a clip."""
    time_mask: int = 0
    """SpecAugment: the largest number of frames hidden in a clip."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over all classes."""
    pad: Literal["run", "zero", "cyclic"] = "zero"
    """Recordings shorter than a clip. zero: encode only the recording. cyclic: repeat it. run: cyclic where the encoder
    was pretrained so, else zero."""
    eval_every: int = 5
    """Epochs between two scores on the test rows. Scores choose nothing: the last weights are kept."""
    keep: int = 2
    """Number of checkpoints kept; one is written per epoch."""
    seed: int = 0
    """Seed of the head's initialisation, the crops and the augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto: the GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the computation. auto: bf16 on a GPU, fp32 on a CPU."""


class Task(NamedTuple):
    """Labelled recordings to train on and to score. `targets` is `[L, K]`: a row for each label as written."""

    train: Index
    test: Index
    classes: list[str]
    targets: torch.Tensor

    def of(self, labels_B: torch.Tensor) -> torch.Tensor:
        return self.targets[labels_B]


class Start(NamedTuple):
    """The encoder that a fine-tuning starts from."""

    file: str
    sha256: str  # of its weights
    trained_on: list[Material]


class Tuner:
    """Classifier, optimiser and front end of one run. Computes a training step, and scores whole recordings.

    It trains the encoder of `opened` itself.
    """

    def __init__(self, args: Arguments, opened: Opened, classes: int, steps: int):
        self.args, self.config, self.steps = args, opened.encoder.config, steps
        threads = opened.run.data.loader_threads if opened.run else 0
        self.reading: dict[str, Any] = {"threads": threads, "decoder": args.decoder}
        self.device, self.ranks = choose_device(args.device), Ranks()  # one process: save_checkpoint expects ranks
        self.autocast = partial(autocast_of, self.device, args.precision)
        self.front_end = FrontEnd(self.config.front_end)
        vit, spec = opened.encoder.vit, self.config.front_end
        shape = opened.run.model if opened.run else ModelConfig(size=self.config.size, positions=self.config.positions)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            start = ViT(shape, spec)  # in either case, so that the head starts with the same weights
            self.model = Classifier(vit, spec, classes)
        if args.init == "random":
            load_weights(vit, start.state_dict(), "the initialisation")
        self.model.to(self.device).train()
        groups = parameter_groups(self.model, args.layer_decay, args.weight_decay)
        self.optimizer = AdamWEMA(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)
        self.parameters = list(self.model.parameters())

    def step(self, pcm, lengths, targets, step: int) -> torch.Tensor:
        """Train on `pcm` int16 `[B, S]` and targets float `[B, K]`. All randomness is a function of (seed, step)."""
        args, spec = self.args, self.config.front_end
        rng = np.random.default_rng([args.seed, step])
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        if args.mixup:
            pcm, lengths, targets = mixup(pcm, lengths, targets, args.mixup, rng)
        if args.label_smoothing and not args.multi_label:
            targets = targets * (1 - args.label_smoothing) + args.label_smoothing / targets.shape[1]
        pcm, lengths, targets = (t.to(self.device) for t in (pcm, lengths, targets))
        with torch.no_grad():
            patches = self.front_end(pcm, lengths)
            if args.freq_mask or args.time_mask:
                patches = spec_augment(patches, spec, args.freq_mask, args.time_mask, generator)
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(args, step, self.steps)
        with self.autocast():
            logits = self.model(patches, lengths, args.masked_keys, generator)
        loss = self.loss(logits.float(), targets)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True)
        bad = (~(loss.detach() + norm).isfinite()).float()
        self.optimizer.step(grad_scale=(norm / args.clip_norm).clamp(min=1.0), found_inf=bad)
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def loss(self, logits, targets) -> torch.Tensor:
        if self.args.multi_label:
            return F.binary_cross_entropy_with_logits(logits, targets)
        return F.cross_entropy(logits, targets)

    @torch.no_grad()
    def score(self, task: Task, skipped: list[tuple[str, str]]) -> dict[str, float]:
        """Accuracy on `task.test`, or the mean average precision over the classes that occur there.

        A recording longer than a clip is cut into clips, and their probabilities are averaged.
        """
        samples = self.config.clip_samples
        total, weights = torch.zeros(len(task.test), task.targets.shape[1]), torch.zeros(len(task.test), 1)
        read = torch.zeros(len(task.test), dtype=torch.bool)
        for batch in read_chunks(task.test, self.config.front_end, samples, self.reading, skipped):
            parts = zip(batch.pcm.split(CHUNKS_AT_ONCE), batch.lengths.split(CHUNKS_AT_ONCE), strict=True)
            logits = torch.cat([self.logits(pcm, lengths) for pcm, lengths in parts])
            chances = logits.sigmoid() if self.args.multi_label else logits.softmax(-1)
            weight = batch.lengths[:, None].float()  # a short tail has little weight
            rows = batch.items[batch.owner]
            total.index_add_(0, rows, chances * weight)
            weights.index_add_(0, rows, weight)
            read[batch.items] = batch.complete
        chances, labels = (total / weights.clamp(min=1))[read], torch.from_numpy(task.test.labels)[read]
        targets = task.of(labels)
        if not chances.isfinite().all():
            raise ConfigError("the fine-tuned weights are not finite: lower --lr, and add --overwrite to begin anew")
        if not self.args.multi_label:
            return {"accuracy": (chances.argmax(-1) == targets.argmax(-1)).double().mean().item()}
        from sklearn.metrics import average_precision_score  # takes a second

        present = targets.any(0)
        precisions = average_precision_score(targets[:, present].numpy(), chances[:, present].numpy(), average=None)
        return {"mAP": float(np.mean(precisions))}

    def logits(self, pcm, lengths) -> torch.Tensor:
        pcm, lengths = pcm.to(self.device), lengths.to(self.device)
        with self.autocast():
            return self.model(self.front_end(pcm, lengths), lengths).float().cpu()


def learning_rate(args: Arguments, step: int, steps: int) -> float:
    """The head's learning rate: rises linearly to `--lr` during the warm-up, then falls to 0 along a cosine."""
    rising = max(1, round(args.warmup * steps))
    return args.lr * (step + 1) / rising if step < rising else cosine(args.lr, 0.0, step - rising, steps - rising)


def finetune(args: Arguments) -> dict[str, Any]:
    """Fine-tune until the last step and return the contents of `finetune.json`.

    Raises ConfigError, DataError or CheckpointError, and KeyboardInterrupt after Ctrl-C, once a checkpoint is saved.
    """
    check(args)
    opened = open_encoder(args.run)
    start = Start(str(opened.file), tensors_hash(opened.encoder.vit.state_dict()), materials(opened.run, opened.file))
    folder = results_folder(args.out, args.run, "finetune", "finetune")
    began = claim(folder, "fine-tuning")
    if began and args.overwrite:
        overwrite(folder, "fine-tuning", f"begun by fine-tuning {args.run}")
        began = claim(folder, "fine-tuning")
    with locked(folder) as lock:
        if began:
            done = continued(folder, args, start)
            if done:
                return done
        return train(args, opened, start, folder, lock)


def train(args: Arguments, opened: Opened, start: Start, folder: Path, lock: Lock) -> dict[str, Any]:
    """Train from the last checkpoint in `folder`, if there is one, to the last step."""
    run, spec = opened.run, opened.encoder.config.front_end
    pad: Literal["zero", "cyclic"] = "cyclic" if args.pad == "cyclic" else "zero"
    if args.pad == "run" and opened.encoder.config.pad == "cyclic":
        pad = "cyclic"
    encoder_config = fine_tuned(opened.encoder.config, pad)
    check_memory(args, encoder_config)
    task, skipped = open_task(args)
    begin(folder, args, encoder_config, start)
    per_epoch = -(-len(task.train) // args.batch_size)
    steps = args.epochs * per_epoch
    tuner = Tuner(args, opened, len(task.classes), steps)
    state, damaged = load_latest(folder / "checkpoints", tuner)
    for message in damaged:
        print(f"warning: {message}; using the one before", file=sys.stderr)
    loader = AudioLoader(
        task.train, sample_rate=spec.sample_rate, clip_samples=encoder_config.clip_samples, pad=pad,
        batch_size=args.batch_size, seed=args.seed, gain_db=run.data.gain_db if run else 0.0,
        state=state["loader"] if state else None, **tuner.reading,
    )  # fmt: skip
    step, history = (state["step"], state["history"]) if state else (0, [])
    how = seen_in_training(task.test, start.trained_on)
    seen = None if how is None else counts_of(how)
    if seen:
        print(f"warning: {sum(seen.values())} of the {len(task.test)} test recordings were pretrained on "
              f"({ways(seen)})", file=sys.stderr)  # fmt: skip
    trained = task.of(torch.from_numpy(task.train.labels)).any(0)
    absent = absent_classes(trained, torch.ones_like(trained), task.classes)
    if absent:
        print(f"warning: {absent}", file=sys.stderr)
    print(f"{len(task.train):,} recordings to train on, {len(task.test):,} to score, {len(task.classes)} classes; "
          f"{args.epochs} epochs of {per_epoch} steps, {args.init} encoder, on {tuner.device}"
          + (f"; continuing after step {step}" if step else ""))  # fmt: skip
    # The losses of an epoch that was interrupted.
    losses = list(torch.tensor(state["losses"], device=tuner.device).unbind()) if state and "losses" in state else []

    def save() -> None:
        lock.check()
        extra = {"loader": loader.state_dict(), "history": history, "losses": [x.item() for x in losses]}
        save_checkpoint(folder / "checkpoints", step, tuner, extra, args.keep)

    with catch_signals() as stop, contextlib.closing(loader):
        tick, since = time.perf_counter(), step
        while step < steps and not stop:
            batch = next(loader)
            losses.append(tuner.step(batch.pcm, batch.lengths, task.of(batch.labels), step))
            step += 1
            if step % per_epoch:
                continue
            epoch = step // per_epoch
            record = {"epoch": epoch, "loss": torch.stack(losses).mean().item()}
            if record["loss"] - record["loss"] != 0:
                raise ConfigError(f"the loss of epoch {epoch} is not finite: lower --lr, or use --precision fp32, and "
                                  "add --overwrite to begin anew")  # fmt: skip
            if epoch % args.eval_every == 0 or epoch == args.epochs:
                record |= tuner.score(task, skipped)
            history.append(record)
            clips = (step - since) * args.batch_size / (time.perf_counter() - tick)
            print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v:>3}" for k, v in record.items()),
                  f" lr {learning_rate(args, step - 1, steps):.1e}  {clips:,.0f} clips/s")  # fmt: skip
            losses = []
            save()
            tick, since = time.perf_counter(), step
        skipped = list(dict([*skipped, *loader.skipped]).items())
        if step < steps:
            save()
            raise KeyboardInterrupt(f"stopped after step {step}; continue with --out {folder} --resume")
    lock.check()
    return finish(args, folder, tuner, task, history, skipped, start, seen)


def fine_tuned(config: EncoderConfig, pad: Literal["zero", "cyclic"]) -> EncoderConfig:
    """The configuration of an encoder after its fine-tuning, which leaves a projector behind."""
    pooling = "mean" if config.pooling == "projection" else config.pooling
    return dataclasses.replace(config, pad=pad, projector=None, pooling=pooling)


def check_memory(args: Arguments, config: EncoderConfig) -> None:
    """Raise ConfigError if the clips of a batch cannot fit in memory."""
    # int16 in four batches that are read ahead; float32 samples and patches of the one that is trained on
    need, free = 16 * args.batch_size * config.clip_samples, available_memory()
    if need > free:
        raise ConfigError(f"--batch-size {args.batch_size}: its clips need {need / 1e9:.1f} GB of memory and "
                          f"{free / 1e9:.1f} GB are free: lower it")  # fmt: skip


def check(args: Arguments) -> None:
    for name, value in dataclasses.asdict(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{cli.flag(name)} {value}: must be a finite number")
        if isinstance(value, int) and value >= (2**62 if name == "seed" else 2**31):
            raise ConfigError(f"{cli.flag(name)} {value}: too large")
    for name in ("epochs", "batch_size", "lr", "clip_norm", "eval_every", "keep"):
        if getattr(args, name) <= 0:
            raise ConfigError(f"{cli.flag(name)} {getattr(args, name)}: must be above 0")
    for name in ("warmup", "masked_keys", "label_smoothing"):
        if not 0 <= getattr(args, name) < 1:
            raise ConfigError(f"{cli.flag(name)} {getattr(args, name)}: must be 0 or more and below 1")
    for name in ("mixup", "freq_mask", "time_mask", "weight_decay", "seed"):
        if getattr(args, name) < 0:
            raise ConfigError(f"{cli.flag(name)} {getattr(args, name)}: must not be negative")
    if not 0 < args.layer_decay <= 1:
        raise ConfigError(f"--layer-decay {args.layer_decay}: must be above 0 and at most 1")
    choose_device(args.device)


def continued(folder: Path, args: Arguments, start: Start) -> dict[str, Any] | None:
    """Check that `args` continue the fine-tuning in `folder`. Returns its results if it has finished."""
    if not args.resume:
        raise ConfigError(f"{folder} holds a fine-tuning already: add --resume to continue it, --overwrite to begin "
                          "anew, or choose another --out")  # fmt: skip
    try:
        old, wanted = read_json(folder / SETTINGS), settings_of(args)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} holds no {SETTINGS}, so it cannot be continued: add --overwrite") from error
    changed = [cli.flag(k) for k in wanted if old.get(k) != wanted[k]]
    if old.get("sha256_of_encoder", start.sha256) != start.sha256:
        changed.insert(0, f"the encoder (it was that of {old.get('encoder')})")
    if changed:
        raise ConfigError(f"--resume continues {folder} as it began; leave as they were {', '.join(changed)}")
    return read_json(folder / RESULT) if (folder / RESULT).exists() else None


def settings_of(args: Arguments) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(args).items() if k not in MAY_CHANGE}


def begin(folder: Path, args: Arguments, config: EncoderConfig, start: Start) -> None:
    """Write what the fine-tuning is. The settings come first, because they tell what the folder is for."""
    about = {"encoder": start.file, "sha256_of_encoder": start.sha256, "trained_on": start.trained_on}
    write_json(folder / SETTINGS, {**settings_of(args), **about})
    write_json(folder / CONFIG, dataclasses.asdict(config))


def open_task(args: Arguments) -> tuple[Task, list[tuple[str, str]]]:
    index = build_index(args.data, where=args.where, label_column=args.label, float_scale=args.float_scale)
    skipped = list(index.skipped)
    index = labelled(index)
    test = index.rows(args.test)
    train = sorted(set(range(len(index))) - set(test))
    if not train:
        raise DataError(f"--test {args.test}: takes all {len(index)} recordings and leaves none to train on")
    classes, targets = split_labels(index.label_names, args.multi_label)
    task = Task(index.subset(train), index.subset(test), classes, targets)
    if len(task.train.labels) and int(task.of(torch.from_numpy(task.train.labels)).any(0).sum()) < 2:
        raise DataError(f"--test {args.test}: leaves one class to train on; two or more are needed")
    return task, skipped


def finish(args, folder, tuner, task, history, skipped, start: Start, seen) -> dict[str, Any]:
    """Write weights and results. `model.safetensors` and `config.json` make the folder readable as an encoder."""
    state = tuner.model.state_dict()
    encoder = {k.replace("encoder.", "vit.", 1): v for k, v in state.items() if k.startswith("encoder.")}
    write_tensors(folder / WEIGHTS, encoder)
    write_tensors(folder / CLASSIFIER, state)
    result = {
        **{k: v for k, v in history[-1].items() if k in ("accuracy", "mAP")},
        "classes": task.classes,
        "multi_label": args.multi_label,
        "train": len(task.train),
        "test": len(task.test),
        "seen_in_pretraining": None if seen is None else sum(seen.values()),
        "seen_by": seen,
        "checkpoint": {"file": start.file, "sha256": start.sha256},
        "history": history,
        "skipped": [list(pair) for pair in skipped],
        "arguments": dataclasses.asdict(args),
    }
    write_json(folder / RESULT, result)
    return result


def load_classifier(folder: str | Path) -> tuple[Classifier, list[str]]:
    """The fine-tuned classifier in `folder`, in evaluation mode, and its classes. No file of it can run code.

    Example::

        from ajepa.finetune import load_classifier
        from ajepa.model.frontend import FrontEnd

        model, classes = load_classifier("runs/mine/finetune")
        chances = model(FrontEnd(model.spec)(pcm, lengths), lengths).softmax(-1)  # int16 [B, S], [B] -> [B, K]
    """
    folder = Path(folder).expanduser()
    try:
        classes, weights = read_json(folder / RESULT)["classes"], read_tensors(folder / CLASSIFIER)
    except (OSError, KeyError) as error:
        raise ConfigError(f"{folder} holds no finished fine-tuning: {describe(error)}") from error
    encoder = open_encoder(folder).encoder
    model = Classifier(encoder.vit, encoder.config.front_end, len(classes))
    load_weights(model, weights, folder / CLASSIFIER)
    return model.eval(), classes


@command
def main(argv: list[str] | None = None) -> int:
    args = cli.parse(Arguments, argv, "python -m ajepa.finetune")
    result = finetune(args)
    for path, reason in result["skipped"]:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    name = "mAP" if result["multi_label"] else "accuracy"
    print(f"{name} {result[name]:.1%} on {result['test']:,} recordings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
