"""The MLPs of a transformer block as `torch.nn.Module`s. State dicts are those of the modules that they replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ajepa_kernels.bias_gelu import bias_gelu
from ajepa_kernels.mlp import gelu_mlp, linear_gelu
from ajepa_kernels.swiglu import swiglu


def does_nothing(module: Any) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _act(op: str, layer: Callable[[], nn.Module], kind: type[nn.Module]) -> Any:
    act = layer()
    if type(act) is not kind:
        raise ValueError(f"{op}: act_layer must make a torch.nn.{kind.__name__}, got {type(act).__name__}")
    return act


def _share(op: str, module: nn.Module, layers: tuple[str, ...], kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """The named children of an MLP that the fused one takes over; ValueError where it computes something else."""
    children = dict(module.named_children())
    for name in layers:
        layer = children.pop(name, None)
        if not isinstance(layer, nn.Linear) or layer.bias is None:
            raise ValueError(f"{op}.of: {type(module).__name__} has no {name} that is a torch.nn.Linear with a bias")
        yield name, layer
    act = children.pop("act", None)
    if type(act) is not kind:
        raise ValueError(f"{op}.of: {type(module).__name__}.act must be a torch.nn.{kind.__name__}")
    yield "act", act
    for name, child in children.items():
        if not does_nothing(child):
            raise ValueError(f"{op}.of: {name} ({type(child).__name__}) is not supported, only dropout of 0")


class LinearGELU(nn.Linear):
    """gelu(x weight^T + bias): a `torch.nn.Linear` and the GELU after it (arXiv 1606.08415).

    Its state dict is that of `torch.nn.Linear`. On a Hopper GPU, bias and exact GELU are the epilogue of the product,
    as in `gelu_mlp`. Elsewhere `bias_gelu` computes them. Backward computes the gradients of the product and of the
    bias in one pass.

    Args:
        in_features, out_features, device, dtype: as in `torch.nn.Linear`.
        approximate: "none" or "tanh", as in `torch.nn.GELU`.
        impl: "auto" fuses the product on a Hopper GPU in bfloat16, where the compiled products are there, and runs
            `bias_gelu` elsewhere. "fused" requires that, and on a CPU runs its steps as plain products. "triton" and
            "reference" are those of `bias_gelu`.

    `forward` takes `[..., in_features]` and returns `[..., out_features]`, in x's dtype or, under autocast, autocast's.
    Saved for backward: x, the weight, and the product, if fused with its bias.

    Raises:
        ValueError: `approximate` or `impl` is invalid, or the product cannot be fused.

    Example::

        layer = LinearGELU(768, 3072, device="cuda")
        y = layer(torch.randn(8, 64, 768, device="cuda"))  # [8, 64, 3072]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        approximate: str = "none",
        impl: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.approximate, self.impl = approximate, impl

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_gelu(x, self.weight, self.bias, self.approximate, self.impl)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, approximate={self.approximate!r}"


class MLP(nn.Module):
    """fc2(gelu(fc1(x))): the MLP of a transformer block, by `gelu_mlp`. State dicts of timm's, I-JEPA's and V-JEPA 2's
    fit.

    Args:
        in_features: C.
        hidden_features: I; None means C.
        out_features: C'; None means C.
        act_layer: makes a `torch.nn.GELU`, exact or "tanh". With "tanh", `bias_gelu` computes it between two products.
        drop: must be 0.
        impl: of `gelu_mlp`; with "tanh", of `bias_gelu`.
        device, dtype: of the parameters.

    `forward` takes `[..., C]` and returns `[..., C']`. `MLP.of(mlp)` shares the layers of such a module.

    Raises:
        ValueError: there is dropout or another activation.

    Example::

        mlp = MLP(768, 3072, device="cuda")
        y = mlp(torch.randn(8, 64, 768, device="cuda"))  # [8, 64, 768]
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        *,
        impl: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if drop:
            raise ValueError(f"MLP: dropout is not supported, got drop={drop}")
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features, device=device, dtype=dtype)
        self.act = _act("MLP", act_layer, nn.GELU)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, device=device, dtype=dtype)
        self.impl = impl

    @classmethod
    def of(cls, mlp: nn.Module, *, impl: str = "auto") -> MLP:
        """An MLP that shares fc1 and fc2 of a module with these layers and `act`, a `torch.nn.GELU`.

        Raises:
            ValueError: the module has other layers, or dropout.

        Example::

            plain = torch.nn.Module()
            plain.fc1, plain.act, plain.fc2 = torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)
            mlp = MLP.of(plain)
            assert mlp.fc1 is plain.fc1
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        for name, layer in _share("MLP", mlp, ("fc1", "fc2"), nn.GELU):
            self.add_module(name, layer)
        self.impl, self.training = impl, mlp.training
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if self.act.approximate == "none":
            return gelu_mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, impl=self.impl)
        return fc2(bias_gelu(F.linear(x, fc1.weight), fc1.bias, approximate=self.act.approximate, impl=self.impl))


class SwiGLU(nn.Module):
    """fc3(silu(fc1(x)) * fc2(x)): the SwiGLU MLP (arXiv 2002.05202), by `swiglu`. State dicts of V-JEPA 2's
    `SwiGLUFFN` fit.

    Args:
        in_features: C.
        hidden_features: I; None means C.
        out_features: C'; None means C.
        act_layer: makes a `torch.nn.SiLU`.
        drop: must be 0.
        wide_silu: makes the inner width 2 I / 3, rounded up to a multiple of 8, so that the module has about as many
            parameters as an MLP of inner width I.
        impl: of `swiglu`.
        device, dtype: of the parameters.

    `forward` takes `[..., C]` and returns `[..., C']`. `SwiGLU.of(ffn)` shares the layers of such a module.

    Raises:
        ValueError: there is dropout or another activation.

    Example::

        mlp = SwiGLU(768, 3072, device="cuda")  # inner width 2,048
        y = mlp(torch.randn(8, 64, 768, device="cuda"))  # [8, 64, 768]
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        drop: float = 0.0,
        wide_silu: bool = True,
        *,
        impl: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if drop:
            raise ValueError(f"SwiGLU: dropout is not supported, got drop={drop}")
        hidden_features = hidden_features or in_features
        if wide_silu:
            hidden_features = -(-(2 * hidden_features // 3) // 8) * 8
        self.fc1 = nn.Linear(in_features, hidden_features, device=device, dtype=dtype)
        self.fc2 = nn.Linear(in_features, hidden_features, device=device, dtype=dtype)
        self.act = _act("SwiGLU", act_layer, nn.SiLU)
        self.fc3 = nn.Linear(hidden_features, out_features or in_features, device=device, dtype=dtype)
        self.impl = impl

    @classmethod
    def of(cls, ffn: nn.Module, *, impl: str = "auto") -> SwiGLU:
        """A SwiGLU that shares fc1, fc2 and fc3 of a module with these layers and `act`, a `torch.nn.SiLU`.

        Raises:
            ValueError: the module has other layers, or dropout.

        Example::

            mlp = SwiGLU.of(SwiGLU(64, 256))
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        for name, layer in _share("SwiGLU", ffn, ("fc1", "fc2", "fc3"), nn.SiLU):
            self.add_module(name, layer)
        self.impl, self.training = impl, ffn.training
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = F.linear(x, self.fc1.weight), F.linear(x, self.fc2.weight)
        return self.fc3(swiglu(gate, value, self.fc1.bias, self.fc2.bias, impl=self.impl))
