"""`python -m ajepa.finetune RUN --data ...`: train the whole EMA target encoder and a linear head on labels.

files -> PCM (mixup) -> log-mel patches (SpecAugment) -> encoder (regularised masking) -> mean -> head -> loss.
"""

import contextlib
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from sklearn.metrics import average_precision_score

from ajepa import config
from ajepa.config import Config, ConfigError
from ajepa.data.index import DataError, Index, build_index
from ajepa.data.loader import AudioLoader
from ajepa.evaluation.classifier import Classifier, mixup, parameter_groups, spec_augment, split_labels
from ajepa.evaluation.feature_cache import CHUNKS_AT_ONCE, read_chunks
from ajepa.evaluation.labelled import labelled, pretrained_on
from ajepa.model.frontend import FrontEnd
from ajepa.model.pretrained import load_pretrained, load_weights
from ajepa.training.checkpoint import load_latest, save_checkpoint
from ajepa.training.corpus import clip_options
from ajepa.training.distributed import Ranks
from ajepa.training.schedules import cosine
from ajepa.utils import cli
from ajepa.utils.atomic_files import write_atomic
from ajepa.utils.devices import choose_device
from ajepa.utils.run_folder import CheckpointError
from ajepa.utils.signals import catch_signals
from ajepa.utils.tensor_files import tensors_hash
from ajepa_kernels import AdamWEMA


@dataclass(frozen=True)
class Arguments:
    """Fine-tune a run's encoder on labelled recordings and score it on others."""

    run: tyro.conf.Positional[str]
    """Run folder, or one checkpoint in it (RUN/checkpoints/step_...)."""
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
    """Folder of the results. None: RUN/finetune."""
    resume: bool = False
    """Continue from the last checkpoint in --out, exactly as if the run had not stopped."""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained: start from the run's encoder. random: from an untrained one, to see the worth of the pretraining."""
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
    """Recordings shorter than a clip. zero: encode only the recording. cyclic: repeat it. run: do as the run did."""
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


class Tuner:
    """Classifier, optimiser and front end of one run. Computes a training step, and scores whole recordings."""

    def __init__(self, args: Arguments, cfg: Config, classes: int, steps: int):
        self.args, self.cfg, self.steps = args, cfg, steps
        self.device, self.ranks = choose_device(args.device), Ranks()  # one process: save_checkpoint expects ranks
        bf16 = args.precision == "bf16" or (args.precision == "auto" and self.device.type == "cuda")
        self.autocast = contextlib.nullcontext if not bf16 else lambda: torch.autocast(self.device.type, torch.bfloat16)
        self.front_end = FrontEnd(cfg.front_end)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            self.model = Classifier(cfg, classes).to(self.device)
        groups = parameter_groups(self.model, args.layer_decay, args.weight_decay)
        self.optimizer = AdamWEMA(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)
        self.parameters = list(self.model.parameters())

    def step(self, pcm, lengths, targets, step: int) -> torch.Tensor:
        """Train on `pcm` int16 `[B, S]` and targets float `[B, K]`. All randomness is a function of (seed, step)."""
        args, spec = self.args, self.cfg.front_end
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
        spec, samples = self.cfg.front_end, round(self.cfg.data.clip_seconds * self.cfg.front_end.sample_rate)
        reading = {"threads": self.cfg.data.loader_threads, "decoder": self.args.decoder}
        total, weights = torch.zeros(len(task.test), task.targets.shape[1]), torch.zeros(len(task.test), 1)
        read = torch.zeros(len(task.test), dtype=torch.bool)
        for batch in read_chunks(task.test, spec, samples, reading, skipped):
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
            raise ConfigError("the fine-tuned weights are not finite: lower --lr")
        if not self.args.multi_label:
            return {"accuracy": (chances.argmax(-1) == targets.argmax(-1)).double().mean().item()}
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
    cfg, weights, file, _ = load_pretrained(Path(args.run))
    pad = cfg.data.pad if args.pad == "run" else args.pad
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, pad=pad))
    folder = Path(args.out) if args.out else Path(args.run) / "finetune"
    done = open_folder(folder, args, cfg)
    if done:
        return done
    task, skipped = open_task(args)
    per_epoch = -(-len(task.train) // args.batch_size)
    steps = args.epochs * per_epoch
    tuner = Tuner(args, cfg, len(task.classes), steps)
    if args.init == "pretrained":
        load_weights(tuner.model.encoder, weights, file)
    state, damaged = load_latest(folder / "checkpoints", tuner)
    for message in damaged:
        print(f"warning: {message}; using the one before", file=sys.stderr)
    options = {**clip_options(cfg), "decoder": args.decoder, "batch_size": args.batch_size, "seed": args.seed}
    loader = AudioLoader(task.train, **options, gain_db=cfg.data.gain_db, state=state["loader"] if state else None)
    step, history = (state["step"], state["history"]) if state else (0, [])
    known = pretrained_on(cfg, task.test)
    seen = None if known is None else sum((e.path, e.member) in known for e in task.test.entries)
    if seen:
        print(f"warning: {seen} of the {len(task.test)} test recordings were pretrained on", file=sys.stderr)
    print(f"{len(task.train):,} recordings to train on, {len(task.test):,} to score, {len(task.classes)} classes; "
          f"{args.epochs} epochs of {per_epoch} steps, {args.init} encoder, on {tuner.device}"
          + (f"; continuing after step {step}" if step else ""))  # fmt: skip

    def save() -> None:
        extra = {"loader": loader.state_dict(), "history": history}
        save_checkpoint(folder / "checkpoints", step, tuner, extra, args.keep)

    with catch_signals() as stop, contextlib.closing(loader):
        losses: list[torch.Tensor] = []
        tick = time.perf_counter()
        while step < steps and not stop:
            batch = next(loader)
            losses.append(tuner.step(batch.pcm, batch.lengths, task.of(batch.labels), step))
            step += 1
            if step % per_epoch:
                continue
            epoch = step // per_epoch
            record = {"epoch": epoch, "loss": torch.stack(losses).mean().item()}
            if record["loss"] - record["loss"] != 0:
                raise ConfigError(f"the loss of epoch {epoch} is not finite: lower --lr, or use --precision fp32")
            if epoch % args.eval_every == 0 or epoch == args.epochs:
                record |= tuner.score(task, skipped)
            history.append(record)
            clips = len(losses) * args.batch_size / (time.perf_counter() - tick)
            print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v:>3}" for k, v in record.items()),
                  f" lr {learning_rate(args, step - 1, steps):.1e}  {clips:,.0f} clips/s")  # fmt: skip
            save()
            losses, tick = [], time.perf_counter()
        skipped = list(dict([*skipped, *loader.skipped]).items())
        if step < steps:
            save()
            print(f"stopped after step {step}; continue with --out {folder} --resume")
            raise KeyboardInterrupt
    checkpoint = {"file": str(file), "sha256": tensors_hash(weights)}
    return finish(args, cfg, folder, tuner, task, history, skipped, checkpoint, seen)


