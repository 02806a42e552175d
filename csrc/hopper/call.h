// The arguments of a product. kernels/ajepa_kernels/_hopper.py declares the same struct.
#pragma once

namespace ajepa::hopper {

// Matrices are row-major and contiguous; bf16 where no other type is named. x and weight are e4m3 in linear_gelu_fp8.
struct Call {
  int m, n, k;
  const void *x, *weight, *bias;  // [m, k]; [n, k], or [k, n] for a product with the next layer's weight; [n]
  const void* source;             // [m, n], added or multiplied in the epilogue; float32 in linear_residual
  void* result;                   // [m, n]; float32 in linear_residual, e4m3 in linear_gelu_fp8
  void* kept;                     // [m, n]
  float* partial;                 // [4 ceil(m / 128), n]
  // Scalars of linear_gelu_fp8. The operands and the result are their values times a scale. `largest` is raised to the
  // largest magnitude of the result, as it is before it is rounded; null if nobody asks.
  const float *x_scale, *weight_scale, *result_scale;
  float* largest;
};

}  // namespace ajepa::hopper
