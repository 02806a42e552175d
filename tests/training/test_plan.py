"""Predictions for many GPUs: the formula, what it rests on, and what is printed of it."""

import copy
import math
import re

import pytest

from ajepa import doctor
from ajepa.config import PRESETS, ConfigError
from ajepa.training import plan, plan_text
from ajepa.training.plan import GPUS, Arguments, OneGpu, Plan, predict
from ajepa.training.run_log import PEAK_FLOPS
from ajepa.training.sizes import model_bytes
from ajepa.utils import cli

STEP = {
    "device": "NVIDIA H200", "preset": "audio-jepa", "size": "B", "masks": "drawn", "batch": 1024, "ms": 150.0,
    "spread": 0.01, "product_share": 0.5, "peak_bytes": None, "peak_of": None, "when": "a day, a commit", "old": False,
}  # fmt: skip
UPDATE = {"device": "NVIDIA H200", "parameters": 85_100_000, "ms": 0.8, "when": "a day, a commit"}


def figures(*steps: dict) -> plan.Figures:
    return {"steps": [{**STEP, **step} for step in steps], "updates": [UPDATE], "loaders": []}


@pytest.fixture(scope="module")
def ones() -> dict[str, OneGpu]:
    return {gpu: OneGpu(PRESETS["audio-jepa"], gpu, figures({})) for gpu in GPUS}


@pytest.fixture
def simple(ones) -> OneGpu:
    """One GPU with round figures: 2 ms of kernels, 0.1 ms a clip, 1 ms of update, 90 M weights and 80 M of a target."""
    one = copy.copy(ones["H100"])
    one.work = one.work._replace(trained=90_000_000, taught=80_000_000, kernels=700)
    one.floor, one.points, one.slower, one.larger, one.update = 2.0, [(0, 0.0), (100, 10.0)], 1.0, 1.0, 1.0
    return one


# --- the formula ------------------------------------------------------------------------------------------------------


def test_a_step_on_two_nodes_is_what_a_hand_computes(simple):
    made = Plan(Arguments(gpus=16, gpu="H100"), simple, clips=1600, budget=16_000_000)
    latency = 0.010 + 7 * 0.001 + 1 * 0.005  # ms, for each of six buckets of 64 MiB
    half = 7 / 8 * 360e6 / 360e9 * 1e3 + 1 / 2 * 360e6 / 320e9 * 1e3 + 6 * latency
    packing, skew = 8 * 90e6 / 3.35e12 * 1e3, 0.01 * math.sqrt(2 * math.log(16)) * 12
    assert half == pytest.approx(0.875 + 0.5625 + 0.132) and packing == pytest.approx(0.2149, rel=1e-3)
    assert made.terms == pytest.approx((12, 1, 0, packing, 2 * half, 0, skew))
    ms = 13 + packing + 2 * half + skew
    assert made.clips_per_second == pytest.approx(1600e3 / ms)
    assert made.hours == pytest.approx(1e4 * ms / 3.6e6)
    assert made.efficiency == pytest.approx((2 + 160 + 1) / 16 / ms)
    assert made.efficiency_each == pytest.approx(13 / ms)
    assert sum(lost for lost, _ in made.lost()) == pytest.approx(ms - 163 / 16)
    assert made.lost()[0] == (pytest.approx(2 * half), "reducing the gradients")
    assert dict(map(reversed, made.lost()))["updating the weights"] == pytest.approx(1 - 1 / 16)
    assert sum(lost for lost, _ in made.lost(whole=False)) == pytest.approx(ms - 13)


