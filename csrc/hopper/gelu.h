// The exact GELU, x Phi(x), and its derivative for epilogues: one polynomial and one exponential, as in
// kernels/ajepa_kernels/bias_gelu.py. A C++ compiler without CUDA compiles this file too; the tests run it on a CPU.
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define AJEPA_BOTH __host__ __device__ __forceinline__
#else
#define AJEPA_BOTH inline
#endif

namespace ajepa::hopper {

AJEPA_BOTH float exp2_approx(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// Phi(-a) for a >= 0, as 2^P(a). P minimises the largest error in Phi and in x Phi, which is 1.4e-8.
AJEPA_BOTH float normal_tail(float a) {
  float p = fmaf(-2.27586005e-06f, a, 3.29678748e-05f);
  p = fmaf(p, a, -1.57278103e-04f);
  p = fmaf(p, a, -2.02480618e-04f);
  p = fmaf(p, a, 7.14278409e-03f);
  p = fmaf(p, a, -5.25464377e-02f);
  p = fmaf(p, a, -4.59193057e-01f);
  p = fmaf(p, a, -1.15110694f);
  return exp2_approx(fmaf(p, a, -0.999999959f));
}

struct Gelu {
  float value, slope;
};

// x Phi(x) is max(x, 0) - |x| tail, and its derivative is s for x < 0, else 1 - s, with s = tail - |x| phi(x). A caller
// that uses one of the two leaves the compiler to drop the other.
AJEPA_BOTH Gelu gelu(float x) {
  const float a = fabsf(x), tail = normal_tail(a);
  // phi(x) = 2^(-x^2 / (2 ln 2)) / sqrt(2 pi); the factor is the exponent's addend
  const float density = exp2_approx(fmaf(-0.7213475204444817f * x, x, -1.3257480647361593f));
  const float s = fmaf(-a, density, tail);
  return {fmaf(-a, tail, fmaxf(x, 0.0f)), x < 0.0f ? s : 1.0f - s};
}

}  // namespace ajepa::hopper
