"""The text of a prediction for many GPUs: the result, the formula with its numbers, and where each input is from."""

from collections.abc import Iterator, Sequence

from ajepa.training import plan
from ajepa.training.plan import GPUS, Arguments, Figures, Plan
from ajepa.training.run_log import PEAK_FLOPS
from ajepa.utils import cli

Line = tuple[str, ...]
NOT_MEASURED = "not yet measured on several GPUs"


def main(argv: Sequence[str]) -> int:
    """Print the prediction. Returns 1 if the step does not fit into the GPUs' memory."""
    at = cli.parse(Arguments, argv, "python -m ajepa.doctor --plan")
    figures = plan.measured_figures()
    made = plan.predict(at, figures)
    print("\n".join(text(made, figures)))
    return 0 if made.fits else 1


def text(made: Plan, figures: Figures) -> list[str]:
    """The lines of a prediction."""
    at, what = made.at, unit(made)
    spread = f" ({made.each:g} on each)" if at.gpus > 1 else ""
    lines = [f"{made.one.work.name} on {at.gpus} x {at.gpu}, {made.clips:,} {what} a step{spread}"]
    if at.gpus > 1:
        lines.append(f"--parallel {at.parallel}, --reduce {at.reduce}: predicted, {NOT_MEASURED}")
    elif made.is_measured:
        lines.append("measured")
    else:
        lines.append("predicted from a measured step")
    for title, found in (("prediction", result(made, figures)), ("formula", formula(made))):
        lines += ["", title, *(f"  {name:<12} {finding}".rstrip() for name, finding in found)]
    rows = list(inputs(made, figures))
    width = max(len(value) for _, value, _ in rows)
    return [*lines, "", "inputs", *(f"  {name:<12} {value:<{width}}  {source}" for name, value, source in rows)]


def unit(made: Plan) -> str:
    return "clips" if made.one.work.views == 1 else "views"


def result(made: Plan, figures: Figures) -> Iterator[Line]:
    at, what = made.at, unit(made)
    yield "step", f"{number(made.ms)} ms"
    yield "speed", f"{number(made.clips_per_second)} {what}/s, {number(made.clips_per_second / at.gpus)} on each GPU"
    yield "run", f"{made.budget:,} {what} in {number(made.hours)} hours"
    if at.gpus > 1:
        yield "efficiency", f"{made.efficiency:.0%} of {at.gpus} GPUs that train {made.clips:,} {what} each alone"
        yield "", f"{made.efficiency_each:.0%} of {at.gpus} GPUs that train {made.each:g} {what} each alone"
        yield "lost", f"{number(sum(ms for ms, _ in made.lost()))} ms of a step, against the first:"
        for ms, reason in made.lost():
            if ms > 0.005:
                yield "", f"{number(ms):>6}  {reason}"
    parts = ", ".join(f"{name} {size / 1e9:.2g}" for name, size in made.memory.items())
    need, have = sum(made.memory.values()) / 1e9, GPUS[at.gpu].memory / 1e9
    yield "memory", f"{need:.3g} of {have:.0f} GB on each GPU: {parts}"
    if not made.fits:
        remedy = "lower --batch, use more GPUs, or train with --micro-batch or --recompute"
        remedy += "; --parallel fsdp spreads the weights" if at.parallel != "fsdp" and at.gpus > 1 else ""
        yield "", f"DOES NOT FIT: {remedy}"
    yield from data(made, figures)


def data(made: Plan, figures: Figures) -> Iterator[Line]:
    """What the loader has to read, and the cores that it took where it was measured."""
    at, work = made.at, made.one.work
    rate = made.clips_per_second / work.views / at.nodes
    yield "data", f"{number(rate)} recordings/s on each node, {rate * work.pcm / 1e9:.2g} GB/s as int16 samples"
    for loader in figures["loaders"][:1]:
        need = {
            kind: rate * work.pcm / (2 * loader["samples"]) * loader["cores"] / speed
            for kind, speed in loader["clips_per_second"].items()
        }
        yield "", f"cores of each node that read them: {need['shards']:.1f} from shards, {need['flac']:.0f} from FLAC"
        if need["flac"] > 16 * at.node:
            yield "", "pack the recordings into shards with ajepa.pack: a node has hardly as many cores"