def test_the_other_ways_to_spread_weights_by_hand(simple):
    def terms(**options) -> plan.Terms:
        return Plan(Arguments(gpus=8, **options), simple, clips=80, budget=1).terms

    def collective(size: float, calls: int) -> float:
        return 7 / 8 * size / 360e9 * 1e3 + calls * 0.017

    scalars, skew = 2 * 0.017, 0.01 * math.sqrt(2 * math.log(8)) * 3
    packing = 6 * 90e6 / 3.35e12 * 1e3
    found = terms(reduce="bf16")
    assert found == pytest.approx((3, 1, 0, packing, 2 * collective(180e6, 3), 0, skew))
    found = terms(reduce="bf16", parallel="zero1")
    wanted = (3, 1 / 8, 0, packing, collective(180e6, 3) + scalars, collective(340e6, 6), skew)
    assert found == pytest.approx(wanted, rel=1e-4)
    # Without graphs the host launches 700 kernels, which takes 8 ms, and half of the time hides all buckets but one.
    found = terms(cuda_graph=False)
    assert (found.waiting, found.reduction) == pytest.approx((1 + 7 - 3 - 1, 2 * collective(360e6, 6) / 6))
    found = terms(parallel="fsdp")
    assert found[:3] == pytest.approx((3, 1 / 8, 1 + 7 - 3 - 1 / 8)) and found.gather == 0
    assert (found.packing, found.reduction) == pytest.approx((14 * 260e6 / 3.35e12 * 1e3, scalars), rel=1e-4)
    # Over PCIe the collectives take longer than the step.
    half, gathered = (7 / 8 * size / 25.6e9 * 1e3 for size in (360e6, 4 * 260e6))
    found = terms(parallel="fsdp", gpu="L40S")
    assert found.reduction == pytest.approx(half + 6 * 0.017 + scalars, rel=1e-4)
    assert found.gather == pytest.approx(gathered + 0.017 - 8 + 1 / 8, rel=1e-4)


def test_memory_by_hand(simple):
    def state(**options) -> float:
        memory = dict(Plan(Arguments(gpus=8, **options), simple, clips=80, budget=1).memory)
        assert memory.pop("reserve") == plan.RESERVE and "activations" not in memory
        return sum(memory.values()) / 1e6

    assert state() == 16 * 90 + 4 * 80 + 2 * 170 + 4 * 90
    assert state(reduce="bf16") == 16 * 90 + 4 * 80 + 2 * 170 + 2 * 90
    assert state(parallel="zero1") == 8 * 90 + 90 + 4 * 80 + 2 * 170 + 4 * 90
    assert state(parallel="fsdp") == (16 * 90 + 4 * 80) / 8


@pytest.mark.parametrize("parallel", ["ddp", "zero1", "fsdp"])
@pytest.mark.parametrize("gpu", GPUS)
def test_more_gpus_are_never_slower_and_never_more_than_perfect(ones, gpu, parallel):
    # Few clips do not pay over PCIe, nor where several GPUs do without the CUDA graphs that one has.
    is_fast = GPUS[gpu].over == "NVLink" and parallel != "fsdp"
    for reduce in ("fp32", "bf16"):
        for clips in (1, 32, 1024) if is_fast else (128, 1024):
            at = [Arguments(gpus=2**i, gpu=gpu, reduce=reduce, parallel=parallel) for i in range(9)]
            plans = [Plan(a, ones[gpu], clips * a.gpus, budget=1) for a in at]
            speeds = [made.clips_per_second for made in plans]
            assert speeds == sorted(speeds)
            assert all(0 < made.efficiency <= made.efficiency_each * (1 + 1e-9) for made in plans)
            assert all(made.efficiency_each <= 1 for made in plans)
        fixed = [Plan(a, ones[gpu], 256, budget=1) for a in at]
        assert all(made.efficiency <= 1 for made in fixed)
        assert [made.efficiency for made in fixed] == sorted((made.efficiency for made in fixed), reverse=True)


# --- what it rests on -------------------------------------------------------------------------------------------------


def test_one_gpu_takes_exactly_what_was_measured():
    """At every batch, and between batches what lies between."""
    known = figures({"batch": 64, "ms": 14.0}, {"batch": 256, "ms": 40.0}, {})
    for batch, ms in ((64, 14.0), (256, 40.0), (1024, 150.0)):
        made = predict(Arguments(gpus=1, gpu="H200", batch=batch), known)
        assert made.is_measured and made.ms == pytest.approx(ms, rel=1e-12)
    device = [made.one.device(clips) for clips in range(1, 2000)]
    assert device == sorted(device)
    update = made.one.update
    assert made.one.floor == pytest.approx(14 - update - 64 * 26 / 192), "the line through the two smallest batches"
    assert made.one.device(640) + update == pytest.approx(95.0)


