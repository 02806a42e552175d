// Resampling on the GPU by a direct sum over the taps. A block computes kParts runs of up to kRun consecutive outputs
// of one clip. The runs are whole periods of the filter apart, so that a thread's outputs share their taps, which it
// loads once. The samples of each run are converted, averaged over the channels and kept in shared memory. Nothing here
// needs nvcc: the tests run this file on a CPU, with one fiber per CUDA thread.
#pragma once
#include "resample.h"

#ifndef AJEPA_CUDA_ON_HOST
#define AJEPA_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace ajepa {

constexpr int kRun = 256;
constexpr int kMostStaged = 48 * 1024;  // bytes of dynamic shared memory that a launch may use without opting in

struct ResampleGrid {
  int64_t step;       // outputs between two runs of a block, a whole number of periods
  int64_t step_in;    // samples between two runs of a block
  int64_t runs;       // runs that a step is cut into, each for another block
  int64_t groups;     // groups of kParts steps in a row of out
  int staged;         // samples of a run in shared memory; 0: they do not fit
  int64_t blocks(const Resample& p) const { return p.batch * groups * runs; }
};

inline ResampleGrid resample_grid(const Resample& p, int parts) {
  ResampleGrid grid{};
  double least = 2;
  for (int64_t more = 0; more < 8; ++more) {  // the shortest step, or a longer one that leaves fewer threads idle
    const int64_t step = ((kRun + p.up - 1) / p.up + more) * p.up, runs = (step + kRun - 1) / kRun;
    const double idle = double(runs * kRun) / double(step);
    if (idle < least - 0.01 || more == 0) grid.step = step, grid.runs = runs, least = idle;
  }
  grid.step_in = grid.step / p.up * p.down;
  grid.groups = (p.count + parts * grid.step - 1) / (parts * grid.step);
  const int64_t staged = int64_t(kRun - 1) * p.down / p.up + 1 + p.width;
  grid.staged = staged * parts * int64_t(sizeof(float)) <= kMostStaged ? int(staged) : 0;
  return grid;
}

// The mean of a sample's channels with full scale 1; zero outside the recording.
template <class Sample>
__device__ __forceinline__ float mean_of_channels(const Resample& p, const Sample* clip, int64_t at, int64_t stop) {
  if (at < 0 || at >= stop || at + p.offset < 0) return 0;
  const Sample* x = clip + at * p.channels;
  if (sizeof(Sample) == 2) {
    int sum = 0;
    for (int c = 0; c < p.channels; ++c) sum += int(x[c]);
    return float(sum) / (32768.0f * float(p.channels));
  }
  float sum = float(x[0]);
  for (int c = 1; c < p.channels; ++c) sum += float(x[c]);
  return p.channels == 1 ? sum : sum / float(p.channels);
}

__device__ __forceinline__ void store_sample(float* at, float x) { *at = x; }
__device__ __forceinline__ void store_sample(int16_t* at, float x) {
  x = x == x ? x * 32768 : 0;
  x = x > -32768 ? x : -32768;
  *at = int16_t(rintf(x < 32767 ? x : 32767));  // ties go to even
}

template <class Sample, class Result, int kParts, bool Interpolated, bool Staged>
__global__ void __launch_bounds__(kRun) resample_fwd_kernel(Resample p, ResampleGrid grid) {
  AJEPA_DYNAMIC_SHARED(float, staged);
  const int64_t tile = int64_t(blockIdx.x), in_clip = grid.groups * grid.runs;
  const int64_t clip = tile / in_clip, group = tile % in_clip / grid.runs, run = tile % grid.runs;
  const Sample* pcm = static_cast<const Sample*>(p.pcm) + clip * p.samples * p.channels;
  const int64_t stop = p.stop(clip), outputs = p.outputs(clip);
  const int64_t begin = group * kParts * grid.step + run * kRun;  // the block's first output, counted from p.first
  const int64_t start = (p.first + begin) * p.down / p.up - p.half + 1 - p.offset;  // its first sample's place in pcm
  const int thread = int(threadIdx.x);
  if (Staged) {
    for (int part = 0; part < kParts; ++part) {
      if (begin + part * grid.step >= outputs) break;
      for (int i = thread; i < grid.staged; i += kRun)
        staged[part * grid.staged + i] = mean_of_channels(p, pcm, start + part * grid.step_in + i, stop);
    }
    __syncthreads();
  }
  if (run * kRun + thread >= grid.step) return;
  const int64_t m = p.first + begin + thread, time = m * p.down;
  const int at = int(time / p.up - (p.first + begin) * p.down / p.up);  // the same for every part
  const int columns = p.phases + Interpolated;
  int column = int(m % p.up);
  float share = 0;
  if (Interpolated) {
    const int64_t place = time % p.up * p.phases;
    column = int(place / p.up), share = float(place % p.up) / float(p.up);
  }
  float sum[kParts] = {};
  const float* row = p.rows + column;
  const int64_t reach = 2 * p.half;
  for (int64_t tap = 0; tap < reach; ++tap, row += columns) {
    float weight = row[0];
    if (Interpolated) weight += share * (row[1] - weight);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (!Staged && begin + part * grid.step >= outputs) break;
      const float x = Staged ? staged[part * grid.staged + at + tap]
                             : mean_of_channels(p, pcm, start + part * grid.step_in + at + tap, stop);
      sum[part] += weight * x;
    }
  }
  Result* out = static_cast<Result*>(p.out) + clip * p.count;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int64_t index = begin + part * grid.step + thread;
    if (index < p.count) store_sample(out + index, index < outputs ? sum[part] : 0.0f);
  }
}

template <class Sample, class Result>
__global__ void __launch_bounds__(kRun) resample_convert_kernel(Resample p, int64_t blocks) {  // equal rates: no filter
  const int64_t clip = int64_t(blockIdx.x) / blocks, index = int64_t(blockIdx.x) % blocks * kRun + threadIdx.x;
  if (index >= p.count) return;
  const Sample* pcm = static_cast<const Sample*>(p.pcm) + clip * p.samples * p.channels;
  const float x = index < p.outputs(clip) ? mean_of_channels(p, pcm, p.first + index - p.offset, p.stop(clip)) : 0.0f;
  store_sample(static_cast<Result*>(p.out) + clip * p.count + index, x);
}

}  // namespace ajepa
