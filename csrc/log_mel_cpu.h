// The CPU kernel. It is compiled once for each instruction set.
#pragma once
#include "log_mel.h"

namespace ajepa {

struct CpuKernel {
  int lanes;                                                   // frames that are computed in parallel
  int64_t (*scratch_floats)(const LogMel&);                    // scratch memory of one thread
  void (*clip_stats)(const LogMel&, int64_t begin, int64_t end);  // fills `stats` for these clips
  // An item is clip * groups + group, where a group is `lanes` frames. `scratch` is aligned to 64 bytes.
  void (*run)(const LogMel&, int64_t begin, int64_t end, float* scratch);
};

extern const CpuKernel kPortableKernel, kAvx2Kernel, kAvx512Kernel;

}  // namespace ajepa
