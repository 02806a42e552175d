"""Speed, time and memory of a recipe on many GPUs, predicted from steps that were measured on one GPU.

`python -m ajepa.doctor --plan` prints a prediction with its formula, and says of each figure whether it was measured,
stands in a data sheet, or is assumed. On W GPUs, a step of B clips leaves b = B / W clips to each, and takes

    step      = max(device + update, host) + packing + reduction + gather + skew
    device    = floor + b x time of a clip: forward and backward. The floor is the least time of the step's kernels,
                which does not depend on b. The time of a clip is that of the measured step. On another GPU its products
                scale with the data sheet's FLOP/s and the rest with its memory bandwidth; for another recipe it scales
                with the FLOPs of a clip.
    update    = 30 bytes for each trained weight and 10 for each of the target encoder, at the rate of the measured
                AdamW kernel. `zero1` and `fsdp` divide it by W.
    host      = the time of the host to start a step, which counts where it is longer than that of the device
    packing   = 8 bytes for each trained weight at the memory bandwidth, or 6 with `--reduce bf16`: the gradients are
                copied into buckets. For `fsdp`, 14 bytes for each gathered weight: it is copied out of the buffer of
                its block and rounded to bf16.
    reduction = 2 collective(bytes of the gradients) for `ddp`, else one
    gather    = collective(bytes of the bf16 weights) for `zero1`
    skew      = spread x sqrt(2 ln W) x device: the slowest of W ranks, each of which varies as the measured step did

    collective(S) = (G - 1) / G x S / link + (N - 1) / N x S / network + latencies, on N nodes of G GPUs: a
                    reduce-scatter or an all-gather, first within the nodes, then between equal GPUs of all nodes

The reduction starts after the backward pass, because both passes are one CUDA graph. Without graphs it overlaps with
the backward pass, half of the device's time, save for the last bucket. The collectives of `fsdp` overlap with both
passes. Not counted are the exchanges of the clip objective within a step, checkpoints and evaluations.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ajepa.config import PRESETS, SIZES, Config, ConfigError, preset
from ajepa.model.jepa import JEPA
from ajepa.model.masks import MaskSampler
from ajepa.training.flops import step_flops
from ajepa.training.replicas import BUCKET_BYTES
from ajepa.training.run_log import PEAK_FLOPS

Figures = dict[str, list[dict[str, Any]]]  # of `measured_figures`
MEASURED = Path(__file__).with_name("measured.json")  # benchmarks/report.py writes it from the result files


class Gpu(NamedTuple):
    """Figures of a vendor's data sheet; `PEAK_FLOPS` has the FLOP/s."""

    bandwidth: float  # bytes per second of its memory
    memory: float  # bytes
    link: float  # bytes per second to another GPU of its node, in each direction
    over: str


GPUS = {
    "H200": Gpu(4.8e12, 141e9, 450e9, "NVLink"),
    "H100": Gpu(3.35e12, 80e9, 450e9, "NVLink"),
    "A100": Gpu(2.039e12, 80e9, 300e9, "NVLink"),
    "B200": Gpu(8e12, 180e9, 900e9, "NVLink"),
    "L40S": Gpu(0.864e12, 48e9, 32e9, "PCIe 4.0 x16"),
    "4090": Gpu(1.008e12, 24e9, 32e9, "PCIe 4.0 x16"),
}

# Assumptions, until runs on several GPUs have measured them.
KERNEL_US = 5.0  # the least time of a kernel in a CUDA graph; implied by the predictions of 256 and of 1,024 clips
LAUNCH_US = 10.0  # time of the host to launch a kernel without a CUDA graph
HOST_MS = 1.0  # time of the host for the rest of a step: replaying graphs, masks, the exchange of counts
LINK_SHARE = 0.8  # share of a data sheet's bandwidth that a collective reaches
ADAPTER = 50.0  # GB/s of network for each GPU: one adapter of 400 Gbit/s
START_US, LINK_US, NETWORK_US = 10.0, 1.0, 5.0  # of a collective: its start, a hop in a node, a hop between nodes
RESERVE = 2e9  # bytes for the CUDA context, NCCL's buffers and what the allocator cannot use
DRAWS, CLIPS = 16, 16  # batches and clips of each whose masks are drawn for the mean FLOPs of a clip


