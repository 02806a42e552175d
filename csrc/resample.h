// The arguments of one call of `resample`, shared by the CPU and the CUDA kernels. Output m of a recording is at the
// input time m * down / up. Two methods implement the same filter: a direct sum over the taps (for any rates, and
// always on CUDA), and overlapping blocks that are filtered and resampled as spectra (on the CPU, if up and down have
// no prime factor above 7).
#pragma once
#include <cstdint>

#if defined(__CUDACC__) || defined(AJEPA_CUDA_ON_HOST)
#define AJEPA_RESAMPLE_HD __host__ __device__
#else
#define AJEPA_RESAMPLE_HD
#endif

namespace ajepa {

constexpr int kTapGroup = 16;  // rows of coefficients are padded with zeros to whole groups

struct Resample {
  const void* pcm;           // [batch, samples, channels], int16 or float
  const int64_t* lengths;    // [batch] or null: number of samples of each recording
  const float* rows;         // direct: [phases + interpolated, width]: taps of each phase; transposed on CUDA
  const float* twiddles;     // spectra: [size / radix, radix - 1, 2] for every pass of both transforms
  const float* response;     // spectra: [bins, 2]: complex gain of each bin that is kept
  const int32_t* positions;  // spectra: [bins, 2]: place of the bin after the first and before the second transform
  void* out;                 // [batch, count], int16 or float
  int64_t batch, samples, count, first, offset;  // pcm starts at sample `offset`, out at output `first`
  int64_t up, down;          // to_rate : from_rate in lowest terms
  int64_t half;              // output m depends on the inputs in (m * down / up - half, m * down / up + half)
  int channels, width, phases, bins;
  int size_in, size_out, hop;  // spectra: points of both transforms, outputs per block; size_in = 0: direct
  uint64_t radices_in, radices_out;  // one hexadecimal digit per pass, the first pass in the lowest digit
  bool interpolated, pcm_int16, out_int16;

  // One past the last sample that counts, as an index into pcm.
  AJEPA_RESAMPLE_HD int64_t stop(int64_t clip) const {
    if (!lengths) return samples;
    const int64_t n = lengths[clip] - offset;
    return n < 0 ? 0 : n > samples ? samples : n;
  }
  // Number of outputs of this call before the end of the recording; the rest of the row is zeros.
  AJEPA_RESAMPLE_HD int64_t outputs(int64_t clip) const {
    if (!lengths) return count;
    const int64_t n = lengths[clip] <= 0 ? 0 : (lengths[clip] * up + down - 1) / down - first;
    return n < 0 ? 0 : n > count ? count : n;
  }
};

}  // namespace ajepa
