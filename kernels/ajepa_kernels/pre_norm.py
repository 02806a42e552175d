"""A pre-norm transformer block whose residual additions are fused with its norms, and which blocks it recognises."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from ajepa_kernels.layer_norm import add_layer_norm
from ajepa_kernels.modules import does_nothing


class _Argument(NamedTuple):
    """Stands for an argument of the block among those of a branch."""

    name: str


class _Half(NamedTuple):
    """stream + drop path(LayerScale(branch(norm(stream), *args, **kwargs))), by the names of the modules."""

    norm: str
    branch: str
    scale: str | None = None  # a module with a parameter `gamma`, or a parameter
    drops: tuple[str, ...] = ()
    args: tuple | None = None  # None: those that are given to the block, for the first half; none for the others
    kwargs: dict[str, Any] = {}  # noqa: RUF012 (never changed)

    @property
    def modules(self) -> tuple:
        return self[:4]


class _Pending(NamedTuple):
    """What a branch has computed and the stream lacks yet; the next norm adds it."""

    y: torch.Tensor
    layer_scale: torch.Tensor | None  # [C]
    sample_scale: torch.Tensor | None  # [B]


def _is_norm(module: Any) -> bool:
    """By name as well: a subclass may norm another axis, as channels-first norms do."""
    name = type(module).__name__
    known = (isinstance(module, nn.LayerNorm) and name == "LayerNorm") or name in ("RMSNorm", "RmsNorm")
    return known and hasattr(module, "eps") and hasattr(module, "weight") and len(module.normalized_shape) == 1


def _is_drop_path(module: Any) -> bool:
    return hasattr(module, "drop_prob") and not list(module.parameters())


def _is_layer_scale(module: Any) -> bool:
    names = [name for name, _ in module.named_parameters()]
    return type(module).__name__.endswith("LayerScale") and names == ["gamma"]


class PreNormResidual(nn.Module):
    """A pre-norm transformer block (arXiv 2002.04745) whose residual additions are fused with its norms.

    x = x + drop_path(layer_scale(branch(norm(x)))) for each half (norm, branch), usually attention and an MLP. From the
    second half on, the addition of the half before, its LayerScale (arXiv 2103.17239) and its drop path (arXiv
    1603.09382) are computed in the pass of the norm, by `add_layer_norm`; backward likewise.

    `PreNormResidual.of(block)` takes over a block of timm, I-JEPA, V-JEPA 2 and the like; `chain` runs blocks
    one after the other, so that the last addition of each is fused with the first norm of the next.

    Args:
        halves: two or more tuples (norm, branch), which a LayerScale (a module of a class of that name, with a
            parameter `gamma` `[C]`) and a drop path (a module with `drop_prob`, such as timm's) may follow. The norm is
            a `torch.nn.LayerNorm` or a `torch.nn.RMSNorm` over the last axis, affine or not. A branch returns a tensor
            of the shape of its input, or a tuple that begins with it.
        impl: of `add_layer_norm`.

    `forward(x, *args, **kwargs)` takes x `[..., C]` and returns a tensor of its shape. Further arguments go to the
    first branch, or, after `of`, where the block passes them. Under autocast, the result has the dtype that the plain
    block's has; the norms' results are in autocast's dtype, to which the plain ones are rounded by the linear layers
    that follow.

    Drop path draws the random numbers that the plain block draws: its module is called as before, for a tensor of ones
    `[B, 1, ...]`. Hooks of norms, LayerScales and additions do not run; those of the branches do.

    Saved for backward: as by `add_layer_norm`.

    Raises:
        ValueError: the modules are not such halves, or `of` does not recognise the block; the message says why.
        TypeError: `forward` gets an argument that the block does not have.

    Example::

        mlp = MLP(768, 3072, device="cuda")
        norms = [torch.nn.LayerNorm(768, device="cuda") for _ in range(2)]
        mixer = torch.nn.Linear(768, 768, device="cuda")  # in place of attention
        block = PreNormResidual((norms[0], mixer), (norms[1], mlp))
        x = block(torch.randn(8, 64, 768, device="cuda"))  # [8, 64, 768]
    """

    halves: list[_Half]
    impl: str
    # of the block's forward: the names of its arguments, their defaults, and those that must keep them
    _names: tuple[str, ...] = ()
    _defaults: dict[str, Any]
    _fixed: tuple[str, ...]

    def __init__(self, *halves: Iterable[nn.Module], impl: str = "auto") -> None:
        super().__init__()
        self.impl = impl
        self.halves = [self._half(str(i), *half) for i, half in enumerate(halves, 1)]
        _check_count(self.halves)

    def _half(self, number: str, *modules: nn.Module) -> _Half:
        if len(modules) < 2 or not _is_norm(modules[0]):
            raise ValueError(
                "PreNormResidual: a half is (norm, branch, ...), with a LayerNorm or RMSNorm over the last axis first; "
                f"got {', '.join(type(m).__name__ for m in modules)}"
            )
        names: dict[str, str] = {"norm": f"norm{number}", "branch": f"branch{number}"}
        for module in modules[2:]:
            role = "scale" if _is_layer_scale(module) else "drops" if _is_drop_path(module) else ""
            if role in names or not (role or does_nothing(module)):
                raise ValueError(
                    "PreNormResidual: one LayerScale with a parameter gamma and one drop path with a drop_prob may "
                    f"follow a branch, got {type(module).__name__}"
                )
            if role:
                names[role] = f"{'ls' if role == 'scale' else 'drop_path'}{number}"
                self.add_module(names[role], module)
        self.add_module(names["norm"], modules[0])
        self.add_module(names["branch"], modules[1])
        drops = (names["drops"],) if "drops" in names else ()
        return _Half(names["norm"], names["branch"], names.get("scale"), drops)

    @classmethod
    def of(cls, block: nn.Module, *, impl: str = "auto") -> PreNormResidual:
        """The same block with fused additions. It shares the block's modules, parameters and state-dict keys.

        The block's `forward` is followed symbolically (`torch.fx`), in training and in evaluation mode, without
        computing anything. It must be x + drop_path(layer_scale(branch(norm(x), ...))) for each half, whatever its
        modules are called; LayerScale may also be a parameter that is multiplied. An argument on which the structure
        depends must keep its default.

        Args:
            block: a block of one of the forms above.
            impl: of `add_layer_norm`.

        Raises:
            ValueError: `forward` cannot be followed, or is not of this form; the message names what is in the way.

        Example::

            class Block(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.norm1, self.norm2 = torch.nn.LayerNorm(64), torch.nn.LayerNorm(64)
                    self.attn, self.mlp = torch.nn.Linear(64, 64), MLP(64, 256)

                def forward(self, x):
                    x = x + self.attn(self.norm1(x))
                    return x + self.mlp(self.norm2(x))

            plain = Block()
            block = PreNormResidual.of(plain)
            x = torch.randn(2, 10, 64)
            assert torch.allclose(block(x), plain(x), atol=1e-5)
            assert block.state_dict().keys() == plain.state_dict().keys()
        """
        if isinstance(block, cls):
            return block
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.impl, self.training = impl, block.training
        parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
        self._names = tuple(p.name for p in parameters)
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self.halves, self._fixed = _follow(block, self._defaults)
        _check_count(self.halves)
        for own, given in ((self._modules, block._modules), (self._parameters, block._parameters)):
            own.update(given)  # type: ignore[arg-type]
        self._buffers.update(block._buffers)
        self._non_persistent_buffers_set.update(block._non_persistent_buffers_set)
        return self

    @staticmethod
    def chain(blocks: Iterable[nn.Module], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs the blocks one after the other, as `x = block(x, *args, **kwargs)` would, with one addition fewer each.

        Raises:
            ValueError: a block is no `PreNormResidual`.

        Example::

            blocks = [PreNormResidual(*((torch.nn.LayerNorm(64), MLP(64, 256)) for _ in range(2))) for _ in range(3)]
            x = PreNormResidual.chain(blocks, torch.randn(2, 10, 64))  # [2, 10, 64]
        """
        pending = None
        for block in blocks:
            if not isinstance(block, PreNormResidual):
                raise ValueError(
                    f"PreNormResidual.chain: {type(block).__name__} is no PreNormResidual; use PreNormResidual.of"
                )
            x, pending = block._run(x, pending, args, kwargs)
        return x if pending is None else _add(x, pending)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        stream, pending = self._run(x, None, args, kwargs)
        return _add(stream, pending)

    def _run(self, stream: Any, pending: _Pending | None, args: tuple, kwargs: dict) -> tuple[torch.Tensor, Any]:
        """Adds `pending` to the stream and runs all halves, of which the last remains to be added."""
        given = self._bind(stream, args, kwargs) if self._names else None
        for half in self.halves:
            normed, stream = self._norm(half.norm, stream, pending)
            if half.args is not None and given is not None:
                args = tuple(given[a.name] if isinstance(a, _Argument) else a for a in half.args)
                kwargs = {k: given[a.name] if isinstance(a, _Argument) else a for k, a in half.kwargs.items()}
            y = self._modules[half.branch](normed, *args, **kwargs)  # type: ignore[misc]
            args, kwargs = (), {}
            y = y[0] if isinstance(y, tuple) else y
            gamma: Any = None if half.scale is None else getattr(self, half.scale)
            gamma = gamma.gamma if isinstance(gamma, nn.Module) else gamma
            pending = _Pending(y, gamma, self._sample_scale(half.drops, y, gamma))
        return stream, pending

    def _bind(self, x: torch.Tensor, args: tuple, kwargs: dict) -> dict[str, Any]:
        """The arguments of the block by name."""
        if 1 + len(args) > len(self._names) or not kwargs.keys() <= set(self._names[1 + len(args) :]):
            raise TypeError(
                f"PreNormResidual: the block takes ({', '.join(self._names)}), "
                f"got {1 + len(args)} of them by position and {', '.join(kwargs) or 'none'} by name"
            )
        given = {**self._defaults, **dict(zip(self._names, (x, *args), strict=False)), **kwargs}
        for name in self._fixed:
            if given[name] is not self._defaults[name]:
                raise TypeError(f"PreNormResidual: {name} must keep its default {self._defaults[name]}")
        if len(given) < len(self._names):
            raise TypeError(f"PreNormResidual: missing {', '.join(n for n in self._names if n not in given)}")
        return given

    def _norm(self, name: str, stream: torch.Tensor, pending: _Pending | None) -> tuple[torch.Tensor, torch.Tensor]:
        norm: Any = self._modules[name]
        rms = not isinstance(norm, nn.LayerNorm)
        eps = norm.eps
        if eps is None:  # the default of torch.nn.RMSNorm: that of the dtype in which the norm is computed
            eps = torch.finfo(torch.promote_types(stream.dtype, torch.float32)).eps
        affine = norm.weight, None if rms else norm.bias
        if pending is None:
            return add_layer_norm(stream, None, *affine, eps, rms=rms, impl=self.impl)
        y, layer_scale, sample_scale = pending
        if not torch.is_autocast_enabled(y.device.type):  # the next layer takes the dtype of the stream
            y = y.to(torch.promote_types(y.dtype, stream.dtype))
        scales = {"layer_scale": layer_scale, "sample_scale": sample_scale}
        return add_layer_norm(y, stream, *affine, eps, rms=rms, **scales, impl=self.impl)

    def _sample_scale(self, drops: tuple[str, ...], y: torch.Tensor, gamma: torch.Tensor | None) -> torch.Tensor | None:
        factors = None
        for name in drops:
            drop: Any = self._modules[name]
            if drop.training and drop.drop_prob:
                if factors is None:
                    dtype = y.dtype if gamma is None else torch.promote_types(y.dtype, gamma.dtype)
                    factors = y.new_ones((len(y),) + (1,) * (y.dim() - 1), dtype=dtype)
                factors = drop(factors)
        return None if factors is None else factors.flatten()


def _check_count(halves: list[_Half]) -> None:
    if len(halves) < 2:
        raise ValueError(f"PreNormResidual: two or more halves (norm, branch) are needed, got {len(halves)}")


def _add(stream: torch.Tensor, pending: _Pending) -> torch.Tensor:
    y, layer_scale, sample_scale = pending
    if sample_scale is not None:
        factors = sample_scale.view(-1, *[1] * (y.dim() - 1))
        return torch.addcmul(stream, y, factors if layer_scale is None else factors * layer_scale)
    return stream + y if layer_scale is None else torch.addcmul(stream, y, layer_scale)


# --- how a block is recognised ----------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


class _NotSuchABlock(Exception):
    pass


def _follow(block: nn.Module, defaults: dict[str, Any]) -> tuple[list[_Half], tuple[str, ...]]:
    """The halves of the block, and the arguments that must keep their defaults.

    With all arguments at their defaults, the block must have the same halves in training and evaluation mode. As many
    arguments as possible are then left open, which go where the block passes them.
    """
    training = block.training
    try:
        found = []
        for block.training in (False, True):
            found.append(_halves(block, defaults))
        if [half.modules for half in found[0]] != [half.modules for half in found[1]]:
            raise _NotSuchABlock("it differs between training and evaluation mode")
    except Exception as error:
        reason = str(error) if isinstance(error, _NotSuchABlock) else f"it cannot be followed: {error}"
        raise ValueError(
            f"PreNormResidual.of: {type(block).__name__}.forward is not x + branch(norm(x)) for each half: {reason}"
        ) from error
    finally:
        block.training = training
    options = {name: value for name, value in defaults.items() if value is not None}
    for fixed in ({}, options):
        try:
            halves = _halves(block, fixed)
        except Exception:  # the structure depends on an argument
            continue
        if [half.modules for half in halves] == [half.modules for half in found[0]]:
            return halves, tuple(fixed)
    return found[0], tuple(defaults)


def _halves(block: nn.Module, fixed: dict[str, Any]) -> list[_Half]:
    graph = _Tracer().trace(block, concrete_args=fixed or None)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    node = next(node for node in graph.nodes if node.op == "output").args[0]
    halves: list[_Half] = []
    used: list[fx.Node] = []
    while node is not placeholders[0]:
        if not isinstance(node, fx.Node) or node.target not in (operator.add, operator.iadd, torch.add, "add", "add_"):
            raise _NotSuchABlock(f"{_describe(block, node)} is not a sum of the stream and a branch")
        reasons = []
        for stream, y in (node.args, node.args[::-1]):
            try:
                half, nodes = _half_of(block, stream, y)
                break
            except _NotSuchABlock as reason:
                reasons.append(str(reason))
        else:
            raise _NotSuchABlock(reasons[0])
        halves.insert(0, half)
        used += nodes
        node = stream
    for node in graph.nodes:
        if node.op == "call_module" and node not in used:
            raise _NotSuchABlock(f"{_describe(block, node)} is in no half")
    return halves


def _half_of(block: nn.Module, stream: Any, node: Any) -> tuple[_Half, list[fx.Node]]:
    """The half whose sum has these operands, and the nodes of its modules."""
    scale, drops, used = None, [], []
    while isinstance(node, fx.Node):
        operands: dict[str, fx.Node] = {operand.op: operand for operand in node.all_input_nodes}
        if node.target is operator.mul and "get_attr" in operands:
            name = str(operands.pop("get_attr").target)
            if scale is not None or not operands or block._parameters[name].dim() != 1:  # type: ignore[union-attr]
                raise _NotSuchABlock(f"{name} is no LayerScale [C]")
            scale, node = name, next(iter(operands.values()))
            continue
        if node.target is operator.getitem and node.args[1] == 0:
            node = node.args[0]
            continue
        if node.op != "call_module" or node.target not in block._modules:
            break
        used.append(node)
        module, name = block._modules[node.target], str(node.target)
        if _is_drop_path(module):
            drops.append(name)
        elif _is_layer_scale(module) and scale is None:
            scale = name
        elif not does_nothing(module):
            break
        node = node.args[0]
    norm = node.args[0] if isinstance(node, fx.Node) and node.op == "call_module" and node.args else None
    if not isinstance(norm, fx.Node) or norm.op != "call_module" or norm.args != (stream,) or norm.kwargs:
        raise _NotSuchABlock(f"{_describe(block, node)} is no branch of a norm of the stream")
    if norm.target not in block._modules or not _is_norm(block._modules[str(norm.target)]):
        raise _NotSuchABlock(f"{_describe(block, norm)} is no LayerNorm or RMSNorm over the last axis")
    half = _Half(str(norm.target), str(node.target), scale, tuple(reversed(drops)))
    args, kwargs = fx.node.map_arg((node.args[1:], node.kwargs), _argument)
    return half._replace(args=tuple(args), kwargs=dict(kwargs)), [*used, norm]


def _argument(node: fx.Node) -> Any:
    if node.op != "placeholder" or str(node.target).startswith("*"):
        raise _NotSuchABlock(f"a branch takes {node.name}, which the block computes")
    return _Argument(str(node.target))


def _describe(block: nn.Module, node: Any) -> str:
    if not isinstance(node, fx.Node):
        return repr(node)
    if node.op == "call_module":
        return f"{node.target} ({type(block.get_submodule(str(node.target))).__name__})"
    return node.name