def test_the_packages_figures_are_reproduced():
    known = plan.measured_figures()
    step = known["steps"][0]
    gpu = plan.model_of(step["device"])
    made = predict(Arguments(gpus=1, gpu=gpu, batch=step["batch"], preset=step["preset"], size=step["size"]))
    assert made.ms == pytest.approx(made.one.last["ms"], rel=1e-12) and made.is_measured
    assert not predict(Arguments(gpus=1, gpu="A100", batch=step["batch"], preset=step["preset"])).is_measured


def test_other_gpus_are_scaled_by_their_data_sheets(ones):
    assert GPUS.keys() == PEAK_FLOPS.keys()
    share = STEP["product_share"]
    for gpu, one in ones.items():
        slower = share * 989e12 / PEAK_FLOPS[gpu] + (1 - share) * 4.8e12 / GPUS[gpu].bandwidth
        assert one.device(1024) - one.floor == pytest.approx(slower * (ones["H200"].device(1024) - one.floor))
        assert one.update == pytest.approx(ones["H200"].update * 4.8e12 / GPUS[gpu].bandwidth)
    bytes_moved = 30 * one.work.trained + 10 * one.work.taught
    assert ones["H200"].update == pytest.approx(bytes_moved / (38 * 85.1e6) * 0.8)


def test_other_recipes_are_scaled_by_their_flops():
    small, whole = (predict(Arguments(size=size, gpu="H200"), figures({})).one for size in ("S", "B"))
    assert not small.is_same_recipe and small.larger == pytest.approx(small.work.flops / whole.work.flops)
    assert 0.2 < small.larger < 0.4 and small.work.kernels == whole.work.kernels
    assert small.device(1024) - small.floor == pytest.approx(small.larger * (whole.device(1024) - whole.floor))
    for name, cfg in PRESETS.items():
        work = plan.work_of(cfg)
        state = 4 * (4 * work.trained + work.taught)
        assert 0.9 * state < model_bytes(cfg) <= state, name
        assert work.views == cfg.objective.count and work.flops > 0


def test_the_nearest_measurement_is_chosen():
    known = figures(
        {"masks": "mean"}, {"size": "S", "ms": 50.0}, {"device": "NVIDIA H100 80GB HBM3"}, {"old": True, "ms": 160.0},
        {}, {"batch": 256, "ms": 40.0},
    )  # fmt: skip

    def chosen(gpu: str, size: str) -> list[tuple]:
        keys = ("device", "size", "masks", "batch", "old")
        found = plan.nearest(known, plan.preset("audio-jepa", size=size), gpu)
        return [tuple(step[key] for key in keys) for step in found]

    assert chosen("H200", "B") == [("NVIDIA H200", "B", "drawn", batch, False) for batch in (256, 1024)]
    assert chosen("H100", "B") == [("NVIDIA H100 80GB HBM3", "B", "drawn", 1024, False)]
    assert chosen("H100", "S") == [("NVIDIA H200", "S", "drawn", 1024, False)]


def test_activations_come_from_the_measured_peak():
    (trained, taught), batch = (96_492_288, 85_253_376), STEP["batch"]
    peak = 16 * trained + 4 * taught + batch * 40e6
    known = figures({"peak_bytes": peak, "peak_of": "eager"})
    assert predict(Arguments(), known).one.activations == pytest.approx(40e6)
    assert predict(Arguments(gpus=1, batch=1024, gpu="H200"), known).fits
    assert not predict(Arguments(gpus=1, batch=1024, gpu="4090"), known).fits
    tokens = [(64 * width * 12 + 128 * 384 * 6) for width in (384, 768)]  # x width of encoder and predictor
    assert predict(Arguments(size="S"), known).one.activations == pytest.approx(40e6 * tokens[0] / tokens[1], rel=0.02)


# --- what is printed --------------------------------------------------------------------------------------------------


