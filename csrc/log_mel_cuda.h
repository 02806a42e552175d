// The CUDA launcher.
#pragma once
#include "log_mel.h"

namespace ajepa {

// Launches on `stream` of the current device. Returns "" or an error message.
const char* log_mel_cuda(const LogMel& p, void* stream);

}  // namespace ajepa
