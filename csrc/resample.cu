// Launches the resampling kernels. This file includes no torch header: ops.cpp checks the arguments, allocates memory
// and finds the stream.
#include "resample_cuda.h"
#include "resample_kernel.cuh"

namespace ajepa {
namespace {

constexpr int kSharing = 4;  // outputs of one thread, which share their taps

template <class Sample, class Result, int kParts, bool Interpolated>
cudaError_t launch(const Resample& p, cudaStream_t stream) {
  const ResampleGrid grid = resample_grid(p, kParts);
  const int64_t blocks = grid.blocks(p);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const size_t bytes = size_t(grid.staged) * kParts * sizeof(float);
  if (grid.staged)
    resample_fwd_kernel<Sample, Result, kParts, Interpolated, true><<<unsigned(blocks), kRun, bytes, stream>>>(p, grid);
  else
    resample_fwd_kernel<Sample, Result, kParts, Interpolated, false><<<unsigned(blocks), kRun, 0, stream>>>(p, grid);
  return cudaGetLastError();
}

template <class Sample, class Result>
cudaError_t launch_all(const Resample& p, cudaStream_t stream) {
  if (p.up == p.down) {
    const int64_t blocks = (p.count + kRun - 1) / kRun;
    if (p.batch > INT32_MAX / blocks) return cudaErrorInvalidConfiguration;
    resample_convert_kernel<Sample, Result><<<unsigned(p.batch * blocks), kRun, 0, stream>>>(p, blocks);
    return cudaGetLastError();
  }
  if (p.interpolated) return launch<Sample, Result, 1, true>(p, stream);
  return launch<Sample, Result, kSharing, false>(p, stream);
}

}  // namespace

const char* resample_cuda(const Resample& p, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = p.pcm_int16   ? p.out_int16 ? launch_all<int16_t, int16_t>(p, cuda_stream)
                                                        : launch_all<int16_t, float>(p, cuda_stream)
                            : p.out_int16 ? launch_all<float, int16_t>(p, cuda_stream)
                                          : launch_all<float, float>(p, cuda_stream);
  return error ? cudaGetErrorString(error) : "";
}

}  // namespace ajepa
