"""Drop-in operations for joint-embedding predictive architectures. It needs only torch, and imports without a GPU."""

from ajepa_kernels.adamw_ema import AdamWEMA
from ajepa_kernels.attention import masked_attention, masked_attention_reference
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
from ajepa_kernels.resample import Resampler, input_span, resample, resample_reference, resampled_length
from ajepa_kernels.segment_pool import segment_pool, segment_pool_reference
from ajepa_kernels.sigreg import sigreg, sigreg_reference
from ajepa_kernels.warmup import warmup

__all__ = [
    "LOG_MEL_PRESETS",
    "AdamWEMA",
    "LogMel",
    "LogMelSpec",
    "MelViews",
    "Quantized",
    "Resampler",
    "ResidualStream",
    "Scaling",
    "add_layer_norm",
    "add_layer_norm_reference",
    "advance_scales_",
    "augment_mel",
    "augment_mel_reference",
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
    "warmup",
]