def printed(capsys, *argv: str, status: int = 0) -> str:
    assert doctor.main(["--plan", *argv]) == status
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [(), ("--gpus", "64", "--parallel", "zero1", "--reduce", "bf16"), ("--parallel", "fsdp", "--size", "L")]
)
def test_every_input_says_where_it_is_from(argv, capsys):
    out = printed(capsys, "--gpu", "H100", *argv)
    assert "predicted, not yet measured on several GPUs" in out
    inputs = out.partition("\ninputs\n")[2].splitlines()
    assert len(inputs) > 10
    sources = r"(measured \(.*\)|data sheet|assumption|counted|--network)"
    assert all(re.search(rf"  {sources}", line) for line in inputs), out
    step = next(line for line in inputs if line.startswith("  step "))
    assert "NVIDIA H200" in step and "measured" in step and re.search(r"\d{4}-\d\d-\d\d, [0-9a-f]{7}", step)


def test_the_printed_formula_adds_up(capsys):
    out = printed(capsys, "--gpus", "16", "--batch", "512", "--reduce", "bf16", "--network", "100")
    found = re.search(r"= max\((\S+) \+ (\S+), (\S+)\) \+ (\S+) \+ (\S+) \+ (\S+) \+ (\S+) = (\S+) ms", out)
    device, update, host, *more, total = map(float, found.groups())
    assert max(device + update, host) + sum(more) == pytest.approx(total, rel=5e-3)
    floor, clips, each, result = map(float, re.search(r"= (\S+) \+ (\S+) x (\S+) = (\S+) ms", out).groups())
    assert floor + clips * each == pytest.approx(result, rel=5e-3) and clips == 32 and result == device
    assert "network 0.8 x 100 GB/s" in out and re.search(r"  network +100 GB/s a node +--network", out)
    assert "25,600,000 clips in" in out and "of 16 GPUs that train 512 clips each alone" in out


def test_a_measured_step_says_so_and_views_are_counted(capsys):
    assert "1 x H200, 1,024 clips a step\nmeasured\n" in printed(capsys, "--gpus=1", "--gpu=H200", "--batch=1024")
    out = printed(capsys, "--preset", "clip-jepa", "--batch", "256")
    assert "512 views a step (64 on each)" in out and "views/s" in out
    assert "that the GPU is as efficient is an assumption" in out
    assert "10 us x" in out and "as far as the step does not hide it" in out, "the clip objective is not captured"


def test_what_does_not_fit_is_said(capsys):
    out = printed(capsys, "--gpus", "1", "--gpu", "4090", "--batch", "1024", status=1)
    assert "of 24 GB on each GPU" in out and "DOES NOT FIT: lower --batch" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu", "V100"], "--gpu V100: no data sheet is known; choose one of H200, H100, A100, B200, L40S, 4090"),
        (["--gpus", "3"], "--batch 256 is that of all GPUs together: make it a multiple of 3"),
        (["--gpus", "12"], "--gpus 12 does not fill nodes of 8"),
        (["--gpus", "0"], "--gpus 0: must be above 0"),
        (["--batch", "-8"], "--batch -8: must be above 0"),
        (["--gpus-per-node", "0"], "--gpus-per-node 0: must be above 0"),
        (["--network", "0"], "--network 0.0: must be a number of GB/s above 0"),
        (["--network", "nan"], "--network nan: must be"),
        (["--preset", "large"], "--preset large: unknown; choose one of"),
        (["--parallel", "fsdp", "--preset", "clip-jepa"], "--parallel fsdp shards masked pretraining only"),
    ],
)
def test_wrong_values_give_one_error(argv, message, capsys):
    assert doctor.main(["--plan", *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {message}")


def test_flags_are_described_and_need_plan(capsys):
    described = cli.describe(Arguments)
    assert all(len(text.split()) > 3 and text.endswith(".") for _, _, text in described)
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--gpus", "8"])
    assert stop.value.code == 2 and "needs --plan" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--plan", "--help"])
    assert not stop.value.code and "--gpus-per-node" in capsys.readouterr().out


def test_without_any_measurement_nothing_is_predicted():
    with pytest.raises(ConfigError, match="no step was measured on a GPU yet"):
        predict(Arguments(), figures())
    assert plan_text.number(0.0004) == "0" and plan_text.number(1234.5) == "1,234"