@dataclass(frozen=True)
class Arguments:
    """Predict speed, time and memory of a recipe on many GPUs from steps that were measured on one."""

    gpus: int = 8
    """Number of GPUs in all."""
    gpu: str = "H100"
    """Model of the GPUs: H200, H100, A100, B200, L40S or 4090."""
    batch: int | None = None
    """Recordings per step, counted over all GPUs. None: those of the recipe."""
    preset: str = "audio-jepa"
    """The recipe, as for `ajepa.train --preset`."""
    size: Literal["tiny", "S", "B", "L"] | None = None
    """Size of the encoder. None: that of the recipe."""
    parallel: Literal["ddp", "zero1", "fsdp"] = "ddp"
    """How the weights are spread over the GPUs, as for `ajepa.train --parallel`."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over the GPUs."""
    gpus_per_node: int = 8
    """Number of GPUs in a node. They are linked by NVLink or PCIe, and nodes by the network."""
    network: float | None = None
    """Bandwidth of a node's network in GB/s and each direction. None: 50, which is 400 Gbit/s, for each GPU."""
    cuda_graph: bool = True
    """Replay forward and backward pass as a CUDA graph. FSDP never does, nor does the clip objective on several
    GPUs."""

    @property
    def node(self) -> int:
        return min(self.gpus, self.gpus_per_node)

    @property
    def nodes(self) -> int:
        return self.gpus // self.node

    @property
    def value(self) -> int:
        """Bytes of a gradient that is reduced."""
        return 4 if self.reduce == "fp32" else 2

    @property
    def bandwidth(self) -> float:
        """GB/s of a node's network."""
        return ADAPTER * self.gpus_per_node if self.network is None else self.network

    def check(self) -> None:
        """Raise ConfigError for a value that no prediction can be made of."""
        if self.gpu not in GPUS:
            raise ConfigError(f"--gpu {self.gpu}: no data sheet is known; choose one of {', '.join(GPUS)}")
        for name, value in {"gpus": self.gpus, "gpus-per-node": self.gpus_per_node, "batch": self.batch}.items():
            if value is not None and not 0 < value < 2**31:
                raise ConfigError(f"--{name} {value}: must be above 0 and below 2^31")
        if self.gpus % self.node:
            raise ConfigError(
                f"--gpus {self.gpus} does not fill nodes of {self.gpus_per_node}: use a multiple of it, or set "
                "--gpus-per-node"
            )
        if not 0 < self.bandwidth < math.inf:
            raise ConfigError(f"--network {self.network}: must be a number of GB/s above 0")


# --- the recipe -------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What a step of a recipe takes on any GPU. A clip of the clip objective is a view."""

    name: str
    flops: float  # of a clip, mean over masks as training draws them
    units: float  # tokens x width of a clip, summed over the trained blocks: what activations grow with
    trained: int  # weights that are trained
    taught: int  # weights of the target encoder
    kernels: int  # launches of a step
    is_captured: bool  # whether the step is a CUDA graph on several GPUs, too
    views: int  # clips of a recording
    pcm: float  # bytes of int16 samples that a recording is read from


