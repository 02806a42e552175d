// The CPU kernel. It is compiled once for each instruction set.
#pragma once
#include "resample.h"

namespace ajepa::resample_cpu {

struct Kernel {
  int64_t (*scratch_floats)(const Resample&);  // scratch memory of one thread
  // Resamples these clips. `scratch` is aligned to 64 bytes.
  void (*run)(const Resample&, int64_t begin, int64_t end, float* scratch);
};

extern const Kernel kPortableKernel, kAvx2Kernel, kAvx512Kernel;

}  // namespace ajepa::resample_cpu
