"""Operations for joint-embedding predictive architectures (I-JEPA, V-JEPA, LeJEPA) that replace lines of a model.

The package needs only torch, and imports without a GPU, a compiler or Triton. Beside every operation stands its plain
PyTorch definition, which runs wherever the kernel cannot.
"""

from ajepa_kernels.adamw_ema import AdamWEMA
from ajepa_kernels.attention import masked_attention, masked_attention_reference
from ajepa_kernels.attention.rotary import Rotary, axial_angles
from ajepa_kernels.augment_mel import MelViews, augment_mel, augment_mel_reference
from ajepa_kernels.bias_gelu import bias_gelu, bias_gelu_reference
from ajepa_kernels.ema_update import ema_update_, ema_update_reference_
from ajepa_kernels.fp8 import (
    Quantized,
    Scaling,
    advance_scales_,
    fp8_linear,
    fp8_linear_gelu,
    norm_quantize,
    norm_quantize_reference,
    quantize,
    quantize_reference,
)
from ajepa_kernels.latent_loss import latent_l2_loss, latent_l2_loss_reference
from ajepa_kernels.layer_norm import ResidualStream, add_layer_norm, add_layer_norm_reference
from ajepa_kernels.linear_residual import linear_residual, linear_residual_reference
from ajepa_kernels.log_mel import LOG_MEL_PRESETS, LogMel, LogMelSpec, log_mel, log_mel_reference
from ajepa_kernels.mlp import gelu_mlp, gelu_mlp_reference
from ajepa_kernels.modules import MLP, LinearGELU, SwiGLU
from ajepa_kernels.pre_norm import PreNormResidual
from ajepa_kernels.resample import Resampler, input_span, resample, resample_reference, resampled_length
from ajepa_kernels.segment_pool import segment_pool, segment_pool_reference
from ajepa_kernels.sigreg import sigreg, sigreg_reference
from ajepa_kernels.swiglu import swiglu, swiglu_reference
from ajepa_kernels.warmup import warmup

__version__ = "0.2.0"

__all__ = [
    "LOG_MEL_PRESETS",
    "MLP",
    "AdamWEMA",
    "LinearGELU",
    "LogMel",
    "LogMelSpec",
    "MelViews",
    "PreNormResidual",
    "Quantized",
    "Resampler",
    "ResidualStream",
    "Rotary",
    "Scaling",
    "SwiGLU",
    "add_layer_norm",
    "add_layer_norm_reference",
    "advance_scales_",
    "augment_mel",
    "augment_mel_reference",
    "axial_angles",
    "bias_gelu",
    "bias_gelu_reference",
    "ema_update_",
    "ema_update_reference_",
    "fp8_linear",
    "fp8_linear_gelu",
    "gelu_mlp",
    "gelu_mlp_reference",
    "input_span",
    "latent_l2_loss",
    "latent_l2_loss_reference",
    "linear_residual",
    "linear_residual_reference",
    "log_mel",
    "log_mel_reference",
    "masked_attention",
    "masked_attention_reference",
    "norm_quantize",
    "norm_quantize_reference",
    "quantize",
    "quantize_reference",
    "resample",
    "resample_reference",
    "resampled_length",
    "segment_pool",
    "segment_pool_reference",
    "sigreg",
    "sigreg_reference",
    "swiglu",
    "swiglu_reference",
    "warmup",
]