def work_of(cfg: Config) -> Work:
    model, objective = cfg.model, cfg.objective
    width, depth, _ = SIZES[model.size]
    sampler, count = MaskSampler(cfg.mask, cfg.front_end.grid), CLIPS * objective.count
    flops = units = 0.0
    for i in range(DRAWS):
        masks = sampler(i * cfg.optim.steps // DRAWS, cfg.optim.steps, count)
        flops += step_flops(cfg, masks) / (DRAWS * count)
        tokens = len(masks.context) * width * depth
        tokens += len(masks.predict) * model.predictor_width * model.predictor_depth * objective.masks
        units += tokens / (DRAWS * count)
    with torch.device("meta"):
        networks = JEPA(cfg)
    taught = networks.target_encoder.parameters() if objective.taught else ()
    # Counted on steps with three and four blocks: 28 launches of a trained block, 12 of one of the target encoder, and
    # 100 that every step has.
    kernels = 100 + 28 * (depth + model.predictor_depth * objective.masks) + 12 * depth * objective.taught
    return Work(
        name=cfg.preset if model.size == "tiny" else f"{cfg.preset} ViT-{model.size}",
        flops=flops,
        units=units,
        trained=sum(p.numel() for p in networks.parameters() if p.requires_grad),
        taught=sum(p.numel() for p in taught),
        kernels=kernels,
        is_captured=not objective.clips,
        views=objective.count,
        pcm=2 * cfg.source_seconds * cfg.front_end.sample_rate,
    )


# --- the measured figures ---------------------------------------------------------------------------------------------


def measured_figures() -> Figures:
    """The figures of single GPUs that come with the package: steps, updates and loaders."""
    return json.loads(MEASURED.read_text())


def nearest(figures: Figures, cfg: Config, gpu: str) -> list[dict[str, Any]]:
    """The measured steps that resemble a recipe on a GPU most, by ascending batch; all are of one recipe and GPU."""

    def distance(step: dict[str, Any]) -> tuple:
        other = step["preset"] != cfg.preset, abs(SIZES[step["size"]][0] - SIZES[cfg.model.size][0])
        return *other, gpu not in step["device"], step["old"], step["masks"] != "drawn"

    known = [step for step in figures["steps"] if model_of(step["device"]) and step["preset"] in PRESETS]
    if not known:
        raise ConfigError("no step was measured on a GPU yet: `make gpu` measures it, `make gpu-report` files it")
    best = min(known, key=distance)
    same = ("device", "preset", "size", "masks", "old")
    return sorted((s for s in known if all(s[k] == best[k] for k in same)), key=lambda step: step["batch"])


def model_of(device: str) -> str | None:
    """The model in `GPUS` of a device's name."""
    return next((name for name in GPUS if name in device), None)


class OneGpu:
    """Times in milliseconds that one GPU takes for a recipe; the measured times, where they are of both."""

    def __init__(self, cfg: Config, gpu: str, figures: Figures):
        self.gpu, self.work, self.steps = gpu, work_of(cfg), nearest(figures, cfg, gpu)
        self.last = last = self.steps[-1]
        then = model_of(last["device"]) or gpu
        measured = replace(PRESETS[last["preset"]].model, size=last["size"])
        self.is_same_gpu = then == gpu
        self.is_same_recipe = (last["preset"], last["size"]) == (cfg.preset, cfg.model.size)
        self.other = self.work if self.is_same_recipe else work_of(replace(PRESETS[last["preset"]], model=measured))

        self.updated = min(figures["updates"], key=lambda update: gpu not in update["device"], default=None)
        self.update = self._update(self.work, gpu)
        # The measured steps without the update. What they take above the floor grows with the batch.
        points = [(step["batch"], step["ms"] - self._update(self.other, then)) for step in self.steps]
        floor = KERNEL_US / 1e3 * self.other.kernels
        if len(points) > 1:
            (few, short), (more, long) = points[:2]
            floor = max(0.0, short - few * (long - short) / (more - few))
        floor = min(floor, *(ms for _, ms in points))
        self.points = [(0, 0.0), *((batch, ms - floor) for batch, ms in points)]
        self.floor = floor * self.work.kernels / self.other.kernels
        products, rest = PEAK_FLOPS[then] / PEAK_FLOPS[gpu], GPUS[then].bandwidth / GPUS[gpu].bandwidth
        self.slower = last["product_share"] * products + (1 - last["product_share"]) * rest
        self.larger = self.work.flops / self.other.flops

    def _update(self, work: Work, gpu: str) -> float:
        size = 30 * work.trained + 10 * work.taught
        if self.updated is None:
            return 1e3 * size / GPUS[gpu].bandwidth
        rate = 38 * self.updated["parameters"] / self.updated["ms"]
        return size / rate * GPUS[model_of(self.updated["device"]) or gpu].bandwidth / GPUS[gpu].bandwidth

    @property
    def activations(self) -> float | None:
        """Bytes of a clip besides weights, gradients and moments, from the peak of a measured step, if there is one."""
        if not (peaks := [step for step in self.steps if step["peak_bytes"]]):
            return None
        state = 16 * self.other.trained + 4 * self.other.taught
        return (peaks[-1]["peak_bytes"] - state) / peaks[-1]["batch"] * self.work.units / self.other.units

    def host(self, graphs: bool) -> float:
        return HOST_MS + (0 if graphs else LAUNCH_US / 1e3 * self.work.kernels)

    def device(self, clips: float) -> float:
        """Forward and backward pass. Above the floor linear between measured batches, in proportion below them."""
        end = next((i for i, (batch, _) in enumerate(self.points) if 0 < clips <= batch), len(self.points) - 1)
        (few, short), (more, long) = self.points[end - 1 : end + 1]
        above = short + (clips - few) * (long - short) / (more - few)
        return self.floor + above * self.slower * self.larger


# --- the prediction ---------------------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """Milliseconds of a step. `waiting` is what the host takes longer than the device."""

    device: float
    update: float
    waiting: float = 0.0
    packing: float = 0.0
    reduction: float = 0.0
    gather: float = 0.0
    skew: float = 0.0


LOST = (  # what a term of `Terms` is called where it exceeds that of a single GPU
    "kernels that fewer clips do not shorten",
    "updating the weights",
    "waiting for the host",
    "copying gradients and weights",
    "reducing the gradients",
    "gathering the weights",
    "waiting for the slowest GPU",
)


def collective_ms(size: float, at: Arguments, calls: int = 1) -> float:
    """Time of a reduce-scatter or an all-gather of `size` bytes, first within the nodes, then between them."""
    within = (at.node - 1) / at.node * size / (LINK_SHARE * GPUS[at.gpu].link)
    between = (at.nodes - 1) / at.nodes * size / (LINK_SHARE * 1e9 * at.bandwidth)
    latency = START_US + LINK_US * (at.node - 1) + NETWORK_US * math.ceil(math.log2(at.nodes))
    return 1e3 * (within + between) + calls * latency / 1e3


@dataclass(frozen=True)
class Plan:
    """A prediction for `clips` a step on all GPUs together, and for a run of `budget` clips."""

    at: Arguments
    one: OneGpu
    clips: int
    budget: int

    @property
    def each(self) -> float:
        return self.clips / self.at.gpus

    @property
    def graphs(self) -> bool:
        at = self.at
        return at.cuda_graph and (at.gpus == 1 or (at.parallel != "fsdp" and self.one.work.is_captured))

    @property
    def buckets(self) -> int:
        return math.ceil(self.at.value * self.one.work.trained / BUCKET_BYTES)

    @cached_property
    def terms(self) -> Terms:
        at, one, work = self.at, self.one, self.one.work
        device, update = one.device(self.each), one.update / (1 if at.parallel == "ddp" else at.gpus)
        waiting = max(0.0, one.host(self.graphs) - device - update)
        if at.gpus == 1:
            return Terms(device, update, waiting)
        half, scalars = collective_ms(at.value * work.trained, at, self.buckets), 2 * collective_ms(4 * at.gpus, at)
        reduction, gather, packed = 2 * half, 0.0, (4 + at.value) * work.trained
        if at.parallel == "zero1":
            reduction, gather = half, collective_ms(2 * (work.trained + work.taught), at, 2 * self.buckets)
        if at.parallel == "fsdp":  # gathers all weights for the forward pass, the trained ones again for the backward
            gathered = 2 * work.trained + work.taught
            exposed = max(0.0, half + collective_ms(4 * gathered, at) - device - waiting)
            reduction, packed = min(half, exposed), 14 * gathered
            gather = exposed - reduction
        elif not self.graphs:
            reduction = max(reduction / self.buckets, reduction - (device + waiting) / 2)
        reduction += scalars if at.parallel != "ddp" else 0.0  # of `ddp` they ride in the last bucket
        packing = 1e3 * packed / GPUS[at.gpu].bandwidth
        skew = one.last["spread"] * math.sqrt(2 * math.log(at.gpus)) * device
        return Terms(device, update, waiting, packing, reduction, gather, skew)

    def alone(self, clips: float) -> Terms:
        """A step of `clips` on one GPU without others."""
        device, update = self.one.device(clips), self.one.update
        return Terms(device, update, max(0.0, self.one.host(self.at.cuda_graph) - device - update))

    @property
    def is_measured(self) -> bool:
        """Whether exactly this step was measured."""
        known = self.clips in [step["batch"] * self.one.work.views for step in self.one.steps]
        return self.at.gpus == 1 and self.one.is_same_gpu and self.one.is_same_recipe and known

    @property
    def ms(self) -> float:
        return sum(self.terms)

    @property
    def clips_per_second(self) -> float:
        return 1e3 * self.clips / self.ms

    @property
    def hours(self) -> float:
        return self.budget / self.clips_per_second / 3600

    @property
    def efficiency(self) -> float:
        """Clips/s over those of as many GPUs that train the whole batch each, without the others."""
        return sum(self.alone(self.clips)) / self.at.gpus / self.ms

    @property
    def efficiency_each(self) -> float:
        """Clips/s over those of as many GPUs that train their share of the batch each, without the others."""
        return sum(self.alone(self.each)) / self.ms

    def lost(self, whole: bool = True) -> list[tuple[float, str]]:
        """(milliseconds, reason) of what a step takes longer than with perfect efficiency, the largest first.

        `whole` is for `efficiency`, otherwise for `efficiency_each`.
        """
        perfect = [ms / self.at.gpus for ms in self.alone(self.clips)] if whole else self.alone(self.each)
        return sorted(((a - b, reason) for a, b, reason in zip(self.terms, perfect, LOST, strict=True)), reverse=True)

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes on each GPU."""
        at, trained, taught = self.at, self.one.work.trained, self.one.work.taught
        weights, moments = 8 * trained + 4 * taught, 8 * trained
        found = {
            "weights + gradients + average": weights / (at.gpus if at.parallel == "fsdp" else 1),
            "moments": moments / (1 if at.parallel == "ddp" else at.gpus),
            "bf16 copies": 0.0 if at.parallel == "fsdp" else 2.0 * (trained + taught),
            "buckets": float(at.value * trained) if at.parallel != "fsdp" and at.gpus > 1 else 0.0,
            "activations": (self.one.activations or 0.0) * self.each,
            "reserve": RESERVE,
        }
        return {name: size for name, size in found.items() if size}

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= GPUS[self.at.gpu].memory


def predict(at: Arguments, figures: Figures | None = None) -> Plan:
    """The prediction for `at` from measured `figures` (None: those of the package).

    Raises ConfigError for values of which nothing can be predicted.
    """
    at.check()
    settings: dict[str, Any] = {"batch_size": at.batch, "size": at.size}
    settings = {name: value for name, value in settings.items() if value is not None}
    cfg = preset(at.preset, parallel=at.parallel, **settings)
    recordings, count, optim = cfg.optim.batch_size, cfg.objective.count, PRESETS[at.preset].optim
    if recordings % at.gpus:
        raise ConfigError(f"--batch {recordings} is that of all GPUs together: make it a multiple of {at.gpus}")
    one = OneGpu(cfg, at.gpu, measured_figures() if figures is None else figures)
    return Plan(at, one, recordings * count, optim.steps * optim.batch_size * count)
