// The CUDA launcher.
#pragma once
#include "resample.h"

namespace ajepa {

// Launches on `stream` of the current device. Returns "" or an error message.
const char* resample_cuda(const Resample& p, void* stream);

}  // namespace ajepa
