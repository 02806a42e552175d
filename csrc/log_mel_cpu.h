// The CPU kernel, compiled once for each instruction set it can use.
#pragma once
#include "log_mel.h"

namespace ajepa {

struct CpuKernel {
  int lanes;                                                   // frames computed side by side
  int64_t (*scratch_floats)(const LogMel&);                    // of one thread
  void (*clip_stats)(const LogMel&, int64_t begin, int64_t end);  // fills stats of these clips
  // Item = clip * groups + group of `lanes` frames; scratch is aligned to 64 bytes.
  void (*run)(const LogMel&, int64_t begin, int64_t end, float* scratch);
};

extern const CpuKernel kPortableKernel, kAvx2Kernel, kAvx512Kernel;

}  // namespace ajepa
