// Launches the CUDA log-mel kernels on the CPU as csrc/log_mel.cu does on a GPU. Tests call it through ctypes.
#include "cuda_on_host.h"

#include "log_mel_kernel.cuh"

using namespace ajepa;

template <int Points, class Sample>
static void run(const LogMel& p) {
  using S = Shape<Points>;
  const int chunks = (p.patches * p.patch_frames + kChunk - 1) / kChunk;
  cuda_on_host::launch(unsigned(p.batch * chunks), S::kBlock, size_t(shared_bytes(p, S::kTogether, S::kValues)),
                       [p] { log_mel_fwd_kernel<Points, Sample>(p); });
}

template <class Sample, class Sum>
static int run_all(const LogMel& p) {
  if (p.stats) cuda_on_host::launch(unsigned(p.batch), kStatsBlock, 0, [p] { log_mel_stats_kernel<Sample, Sum>(p); });
  if (p.peaks) std::memset(p.peaks, 0x80, size_t(p.batch) * sizeof(float));
  switch (p.n_fft) {
    case 128: run<128, Sample>(p); break;
    case 256: run<256, Sample>(p); break;
    case 400: run<400, Sample>(p); break;
    case 512: run<512, Sample>(p); break;
    case 640: run<640, Sample>(p); break;
    case 1024: run<1024, Sample>(p); break;
    case 1200: run<1200, Sample>(p); break;
    case 2048: run<2048, Sample>(p); break;
    case 4096: run<4096, Sample>(p); break;
    case 8192: run<8192, Sample>(p); break;
    default: return 1;
  }
  if (!p.peaks) return 0;
  const dim3 grid(2, unsigned(p.batch));
  if (p.dtype == Out::kFloat) cuda_on_host::launch(grid, 64, 0, [p] { log_mel_limit_kernel<float>(p); });
  else if (p.dtype == Out::kHalf) cuda_on_host::launch(grid, 64, 0, [p] { log_mel_limit_kernel<__half>(p); });
  else cuda_on_host::launch(grid, 64, 0, [p] { log_mel_limit_kernel<__nv_bfloat16>(p); });
  return 0;
}

extern "C" int log_mel_on_host(const LogMel* p) {
  return p->is_int16 ? run_all<int16_t, long long>(*p) : run_all<float, double>(*p);
}
