// Launches the log-mel kernels. This file includes no torch header: ops.cpp checks the arguments, allocates memory and
// finds the stream.
#include "log_mel_cuda.h"
#include "log_mel_kernel.cuh"

namespace ajepa {
namespace {

template <int Points, class Sample>
cudaError_t launch(const LogMel& p, cudaStream_t stream) {
  using S = Shape<Points>;
  const int64_t chunks = (int64_t(p.patches) * p.patch_frames + kChunk - 1) / kChunk;
  const int64_t bytes = shared_bytes(p, S::kTogether, S::kValues);
  const auto kernel = log_mel_fwd_kernel<Points, Sample>;
  // Set even below 48 KB of dynamic shared memory, because static shared memory counts towards that limit as well.
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)))
    return error;
  kernel<<<unsigned(p.batch * chunks), S::kBlock, size_t(bytes), stream>>>(p);
  return cudaGetLastError();
}

template <class Sample, class Sum>
cudaError_t launch_all(const LogMel& p, cudaStream_t stream) {
  if (p.stats) log_mel_stats_kernel<Sample, Sum><<<unsigned(p.batch), kStatsBlock, 0, stream>>>(p);
  if (p.peaks)  // an initial value below every key of `ordered`
    if (const cudaError_t error = cudaMemsetAsync(p.peaks, 0x80, size_t(p.batch) * sizeof(float), stream)) return error;
  cudaError_t error = cudaErrorInvalidValue;
  switch (p.n_fft) {
    case 128: error = launch<128, Sample>(p, stream); break;
    case 256: error = launch<256, Sample>(p, stream); break;
    case 400: error = launch<400, Sample>(p, stream); break;
    case 512: error = launch<512, Sample>(p, stream); break;
    case 640: error = launch<640, Sample>(p, stream); break;
    case 1024: error = launch<1024, Sample>(p, stream); break;
    case 1200: error = launch<1200, Sample>(p, stream); break;
    case 2048: error = launch<2048, Sample>(p, stream); break;
    case 4096: error = launch<4096, Sample>(p, stream); break;
    case 8192: error = launch<8192, Sample>(p, stream); break;
  }
  if (error || !p.peaks) return error;
  const dim3 grid(8, unsigned(p.batch));
  if (p.dtype == Out::kFloat) log_mel_limit_kernel<float><<<grid, 256, 0, stream>>>(p);
  else if (p.dtype == Out::kHalf) log_mel_limit_kernel<__half><<<grid, 256, 0, stream>>>(p);
  else log_mel_limit_kernel<__nv_bfloat16><<<grid, 256, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

const char* log_mel_cuda(const LogMel& p, void* stream) {
  const cudaError_t error = p.is_int16 ? launch_all<int16_t, long long>(p, static_cast<cudaStream_t>(stream))
                                       : launch_all<float, double>(p, static_cast<cudaStream_t>(stream));
  return error ? cudaGetErrorString(error) : "";
}

}  // namespace ajepa
