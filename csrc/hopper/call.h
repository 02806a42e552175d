// The arguments of a product. kernels/ajepa_kernels/_hopper.py declares the same struct.
#pragma once

namespace ajepa::hopper {

// Matrices are row-major and contiguous; bf16 where no other type is named.
struct Call {
  int m, n, k;
  const void *x, *weight, *bias;  // [m, k]; [n, k], or [k, n] for a product with the next layer's weight; [n]
  const void* source;             // [m, n], added or multiplied in the epilogue; float32 in linear_residual
  void* result;                   // [m, n]; float32 in linear_residual
  void* kept;                     // [m, n]
  float* partial;                 // [4 ceil(m / 128), n]
};

}  // namespace ajepa::hopper
