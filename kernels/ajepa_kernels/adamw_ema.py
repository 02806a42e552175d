"""AdamW and the target encoder's exponential moving average (EMA): one launch updates every parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.adam import adam
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ajepa_kernels._adamw_ema import Rows, launch_adamw_ema, launch_rows, updated_together
from ajepa_kernels._pairs import named_pairs
from ajepa_kernels._schedules import Schedules
from ajepa_kernels._tables import KERNEL_DTYPES, all_tensors, capturing, own_part, split_alike, unsupported
from ajepa_kernels._triton import arch, check_impl, register, use_triton
from ajepa_kernels.ema_update import checked_decay, ema_update_reference_, scalar
from ajepa_kernels.fp8 import STATE, note_largest_, round_e4m3

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]
HOW = ("fused", "foreach", "capturable", "differentiable")  # how a group's step is computed, not its result


@register(
    "fused_adamw_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
    "Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] steps, Tensor? lr_tensor, float lr, float beta1, float beta2, "
    "float weight_decay, float eps, bool amsgrad, bool maximize, Tensor? grad_scale, Tensor? found_inf) -> ()",
    lambda *args: None,
)
def _fused_adamw(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps,
    lr_tensor, lr, beta1, beta2, weight_decay, eps, amsgrad, maximize, grad_scale, found_inf,
):  # fmt: skip
    """torch's fused AdamW as one operation, because torch.compile does not trace it."""
    tensors = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    adam(
        *tensors, amsgrad=amsgrad, beta1=beta1, beta2=beta2, lr=lr if lr_tensor is None else lr_tensor,
        weight_decay=weight_decay, eps=eps, maximize=maximize, fused=True, grad_scale=grad_scale,
        found_inf=found_inf, decoupled_weight_decay=True,
    )  # fmt: skip
    for mutated in tensors:
        torch.autograd.graph.increment_version(mutated)


class _Tensors(NamedTuple):
    """The tensors of one step. The first `len(grads)` parameters have a gradient; they are in the order of groups."""

    params: list
    grads: list
    exp_avgs: list
    exp_avg_sqs: list
    max_exp_avg_sqs: list
    steps: list
    remainders: list
    emas: list
    copies: list
    ema_copies: list
    scalings: list
    places: list  # six numbers for each parameter, see `_adamw_ema`
    sources: list  # pairs that another launch updates
    targets: list


