// Launches the CUDA resampling kernels on the CPU as csrc/resample.cu does on a GPU. Tests call it through ctypes.
#include "cuda_on_host.h"

#include "resample_kernel.cuh"

using namespace ajepa;

template <class Sample, class Result, int kParts, bool Interpolated>
static void run(const Resample& p) {
  const ResampleGrid grid = resample_grid(p, kParts);
  const auto blocks = unsigned(grid.blocks(p));
  if (grid.staged)
    cuda_on_host::launch(blocks, kRun, size_t(grid.staged) * kParts * sizeof(float), [p, grid] {
      resample_fwd_kernel<Sample, Result, kParts, Interpolated, true>(p, grid);
    });
  else
    cuda_on_host::launch(blocks, kRun, 0, [p, grid] {
      resample_fwd_kernel<Sample, Result, kParts, Interpolated, false>(p, grid);
    });
}

template <class Sample, class Result>
static void run_all(const Resample& p) {
  if (p.up == p.down) {
    const int64_t blocks = (p.count + kRun - 1) / kRun;
    cuda_on_host::launch(unsigned(p.batch * blocks), kRun, 0,
                         [p, blocks] { resample_convert_kernel<Sample, Result>(p, blocks); });
  } else if (p.interpolated) {
    run<Sample, Result, 1, true>(p);
  } else {
    run<Sample, Result, 4, false>(p);
  }
}

extern "C" void resample_on_host(const Resample* p) {
  if (p->pcm_int16) p->out_int16 ? run_all<int16_t, int16_t>(*p) : run_all<int16_t, float>(*p);
  else p->out_int16 ? run_all<float, int16_t>(*p) : run_all<float, float>(*p);
}