def check(args: Arguments) -> None:
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
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device is here; use --device cpu")


def open_folder(folder: Path, args: Arguments, cfg: Config) -> dict[str, Any] | None:
    """Prepare the results folder. Returns the results where the fine-tuning in it has finished."""
    settings, result = folder / "arguments.json", folder / "finetune.json"
    wanted = {k: v for k, v in dataclasses.asdict(args).items() if k not in ("resume", "out", "device", "keep")}
    try:
        if args.resume and settings.exists():
            old = json.loads(settings.read_text())
            changed = [cli.flag(k) for k in wanted if old.get(k) != wanted[k]]
            if changed:
                raise ConfigError(f"--resume continues {folder} as it began; leave as they were {', '.join(changed)}")
            return json.loads(result.read_text()) if result.exists() else None
        if settings.exists():
            raise ConfigError(f"{folder} holds a run already: add --resume to continue it, or choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        config.save(cfg, folder / "config.json")
        write_atomic(settings, json.dumps(wanted, indent=2).encode())
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--out {folder} cannot be used: {error}") from error
    return None


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


def finish(args, cfg, folder, tuner, task, history, skipped, checkpoint, seen) -> dict[str, Any]:
    """Write weights and results. `encoder.safetensors` and `config.json` make the folder readable as a run."""
    state = {k: v.contiguous().cpu() for k, v in tuner.model.state_dict().items()}
    encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    write_atomic(folder / "encoder.safetensors", save_bytes(encoder, {"format": "pt", "preset": cfg.preset}))
    write_atomic(folder / "classifier.safetensors", save_bytes(state, {"format": "pt"}))
    result = {
        **{k: v for k, v in history[-1].items() if k in ("accuracy", "mAP")},
        "classes": task.classes,
        "multi_label": args.multi_label,
        "train": len(task.train),
        "test": len(task.test),
        "seen_in_pretraining": seen,
        "checkpoint": checkpoint,
        "history": history,
        "skipped": [list(pair) for pair in skipped],
        "arguments": dataclasses.asdict(args),
    }
    write_atomic(folder / "finetune.json", (json.dumps(result, indent=2) + "\n").encode())
    return result


def load_classifier(folder: str | Path) -> tuple[Classifier, list[str]]:
    """The fine-tuned classifier in `folder`, in evaluation mode, and its classes. No file of it can run code.

    Example::

        from ajepa.finetune import load_classifier
        from ajepa.model.frontend import FrontEnd

        model, classes = load_classifier("runs/mine/finetune")
        chances = model(FrontEnd(model.spec)(pcm, lengths), lengths).softmax(-1)  # int16 [B, S], [B] -> [B, K]
    """
    folder = Path(folder)
    cfg = config.load(folder / "config.json")
    try:
        classes = json.loads((folder / "finetune.json").read_text())["classes"]
        model = Classifier(cfg, len(classes))
        model.load_state_dict(load_file(folder / "classifier.safetensors"))
    except Exception as error:  # safetensors has an exception type of its own
        raise ConfigError(f"{folder} holds no finished fine-tuning: {error}") from error
    return model.eval(), classes


def main(argv: list[str] | None = None) -> int:
    args = cli.parse(Arguments, argv, "python -m ajepa.finetune")
    try:
        result = finetune(args)
    except KeyboardInterrupt:
        return 130
    except (ConfigError, DataError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, reason in result["skipped"]:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    name = "mAP" if result["multi_label"] else "accuracy"
    print(f"{name} {result[name]:.1%} on {result['test']:,} recordings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