def formula(made: Plan) -> Iterator[Line]:
    """Each term of a step with its numbers, in the notation of `ajepa.training.plan`."""
    at, one, work, terms = made.at, made.one, made.one.work, made.terms
    sheet = GPUS[at.gpu]
    yield "step", "max(device + update, host) + packing + reduction + gather + skew"
    sums = " + ".join(number(ms) for ms in terms[3:])
    host = one.host(made.graphs)
    yield "", f"= max({number(terms.device)} + {number(terms.update)}, {number(host)}) + {sums} = {number(made.ms)} ms"
    above = terms.device - one.floor
    yield "device", "floor + clips on each GPU x time of a clip"
    yield "", f"= {number(one.floor)} + {made.each:g} x {above / made.each:.4g} = {number(terms.device)} ms"
    if not one.is_same_gpu:
        yield "", f"the time of a clip is {one.slower:.3g} x that on the measured GPU"
    if not one.is_same_recipe:
        yield "", f"the time of a clip is {one.larger:.3g} x that of the measured recipe"
    parts = "" if at.parallel == "ddp" or at.gpus == 1 else f" / {at.gpus}"
    size = f"(30 x {millions(work.trained)} + 10 x {millions(work.taught)}) bytes"
    yield "update", f"{size} / rate{parts} = {number(terms.update)} ms"
    if at.gpus == 1:
        return
    yield "collective", "(G - 1) / G x bytes / link + (N - 1) / N x bytes / network + latencies"
    links = f"G = {at.node}, link {plan.LINK_SHARE:g} x {sheet.link / 1e9:g} GB/s; N = {at.nodes}"
    links += f", network {plan.LINK_SHARE:g} x {at.bandwidth:g} GB/s" if at.nodes > 1 else ""
    yield "", links + (f"; {made.buckets} buckets" if at.parallel != "fsdp" else "")
    trained, every = millions(work.trained), work.trained + work.taught
    hidden = "" if made.graphs else ", as far as the step does not hide it"
    packed, gathered = f"{4 + at.value} x {trained}", f"collective(2 x {millions(every)})"
    if at.parallel == "fsdp":
        packed = f"14 x {millions(every + work.trained)}"
        gathered = f"collective(4 x {millions(every)}) + collective(4 x {trained}){hidden}"
    yield "packing", f"{packed} bytes / {sheet.bandwidth / 1e12:g} TB/s = {number(terms.packing)} ms"
    reduced = ("2 " if at.parallel == "ddp" else "") + f"collective({at.value} x {trained}){hidden}"
    reduced += "" if at.parallel == "ddp" else ", and a few scalars"
    yield "reduction", f"{reduced} = {number(terms.reduction)} ms"
    if at.parallel != "ddp":
        yield "gather", f"{gathered} = {number(terms.gather)} ms"
    yield "skew", f"{one.last['spread']:.2%} x sqrt(2 ln {at.gpus}) x device = {number(terms.skew)} ms"


def inputs(made: Plan, figures: Figures) -> Iterator[tuple[str, str, str]]:
    """(name, value, source) of every figure: measured, of a data sheet, or assumed."""
    at, one, work = made.at, made.one, made.one.work
    sheet, last, device = GPUS[at.gpu], one.last, one.last["device"]
    for step in one.steps:
        masks = "masks as drawn" if step["masks"] == "drawn" else "mean masks"
        shape = f"{number(step['ms'])} ms, {step['preset']} ViT-{step['size']}, {step['batch']:,} clips, {masks}"
        yield "step", shape, f"measured ({device}, {step['when']})"
    if not one.is_same_gpu:
        yield "products", f"{last['product_share']:.0%} of that step", f"measured ({device}, {last['when']})"
        yield "scaling", "products with FLOP/s, the rest with bandwidth", "assumption"
        for gpu in (plan.model_of(device) or "", at.gpu):
            rates = f"{PEAK_FLOPS[gpu] / 1e12:g} TFLOP/s, {GPUS[gpu].bandwidth / 1e12:g} TB/s"
            yield gpu, rates, "data sheet"
    if not one.is_same_recipe:
        yield "FLOPs", f"{number(work.flops / 1e9)} G a clip", "counted; that the GPU is as efficient is an assumption"
    if len(one.steps) > 1:
        few, more = (step["batch"] for step in one.steps[:2])
        yield "floor", f"{number(one.floor)} ms, from {few:,} and {more:,} clips", f"measured ({device})"
    else:
        yield "floor", f"{plan.KERNEL_US:g} us x {work.kernels} kernels", "assumption"
    if one.updated:
        update = f"{number(one.updated['ms'])} ms for {millions(one.updated['parameters'])} weights"
        yield "update", update, f"measured ({one.updated['device']}, {one.updated['when']})"
    yield "memory", f"{sheet.memory / 1e9:.0f} GB", "data sheet"
    if one.activations:
        engine = "" if last["peak_of"] == "fused" else "; plain PyTorch, which keeps more than ajepa"
        scaled = "" if one.is_same_recipe else "; scaled to this recipe by an assumption"
        yield "activations", f"{number(one.activations / 1e6)} MB a clip", f"measured ({device}{engine}){scaled}"
    else:
        yield "activations", "unknown, not counted", "not yet measured"
    launches = f"{plan.HOST_MS:g} ms"
    launches += "" if made.graphs else f" + {plan.LAUNCH_US:g} us x {work.kernels} launches"
    yield "host", launches, "assumption"
    if at.gpus > 1:
        yield "link", f"{sheet.link / 1e9:g} GB/s each way, {sheet.over}", "data sheet"
        if at.nodes > 1:
            yield "network", f"{at.bandwidth:g} GB/s a node", "assumption" if at.network is None else "--network"
        latency = f"{plan.START_US:g} us a collective, {plan.LINK_US:g} us a hop, {plan.NETWORK_US:g} us between nodes"
        yield "share", f"{plan.LINK_SHARE:.0%} of link and network is reached", "assumption"
        yield "latencies", latency, "assumption"
        yield "spread", f"{last['spread']:.2%} of a step", f"measured ({device}); that GPUs vary alike is an assumption"
    for loader in figures["loaders"][:1]:
        rates = ", ".join(f"{kind} {number(rate)}" for kind, rate in loader["clips_per_second"].items())
        value = f"{loader['cores']} cores read {rates} clips/s"
        yield "loader", value, f"measured ({loader['device']}, {loader['when']})"


def number(value: float) -> str:
    """Three significant digits without an exponent, and at most three decimals."""
    return f"{value:,.0f}" if abs(value) >= 99.5 else f"{round(value, 3):.3g}"


def millions(count: float) -> str:
    return f"{count / 1e6:.1f} M"