def join_remainder(param: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The float32 values that a bfloat16 tensor and its int16 remainder represent together."""
    return ((param.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def split_remainder(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits float32 into the nearest bfloat16 (ties away from zero) and the int16 that `join_remainder` needs.

    A NaN keeps its upper half, made quiet, and gets remainder zero: rounding could carry into its sign bit and give -0.
    """
    bits, nan = value.view(torch.int32), value.isnan()
    high = torch.where(nan, (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
    low = (bits - (high << 16)).masked_fill(nan, 0)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def _together(t: _Tensors) -> list[tuple[torch.Tensor | None, ...]]:
    return updated_together(
        t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, t.remainders, t.emas, t.copies, t.ema_copies, t.places
    )


def _own_parts(t: _Tensors) -> _Tensors:
    """`t` with the parts of DTensors that this rank holds, where tensors that are updated together are split alike."""
    if not any(hasattr(p, "placements") for p in t.params) or not split_alike(_together(t)):
        return t
    return _Tensors(*([own_part(x) for x in values] for values in t))


class _Plan(NamedTuple):
    """The launches of one step."""

    kinds: dict[tuple, Rows]
    facts: list  # everything that `kinds` depends on; addresses instead of tensors, so that none is kept alive
    grads: list[int]  # addresses of the gradients, which `kinds` does not contain
    written: list[torch.Tensor]


def _like(p: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """`grad` in the dtype and memory order of `p`, which torch's fused step on a GPU requires."""
    return grad.to(p.dtype) if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)


def _tensor_or_number(x: float | torch.Tensor | None) -> tuple[torch.Tensor | None, float]:
    return (x, 0.0) if isinstance(x, torch.Tensor) else (None, x or 0.0)


class AdamWEMA(torch.optim.AdamW):
    """`torch.optim.AdamW` that also updates EMA copies and low-precision copies of its parameters, in one launch.

    p <- p (1 - lr weight_decay) - lr m^ / (sqrt(v^) + eps), where m and v average grad / grad_scale (arXiv 1711.05101);
    ema <- ema_decay ema + (1 - ema_decay) p. Param groups, hooks and closures work as in torch. AdamW and AdamWEMA load
    each other's state dicts; loading does not change `fused`, `foreach`, `capturable` and `differentiable` here.

    `torch.compile(fullgraph=True)` compiles a function that calls `step`. Use a tensor as the learning rate there,
    because every new number triggers a recompilation.

    On a GPU one kernel launch updates all parameters of equal dtypes, in float32. The axes of a parameter may have any
    order in memory, if its gradient, state, average and copies have the same order. The learning rate, `ema_decay`,
    `grad_scale`, `found_inf` and a group's weight decay may be scalar tensors on the device, which a captured CUDA
    graph reads again at each replay; numbers are frozen into the graph. Addresses that are new at the capture are
    copied to the device at each replay. The kernel does not change `.grad`, which torch's AdamW divides by the scale.
    Of parameters that FSDP2 has split (DTensors), it updates this rank's parts, if the averages are split alike.

    `from_model` pairs the parameters of two modules by name. `schedules` replaces the loop's own bookkeeping:

    - Each `step` first sets lr of every group, weight decay of the groups whose weight decay was not zero when they
      were made, and the average's decay, to the values of the schedules at the number of steps that were finished.
      Tensors in groups are filled in place. An `ema_decay` given to `step` wins.
    - A step that `found_inf` skips counts too, as in loops that call their schedulers once for each batch, because the
      host does not wait to read it. Torch's bias correction does not count it.
    - The count is saved in the state dict as `finished_steps` of the groups. A state dict without it, such as AdamW's,
      continues at the largest step count of its parameters.
    - A graph capture and torch.compile would freeze a number that the host computed, so a step inside them evaluates
      no schedule. Make lr and weight decay tensors, and call `advance` before each replay or compiled step: it fills
      the tensors, and also the decay, which is a tensor where a learning rate is one.

    Args:
        params: parameters or groups, as for `torch.optim.AdamW`.
        ema: pairs (parameter or buffer, its EMA tensor). A parameter without a pair has no average. A pair is averaged
            even if its parameter has no gradient. An integer or boolean tensor is copied instead, as by `ema_update_`.
        copies: pairs (parameter or EMA tensor, low-precision tensor of its shape). Each step writes the second tensor.
        scalings: pairs (float8_e4m3fn copy of an EMA tensor, state of its `Scaling`). Each step that updates the
            average writes the copy with the state's scale and notes the largest magnitude; see `quantize`.
        remainder: keep bfloat16 parameters in float32 precision, with 16 more bits in the state ("remainder") and
            moments in float32. AdamW, and AdamWEMA without this option, load such a state dict rounded. A state dict of
            AdamW is loaded with remainders of zero.
        schedules: functions of the number of finished steps, for some of "lr", "weight_decay" and "ema_decay".
        ema_on_skip: the averages and copies also move on a step that `found_inf` skips, towards the unchanged
            parameters, as in I-JEPA's loop. By default such a step changes nothing.
        impl: "auto" runs the Triton kernel on a GPU, or warns once and runs plain PyTorch if the kernel cannot run; on
            a CPU it runs plain PyTorch. "triton" requires the kernel, "reference" is plain PyTorch.
        **kwargs: arguments of AdamW. `fused=True` is the default; the kernel replaces torch's fused step.

    Raises:
        TypeError: a member of a pair is not a tensor, or a schedule is not a function.
        ValueError: pairs or options are invalid, or AdamW refuses an argument.

    Example::

        import copy
        context_encoder = torch.nn.Linear(8, 8, device="cuda")
        target_encoder = copy.deepcopy(context_encoder).requires_grad_(False)
        lr = torch.tensor(1e-3, device="cuda")
        ema = zip(context_encoder.parameters(), target_encoder.parameters())
        optimizer = AdamWEMA(context_encoder.parameters(), ema=ema, lr=lr, weight_decay=0.05)
        context_encoder(torch.randn(4, 8, device="cuda")).square().mean().backward()
        optimizer.step(ema_decay=0.999)
    """

    _plan: _Plan | None = None  # the plan of the last step, without its tensors
    apart: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()  # pairs that `ema_update_` updates beside the launch
    schedules: Schedules | None = None
    ema_on_skip = False

    def __init__(
        self, params, ema: Pairs = (), copies: Pairs = (), scalings: Pairs = (),
        *, remainder=False, schedules: Mapping[str, Callable[[int], float]] | None = None, ema_on_skip=False,
        impl="auto", **kwargs,
    ):  # fmt: skip
        check_impl("AdamWEMA", impl)
        super().__init__(params, **{"fused": True, **kwargs})
        self.schedules = Schedules(schedules, self.param_groups) if schedules else None
        self.ema_on_skip = ema_on_skip
        self.ema_sources: list[torch.Tensor] = []
        self.ema_targets: list[torch.Tensor] = []
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.scalings: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.remainder, self.impl = remainder, impl
        self.add_pairs(ema, copies, scalings)

    @classmethod
    def from_model(
        cls, model: nn.Module, target: nn.Module, *others: nn.Module,
        weight_decay: float | torch.Tensor = 1e-2, decay_1d: bool = False, buffers: bool = True, **options: Any,
    ) -> AdamWEMA:  # fmt: skip
        """The optimizer of `model` and `others`, which averages `model` into `target`, paired by name.

        It optimises the parameters that require a gradient, in two groups: those with two or more axes have weight
        decay, biases and norms have none. A parameter that does not require a gradient, such as a fixed position
        embedding, is averaged only. A parameter that several modules share is optimised and averaged once. The prefixes
        of DistributedDataParallel, torch.compile and `checkpoint_wrapper` do not count.

        Args:
            model: the context encoder.
            target: the target encoder, whose parameters require no gradient.
            others: modules without an average, such as the predictor.
            weight_decay: of the first group.
            decay_1d: all parameters have weight decay, in one group.
            buffers: also update the target's persistent buffers: average floating-point numbers, copy others.
            options: of `AdamWEMA`, such as lr, schedules and copies.

        Raises:
            TypeError: an argument is not a module.
            ValueError: names or shapes of the two modules differ, or a parameter of the target requires a gradient.

        Example::

            import copy
            encoder = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True, device="cuda")
            target = copy.deepcopy(encoder).requires_grad_(False)
            predictor = torch.nn.Linear(32, 32, device="cuda")
            optimizer = AdamWEMA.from_model(
                encoder, target, predictor, weight_decay=0.04,
                schedules={
                    "lr": lambda n: 1e-3 * min(1.0, (n + 1) / 100),
                    "weight_decay": lambda n: 0.04 + 0.36 * n / 1000,
                    "ema_decay": lambda n: 0.996 + 0.004 * n / 1000,
                },
            )
            x = torch.randn(2, 16, 32, device="cuda")
            latent_l2_loss(predictor(encoder(x)), target(x), torch.arange(16, device="cuda").expand(2, 16)).backward()
            optimizer.step()
        """
        for module in (model, target, *others):
            if not isinstance(module, nn.Module):
                raise TypeError(f"AdamWEMA.from_model: a torch.nn.Module is needed, got {type(module).__name__}")
        pairs = named_pairs(model, target, buffers)
        trained = dict.fromkeys(p for module in (model, *others) for p in module.parameters() if p.requires_grad)
        decayed = [p for p in trained if decay_1d or p.dim() >= 2]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": [p for p in trained if not (decay_1d or p.dim() >= 2)], "weight_decay": 0.0},
        ]
        return cls([group for group in groups if group["params"]], ema=pairs, **options)

    def add_pairs(self, ema: Pairs = (), copies: Pairs = (), scalings: Pairs = ()) -> None:
        """Adds averages and copies, for example those of a new param group. Raises the errors of `AdamWEMA`."""
        ema, copies = (
            [*zip(self.ema_sources, self.ema_targets, strict=True), *self.apart, *ema],
            [*self.copies, *copies],
        )
        scalings = [*self.scalings, *scalings]
        for name, pairs in (("ema", ema), ("copies", copies), ("scalings", scalings)):
            all_tensors("AdamWEMA", name, (x for pair in pairs for x in pair))
        for source, target in ema + copies:
            if source.shape != target.shape or source.device != target.device:
                raise ValueError("AdamWEMA: the tensors of a pair must have equal shapes and devices")
            if source is target:
                raise ValueError("AdamWEMA: an average or a copy must be another tensor than its source")
        if not all(target.is_floating_point() for _, target in copies):
            raise ValueError("AdamWEMA: a copy must be a tensor of floating-point numbers")
        for pairs in (ema, copies):
            if len({source for source, _ in pairs}) < len(pairs):
                raise ValueError("AdamWEMA: a tensor has two averages or two copies; give each tensor one of each")
        if len({target for _, target in ema + copies}) < len(ema + copies):
            raise ValueError("AdamWEMA: two pairs write one tensor; give each pair a target of its own")
        scaled, averages = {copy for copy, _ in scalings}, {average for _, average in ema}
        small = {target: source for source, target in ema + copies if target.dtype == torch.float8_e4m3fn}
        if scaled != small.keys() or len(scaled) < len(scalings) or not averages.issuperset(small.values()):
            raise ValueError("AdamWEMA: float8_e4m3fn is for copies of averages, and each has one scaling")
        if any(s.shape != (STATE,) or s.dtype != torch.float32 or s.device != copy.device for copy, s in scalings):
            raise ValueError(f"AdamWEMA: the state of a scaling must be float32 [{STATE}] on the copy's device")
        # A counter, or a buffer of a dtype that the kernel lacks, must not keep all others from the kernel.
        together = {p for group in self.param_groups for p in group["params"]} | {source for source, _ in copies}
        self.apart = [
            (source, target)
            for source, target in ema
            if not target.is_floating_point()
            or (together.isdisjoint((source, target)) and not {source.dtype, target.dtype} <= {*KERNEL_DTYPES})
        ]
        apart = {target for _, target in self.apart}
        ema = [(source, target) for source, target in ema if target not in apart]
        self.ema_sources, self.ema_targets = [p for p, _ in ema], [t for _, t in ema]
        self.copies, self.scalings = copies, scalings

    @property
    def finished_steps(self) -> int:
        """How many steps the schedules have counted."""
        return 0 if self.schedules is None else self.schedules.finished_steps

    def advance(self) -> None:
        """Sets the values of the schedules for the next step, which the caller takes in a captured graph or compiled.

        An eager `step` does this itself. Raises ValueError if a schedule gives a value that is not allowed.
        """
        if self.schedules is not None:
            self.schedules.set_values(self.param_groups)
            self.schedules.finished_steps += 1

    # --- the step ---

    @torch.no_grad()
    def step(
        self,
        closure=None,
        *,
        ema_decay: float | torch.Tensor | None = None,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ):
        """Performs one update. It divides gradients by `grad_scale`, and changes nothing if `found_inf` is 1.

        Both are scalar tensors. A `GradScaler` may set them, too; its scale and this one multiply. Without `ema_decay`
        and its schedule the averages do not change. With `ema_on_skip`, `found_inf` does not stop the averages.

        Raises ValueError, before parameters change, if the decay is outside [0, 1] or an argument is not a scalar or is
        on another device, or if a schedule gives a value that is not allowed.
        """
        schedules = self.schedules
        frozen = schedules is None or torch.compiler.is_compiling() or self._is_captured()
        if schedules is not None:
            if not frozen:
                schedules.set_values(self.param_groups)
            ema_decay = schedules.ema_decay() if ema_decay is None else ema_decay
        ema_decay, grad_scale, found_inf = self._scalars(ema_decay, grad_scale, found_inf)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update(ema_decay, grad_scale, found_inf)
        if schedules is not None and not frozen:
            schedules.finished_steps += 1
        return loss

    def _is_captured(self) -> bool:
        p = next((p for group in self.param_groups for p in group["params"]), None)
        return p is not None and capturing(p)

    def _update(self, ema_decay, grad_scale, found_inf) -> None:
        # an active dispatch mode must see the operation
        eager = not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None
        with_ema = ema_decay is not None
        plan = self._last_plan(with_ema) if eager else None
        if plan is None:
            tensors = _Tensors(*([] for _ in _Tensors._fields))
            self._init_group(with_ema, *tensors)
            parts = _own_parts(tensors) if eager else tensors
            together = _together(parts)
            fused = bool(together) and use_triton(
                "AdamWEMA", self.impl, parts.params[0], self._unsupported(parts, together)
            )
            if tensors.sources:
                self._update_apart(tensors.sources, tensors.targets, ema_decay, found_inf)
            if not together:
                return
            if not fused:
                self._step_reference(tensors, ema_decay, grad_scale, found_inf)
                return
            if not eager or parts is not tensors:
                self._step_operation(parts, ema_decay, grad_scale, found_inf)
                if parts is not tensors:  # the operation has counted the versions of the parts
                    torch.autograd.graph.increment_version([*tensors.params, *tensors.emas])
                return
            rates, groups, _ = self._rates()
            kinds = launch_rows(together, tensors.steps, tensors.scalings, rates, tensors.places, groups)
            plan = _Plan(kinds, *self._inspect(with_ema))
            self._plan = plan._replace(grads=[], written=[])
        elif with_ema and self.apart:
            self._update_apart([s for s, _ in self.apart], [t for _, t in self.apart], ema_decay, found_inf)
        launch_adamw_ema(
            plan.kinds, plan.grads, plan.written[0], self._rates()[2], grad_scale, found_inf,
            *_tensor_or_number(ema_decay), self.ema_on_skip and with_ema,
        )  # fmt: skip
        torch.autograd.graph.increment_version(plan.written)

    def _update_apart(self, sources: list, targets: list, ema_decay, found_inf) -> None:
        if found_inf is not None and not self.ema_on_skip:
            sources = [torch.where(found_inf > 0, t, s) for t, s in zip(targets, sources, strict=True)]
        ema_update_reference_(targets, sources, ema_decay)

    def _scalars(self, ema_decay, grad_scale, found_inf):
        """Checks the scalar arguments of a step and combines them with the attributes that GradScaler sets."""
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        if device is None:
            return ema_decay, grad_scale, found_inf
        if ema_decay is not None:
            ema_decay = checked_decay("AdamWEMA", ema_decay, device)
        if grad_scale is not None:
            grad_scale = scalar("AdamWEMA", "grad_scale", grad_scale, device)
        if found_inf is not None:
            found_inf = scalar("AdamWEMA", "found_inf", found_inf, device)
        scale, inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is not None:
            scale = scale.reshape(()).to(device)
            grad_scale = scale if grad_scale is None else grad_scale * scale
        if inf is not None:
            inf = inf.reshape(()).to(device)
            found_inf = inf if found_inf is None else torch.maximum(found_inf, inf)
        return ema_decay, grad_scale, found_inf

    def _init_group(self, with_ema: bool, *lists: list) -> None:
        """Fills the lists of `_Tensors` for all groups, and creates missing state.

        The name is that of torch's method, because torch.compile runs a method of this name instead of tracing it, and
        turns the tensors that it put into the lists into inputs of the graph.
        """
        t = _Tensors(*lists)
        groups: dict[torch.Tensor, int] = {}
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                groups[p] = i
                if self.remainder and p.dtype == torch.bfloat16 and p.grad is not None and not self.state[p]:
                    self.state[p].update(
                        step=torch.zeros((), dtype=torch.float32, device=p.device),
                        exp_avg=torch.zeros_like(p, dtype=torch.float32),
                        exp_avg_sq=torch.zeros_like(p, dtype=torch.float32),
                        remainder=torch.zeros_like(p, dtype=torch.int16),
                    )
            super()._init_group(group, t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, t.max_exp_avg_sqs, t.steps)
        ema = dict(zip(self.ema_sources, self.ema_targets, strict=True)) if with_ema else {}
        copies, averages, scalings = dict(self.copies), set(self.ema_targets), dict(self.scalings)
        with_gradient = set(t.params)
        others = dict.fromkeys([*ema, *(source for source in copies if source not in averages)])
        t.params.extend(p for p in others if p not in with_gradient)

        def place(tensors: list, x: torch.Tensor | None) -> int:
            if x is None:
                return -1
            tensors.append(x)
            return len(tensors) - 1

        for p in t.params:
            average = ema.get(p)
            ema_copy = None if average is None else copies.get(average)
            t.places.extend([
                place(t.remainders, self.state.get(p, {}).get("remainder")),
                place(t.emas, average),
                place(t.copies, copies.get(p)),
                place(t.ema_copies, ema_copy),
                groups.get(p, 0),
                place(t.scalings, None if ema_copy is None else scalings.get(ema_copy)),
            ])  # fmt: skip
        for source, target in self.apart if with_ema else ():
            t.sources.append(source)
            t.targets.append(target)

    # --- plain definition ---

    def _step_reference(self, t: _Tensors, ema_decay, grad_scale, found_inf) -> None:
        if not (grad_scale is None and found_inf is None) and not all(group["fused"] for group in self.param_groups):
            raise ValueError("AdamWEMA: grad_scale and found_inf need fused=True")
        # float32 values of the parameters that have a remainder
        remainders = [t.remainders[i] if i >= 0 else None for i in t.places[0::6]]
        values = [p if r is None else join_remainder(p, r) for p, r in zip(t.params, remainders, strict=True)]
        groups, end, end_max = t.places[4::6][: len(t.grads)], 0, 0
        for i, group in enumerate(self.param_groups):
            start, end = end, end + groups.count(i)
            start_max, end_max = end_max, end_max + group["amsgrad"] * groups.count(i)
            if start == end:
                continue
            params, lr, weight_decay = values[start:end], group["lr"], group["weight_decay"]
            if isinstance(weight_decay, torch.Tensor):  # multiplied on the device, so that the host need not read it
                shrink = 1 - lr * weight_decay
                torch._foreach_mul_(params, shrink if found_inf is None else torch.where(found_inf > 0, 1.0, shrink))
                weight_decay = 0.0
            tensors = (
                params, [_like(p, g) for p, g in zip(params, t.grads[start:end], strict=True)],
                t.exp_avgs[start:end], t.exp_avg_sqs[start:end], t.max_exp_avg_sqs[start_max:end_max],
                t.steps[start:end],
            )  # fmt: skip
            (beta1, beta2), eps = group["betas"], group["eps"]
            if group["fused"] and torch.compiler.is_compiling():
                tensor, number = (lr, 0.0) if isinstance(lr, torch.Tensor) else (None, lr)
                torch.ops.ajepa.fused_adamw_(
                    *tensors, tensor, number, beta1, beta2, weight_decay, eps, group["amsgrad"], group["maximize"],
                    grad_scale, found_inf,
                )  # fmt: skip
            else:
                adam(
                    *tensors, amsgrad=group["amsgrad"], beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay,
                    eps=eps, maximize=group["maximize"], foreach=group["foreach"], capturable=group["capturable"],
                    differentiable=group["differentiable"], fused=group["fused"], grad_scale=grad_scale,
                    found_inf=found_inf, decoupled_weight_decay=True,
                    has_complex=any(torch.is_complex(p) for p in params),
                )  # fmt: skip
        for p, value, remainder in zip(t.params, values, remainders, strict=True):
            if remainder is not None:
                high, low = split_remainder(value)
                p.copy_(high)
                remainder.copy_(low)
        if t.emas:
            if self.ema_on_skip:
                found_inf = None
            if found_inf is not None:
                ema_decay = torch.where(found_inf > 0, 1.0, ema_decay)
            ema_update_reference_(t.emas, [p for p, i in zip(values, t.places[1::6], strict=True) if i >= 0], ema_decay)
        sources = [p for p, i in zip(values, t.places[2::6], strict=True) if i >= 0]
        written = list(t.copies)
        for ema, copy, scaling in zip(t.places[1::6], t.places[3::6], t.places[5::6], strict=True):
            if scaling >= 0:
                value, state, small = t.emas[ema].float(), t.scalings[scaling], t.ema_copies[copy]
                rounded = round_e4m3(value, state[0])
                if found_inf is not None:  # torch.where takes no float8
                    kept = torch.where(found_inf > 0, small.view(torch.uint8), rounded.view(torch.uint8))
                    rounded, value = kept.view(small.dtype), torch.where(found_inf > 0, 0.0, value)
                small.copy_(rounded)
                note_largest_(state, value)
            elif copy >= 0:
                written.append(t.ema_copies[copy])
                sources.append(t.emas[ema])
        if sources:
            torch._foreach_copy_(written, sources)

    # --- one launch ---

    def _unsupported(self, t: _Tensors, together: list) -> str:
        for group in self.param_groups:
            if group["amsgrad"] or group["differentiable"] or not (group["fused"] or group["capturable"]):
                return "no kernel for amsgrad, differentiable or fused=False"
            if any(isinstance(beta, torch.Tensor) for beta in group["betas"]):
                return "no kernel for betas that are tensors"
            for rate in (group["lr"], group["weight_decay"]):
                if isinstance(rate, torch.Tensor) and (rate.dtype, rate.device) != (torch.float32, t.params[0].device):
                    return "learning rates and weight decays that are tensors must be float32 on the parameters' device"
        if any((step.dtype, step.device) != (torch.float32, t.params[0].device) for step in t.steps):
            return "step counts must be float32 on the parameters' device"
        if t.scalings and t.params[0].is_cuda and arch(t.params[0]) < 89:
            return "float8 needs compute capability 8.9"
        return unsupported(together, (*KERNEL_DTYPES, torch.float8_e4m3fn))

    def _rates(self) -> tuple[list[torch.Tensor], list[int], list[float]]:
        """Returns the arguments rates, groups and hyper of the operation."""
        rates: list[torch.Tensor] = []
        groups: list[int] = []
        hyper: list[float] = []
        for group in self.param_groups:
            hyper += [*group["betas"], group["eps"]]
            for rate in (group["lr"], group["weight_decay"]):
                is_tensor = isinstance(rate, torch.Tensor)
                groups.append(len(rates) if is_tensor else -1)
                hyper.append(0.0 if is_tensor else float(rate))
                if is_tensor:
                    rates.append(rate)
            hyper.append(-1.0 if group["maximize"] else 1.0)
        return rates, groups, hyper

    def _step_operation(self, t: _Tensors, ema_decay, grad_scale, found_inf) -> None:
        rates, groups, hyper = self._rates()
        torch.ops.ajepa.adamw_ema_(
            t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, t.steps, t.remainders, t.emas, t.copies, t.ema_copies,
            t.scalings, rates, t.places, groups, hyper, grad_scale, found_inf, *_tensor_or_number(ema_decay),
            self.ema_on_skip and ema_decay is not None,
        )  # fmt: skip

    # --- repeating the last step's launch, which takes a quarter of the host's time ---

    def _last_plan(self, with_ema: bool) -> _Plan | None:
        """The last step's plan with this step's gradients; None if this step needs a new plan."""
        if self._plan is None:
            return None
        try:
            plan = _Plan(self._plan.kinds, *self._inspect(with_ema))
        except (KeyError, RuntimeError):  # a state does not exist yet, or a gradient has no memory
            return None
        return plan if plan.facts == self._plan.facts else None

    def _inspect(self, with_ema: bool) -> tuple[list, list[int], list[torch.Tensor]]:
        """Returns facts, grads and written of this step's plan."""
        facts: list = [self.impl, with_ema]
        written: list[torch.Tensor] = []
        grads: list[torch.Tensor] = []
        read = [*self.ema_sources, *(source for source, _ in self.copies)]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in params]
            written += params
            for name in ("exp_avg", "exp_avg_sq", "step"):
                written += [state[name] for state in states]
            written += [state["remainder"] for state in states if "remainder" in state]
            grads += [p.grad for p in params]
            rates = (group["lr"], group["weight_decay"])
            read += [rate for rate in rates if isinstance(rate, torch.Tensor)]
            facts += [len(params), *map(type, (*rates, *group["betas"])), *map(group.get, (*HOW, "amsgrad"))]
        written += [*(self.ema_targets if with_ema else ()), *(target for _, target in self.copies)]
        written += [state for _, state in self.scalings]
        lasting = written + read
        facts += map(torch.Tensor.data_ptr, lasting)
        for tensors in (lasting, grads):
            facts += [x.dtype for x in tensors]
            facts += map(torch.Tensor.is_contiguous, tensors)
        facts += [(x.shape, x.stride()) for x in grads]
        addresses = [x.data_ptr() for x in grads]
        facts += [address % 16 for address in addresses]
        return facts, addresses, written

    # --- state ---

    def __getstate__(self) -> dict:
        own = (
            "ema_sources", "ema_targets", "apart", "copies", "scalings", "remainder", "impl", "ema_on_skip",
            "schedules", "_step_supports_amp_scaling",
        )  # fmt: skip
        return super().__getstate__() | {name: self.__dict__[name] for name in own if name in self.__dict__}

    def state_dict(self) -> dict:
        """As torch's; with schedules, each group also has "finished_steps"."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"] if self.schedules is not None else ():
            group["finished_steps"] = self.finished_steps
        return state_dict

    def load_state_dict(self, state_dict) -> None:
        """Loads as torch does, but keeps this optimizer's `fused` and similar options and the tensors that schedules
        fill, moves scalars to the device that those options require, and does not round moments to bfloat16 if the
        parameter has a remainder."""
        how = [{name: group[name] for name in HOW} for group in self.param_groups]
        for own, group in zip(how, self.param_groups, strict=True):
            filled = () if self.schedules is None else self.schedules.functions.keys() & {"lr", "weight_decay"}
            own.update((name, group[name]) for name in filled if isinstance(group[name], torch.Tensor))
        given: list[dict] = []  # the state dict after the pre-hooks
        hooks = (
            self.register_load_state_dict_pre_hook(lambda _, given_dict: given.append(given_dict)),
            self.register_load_state_dict_post_hook(lambda _: self._restore(how, given[0]), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _restore(self, how: list[dict], given: dict) -> None:
        self._plan = None
        finished = [group.pop("finished_steps", None) for group in self.param_groups]
        if self.schedules is not None:
            self.schedules.loaded(finished[0], given["state"])
        for group, own, saved in zip(self.param_groups, how, given["param_groups"], strict=True):
            group.update(own)
            on_device = group["fused"] or group["capturable"]
            for name in ("lr", "weight_decay"):
                if on_device and group["params"] and isinstance(group[name], torch.Tensor):
                    group[name] = group[name].to(group["params"][0].device, torch.float32)
            for p, i in zip(group["params"], saved["params"], strict=True):
                if not self.state.get(p):
                    continue
                state, saved_state = self.state[p], given["state"][i]
                state["step"] = state["step"].to(p.device if on_device else "cpu", torch.float32)
                state.pop("remainder", None)
                if self.remainder and p.dtype == torch.bfloat16:
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = saved_state[name].to(p.device, torch.float32, copy=True)
                    remainder = saved_state.get("remainder")
                    state["remainder"] = (
                        torch.zeros_like(p, dtype=torch.int16)
                        if remainder is None
                        else remainder.to(p.device, copy=True)
                    )
