"""AdamW and the exponential moving average of the target encoder, as one update of every parameter in one launch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.optim.adam import adam
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ajepa_kernels._adamw_ema import Rows, launch_adamw_ema, launch_rows, updated_together
from ajepa_kernels._tables import unsupported
from ajepa_kernels._triton import check_impl, register, use_triton
from ajepa_kernels.ema_update import checked_decay, ema_update_reference_, scalar

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]
HOW = ("fused", "foreach", "capturable", "differentiable")  # of a group: how its step is computed, not what


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
    """torch's fused AdamW, which torch.compile does not trace, as one operation."""
    tensors = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    adam(
        *tensors, amsgrad=amsgrad, beta1=beta1, beta2=beta2, lr=lr if lr_tensor is None else lr_tensor,
        weight_decay=weight_decay, eps=eps, maximize=maximize, fused=True, grad_scale=grad_scale,
        found_inf=found_inf, decoupled_weight_decay=True,
    )  # fmt: skip
    for mutated in tensors:
        torch.autograd.graph.increment_version(mutated)


class _Tensors(NamedTuple):
    """What a step updates. The first `len(grads)` parameters have a gradient, group after group."""

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
    places: list  # five numbers for each parameter, as `_adamw_ema` takes them


def join_remainder(param: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The float32 values that a bfloat16 tensor and its int16 remainder hold between them."""
    return ((param.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def split_remainder(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 as the nearest bfloat16 (halves away from zero) and the int16 that `join_remainder` needs.

    Of a NaN the upper half, made quiet, and zero: rounded, it might be carried past the largest number, to -0.
    """
    bits, nan = value.view(torch.int32), value.isnan()
    high = torch.where(nan, (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
    low = (bits - (high << 16)).masked_fill(nan, 0)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def _together(t: _Tensors) -> list[tuple[torch.Tensor | None, ...]]:
    return updated_together(
        t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, t.remainders, t.emas, t.copies, t.ema_copies, t.places
    )


class _Plan(NamedTuple):
    """What a step launches."""

    kinds: dict[tuple, Rows]
    facts: list  # what `kinds` follows from: addresses rather than tensors, so that nothing outlives its owner
    grads: list[int]  # addresses, which `kinds` leaves out
    written: list[torch.Tensor]


def _like(p: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """`grad` in the dtype and memory order of `p`: torch's fused step on a GPU takes no other."""
    return grad.to(p.dtype) if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)


def _tensor_or_number(x: float | torch.Tensor | None) -> tuple[torch.Tensor | None, float]:
    return (x, 0.0) if isinstance(x, torch.Tensor) else (None, x or 0.0)


class AdamWEMA(torch.optim.AdamW):
    """`torch.optim.AdamW` that also moves an EMA copy of its parameters and writes low-precision copies, in one launch.

    p <- p (1 - lr weight_decay) - lr m^ / (sqrt(v^) + eps), where m and v average grad / grad_scale (arXiv 1711.05101);
    ema <- ema_decay ema + (1 - ema_decay) p. Param groups, hooks and closures are torch's. The state dict is AdamW's:
    either loads the other's, and `fused`, `foreach`, `capturable` and `differentiable` stay as they were here.

    `torch.compile(fullgraph=True)` takes a function that calls `step`. Let the learning rate be a tensor there: each
    new number would be compiled anew.

    On a GPU all parameters of equal dtypes are updated by one kernel, in float32, whatever the order of their axes in
    memory, where it is that of all that goes with them. The learning rate, `ema_decay`, `grad_scale`, `found_inf` and a
    group's weight decay may be scalars on the device, which a captured CUDA graph reads again at each replay; numbers
    are frozen into the graph. Addresses that the capture is the first to see are copied to the device at each replay.
    The kernel leaves `.grad` as it was; torch's fused AdamW divides it by the scale.

    Args:
        params: parameters or groups, as for `torch.optim.AdamW`.
        ema: pairs (parameter, its EMA tensor). Parameters without a pair have no average; pairs whose parameter has no
            gradient are averaged all the same.
        copies: pairs (parameter or EMA tensor, low-precision tensor of its shape) that each step writes.
        remainder: keep bfloat16 parameters to float32 precision by 16 more bits in the state ("remainder"), beside
            moments in float32. Without it, and in AdamW, such a state dict loads rounded; AdamW's loads with remainders
            of zero.
        impl: "auto" (Triton on a GPU where it can, aloud once where it cannot), "triton" or "reference".
        **kwargs: AdamW's own. `fused=True` is the default, and what the kernel stands in for.

    Raises:
        ValueError: pairs or options that cannot be, or AdamW's own reasons.

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

    _plan: _Plan | None = None  # of the last step, without its tensors

    def __init__(self, params, ema: Pairs = (), copies: Pairs = (), *, remainder=False, impl="auto", **kwargs):
        check_impl("AdamWEMA", impl)
        super().__init__(params, **{"fused": True, **kwargs})
        self.ema_sources: list[torch.Tensor] = []
        self.ema_targets: list[torch.Tensor] = []
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.remainder, self.impl = remainder, impl
        self.add_pairs(ema, copies)

    def add_pairs(self, ema: Pairs = (), copies: Pairs = ()) -> None:
        """Averages and copies beside those there are, as of a group that was added. Raises what `AdamWEMA` does."""
        ema, copies = [*zip(self.ema_sources, self.ema_targets, strict=True), *ema], [*self.copies, *copies]
        for source, target in ema + copies:
            if source.shape != target.shape or source.device != target.device:
                raise ValueError("AdamWEMA: the tensors of a pair must have equal shapes and devices")
            if source is target or not target.is_floating_point():
                raise ValueError("AdamWEMA: an average or a copy must be another tensor, of floating-point numbers")
        for pairs in (ema, copies):
            if len({source for source, _ in pairs}) < len(pairs):
                raise ValueError("AdamWEMA: a tensor has two averages or two copies")
        if len({target for _, target in ema + copies}) < len(ema + copies):
            raise ValueError("AdamWEMA: two pairs write one tensor")
        self.ema_sources, self.ema_targets = [p for p, _ in ema], [t for _, t in ema]
        self.copies = copies

    @torch.no_grad()
    def step(
        self,
        closure=None,
        *,
        ema_decay: float | torch.Tensor | None = None,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ):
        """One update. Gradients are divided by `grad_scale`; where `found_inf` is 1 nothing changes (both scalars).

        Without `ema_decay` the averages stay as they are. What a `GradScaler` brings comes on top: scales multiply.
        ValueError, before anything changes: a decay outside [0, 1], no scalar, or one on another device.
        """
        ema_decay, grad_scale, found_inf = self._scalars(ema_decay, grad_scale, found_inf)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # a dispatch mode is to see the operation
        eager = not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None
        with_ema = ema_decay is not None
        plan = self._recall(with_ema) if eager else None
        if plan is None:
            tensors = _Tensors(*([] for _ in _Tensors._fields))
            self._init_group(with_ema, *tensors)
            if not tensors.params:
                return loss
            together = _together(tensors)
            if not use_triton("AdamWEMA", self.impl, tensors.params[0], self._unsupported(tensors, together)):
                self._step_reference(tensors, ema_decay, grad_scale, found_inf)
                return loss
            if not eager:
                self._step_operation(tensors, ema_decay, grad_scale, found_inf)
                return loss
            rates, groups, _ = self._rates()
            plan = _Plan(launch_rows(together, tensors.steps, rates, tensors.places, groups), *self._found(with_ema))
            self._plan = plan._replace(grads=[], written=[])
        decay = _tensor_or_number(ema_decay)
        launch_adamw_ema(plan.kinds, plan.grads, plan.written[0], self._rates()[2], grad_scale, found_inf, *decay)
        torch.autograd.graph.increment_version(plan.written)
        return loss

    def _scalars(self, ema_decay, grad_scale, found_inf):
        """The arguments of a step, checked, with what GradScaler hands over as attributes."""
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
        """Fills the lists of `_Tensors` for all groups, creating what state is missing.

        Named as torch's, because torch.compile runs the method of that name, instead of tracing it, and makes inputs of
        the graph of the tensors that it put into the lists.
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
        copies, averages = dict(self.copies), set(self.ema_targets)
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
            t.places.extend([
                place(t.remainders, self.state.get(p, {}).get("remainder")),
                place(t.emas, average),
                place(t.copies, copies.get(p)),
                place(t.ema_copies, None if average is None else copies.get(average)),
                groups.get(p, 0),
            ])  # fmt: skip

    # --- plain definition ---

    def _step_reference(self, t: _Tensors, ema_decay, grad_scale, found_inf) -> None:
        if not (grad_scale is None and found_inf is None) and not all(group["fused"] for group in self.param_groups):
            raise ValueError("AdamWEMA: grad_scale and found_inf need fused=True")
        # float32 values of the parameters that have a remainder
        remainders = [t.remainders[i] if i >= 0 else None for i in t.places[0::5]]
        values = [p if r is None else join_remainder(p, r) for p, r in zip(t.params, remainders, strict=True)]
        groups, end, end_max = t.places[4::5][: len(t.grads)], 0, 0
        for i, group in enumerate(self.param_groups):
            start, end = end, end + groups.count(i)
            start_max, end_max = end_max, end_max + group["amsgrad"] * groups.count(i)
            if start == end:
                continue
            params, lr, weight_decay = values[start:end], group["lr"], group["weight_decay"]
            if isinstance(weight_decay, torch.Tensor):  # without reading it back
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
            if found_inf is not None:
                ema_decay = torch.where(found_inf > 0, 1.0, ema_decay)
            ema_update_reference_(t.emas, [p for p, i in zip(values, t.places[1::5], strict=True) if i >= 0], ema_decay)
        sources = [p for p, i in zip(values, t.places[2::5], strict=True) if i >= 0]
        sources += [t.emas[i] for i, copy in zip(t.places[1::5], t.places[3::5], strict=True) if copy >= 0]
        if sources:
            torch._foreach_copy_([*t.copies, *t.ema_copies], sources)

    # --- one launch ---

    def _unsupported(self, t: _Tensors, together: list) -> str:
        for group in self.param_groups:
            if group["amsgrad"] or group["differentiable"] or not (group["fused"] or group["capturable"]):
                return "no kernel for amsgrad, differentiable or fused=False"
            if any(isinstance(beta, torch.Tensor) for beta in group["betas"]):
                return "no kernel for betas that are tensors"
            for rate in (group["lr"], group["weight_decay"]):
                if isinstance(rate, torch.Tensor) and (rate.dtype, rate.device) != (torch.float32, t.params[0].device):
                    return "learning rates and weight decays that are tensors must be float32 beside the parameters"
        if any((step.dtype, step.device) != (torch.float32, t.params[0].device) for step in t.steps):
            return "step counts must be float32 beside the parameters"
        return unsupported(together)

    def _rates(self) -> tuple[list[torch.Tensor], list[int], list[float]]:
        """rates, groups and hyper, as the operation takes them."""
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
            rates, t.places, groups, hyper, grad_scale, found_inf, *_tensor_or_number(ema_decay),
        )  # fmt: skip

    # --- one launch as the last, for a quarter of the host's time ---

    def _recall(self, with_ema: bool) -> _Plan | None:
        """The last step's plan with this step's gradients, where it would be made again."""
        if self._plan is None:
            return None
        try:
            plan = _Plan(self._plan.kinds, *self._found(with_ema))
        except (KeyError, RuntimeError):  # a state is yet to be made, or a gradient has no memory
            return None
        return plan if plan.facts == self._plan.facts else None

    def _found(self, with_ema: bool) -> tuple[list, list[int], list[torch.Tensor]]:
        """facts, grads and written of the plan of a step."""
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
        own = ("ema_sources", "ema_targets", "copies", "remainder", "impl", "_step_supports_amp_scaling")
        return super().__getstate__() | {name: self.__dict__[name] for name in own if name in self.__dict__}

    def load_state_dict(self, state_dict) -> None:
        """torch's, but how a step is computed stays as it is (`fused` and the like), what it reads goes where that
        needs it, and moments beside a remainder are not rounded to the parameter's bfloat16."""
        how = [{name: group[name] for name in HOW} for group in self.param_groups]
        given: list[dict] = []  # what the pre-hooks made of it
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
