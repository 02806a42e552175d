// The arguments of one call of log_mel, shared by the CPU and the CUDA kernels. Samples are in raw units (int16 steps
// or floats). The chain up to the spectrum is linear, so the clip's gain is applied to the mel power instead.
#pragma once
#include <cstdint>

namespace ajepa {

// Rows of the CUDA transform of n_fft / 2 points: for the passes of radix 16 after the first and for a last pass of
// smaller radix (200 is 20 x 10), and n_fft / 8 rows of two roots each, which make the spectrum of the real samples.
constexpr int twiddle_rows(int n_fft) {
  const int points = n_fft / 2;
  if (n_fft == 400) return 10 + n_fft / 8;
  int rows = 0, done = 16;
  for (; 16 * done <= points; done *= 16) rows += done;
  return rows + (done < points ? points / 16 : 0) + n_fft / 8;
}

// kRepeat and kReflect mirror the ends of a clip, with and without repeating the edge sample.
enum class Edge : int { kInside = 0, kRepeat = 1, kReflect = 2 };
enum class Out : int { kFloat = 0, kHalf = 1, kBFloat16 = 2 };

struct LogMel {
  const void* pcm;          // [batch, samples], int16 or float
  const int64_t* lengths;   // [batch] or null
  const float* window;      // [win_length]
  const float* weights;     // [any, n_intervals, 2, 4]: weights of four bins in their falling and their rising band
  const int32_t* intervals;  // [n_intervals, 2]: first bin and number of bins between mel edges i and i + 1
  const float* twiddles;    // CUDA: [twiddle_rows(n_fft), 4]: w and w^4 for each pass, then exp(-2 pi i k / n_fft)
  float* stats;             // [batch, 2]: mean to subtract and gain of a clip; null without waveform norm
  float* peaks;             // CPU: [items], CUDA: [batch]: largest log value, for top_db; null without it
  void* out;                // [batch, n_mels / patch_mels, patches, patch_mels, patch_frames]
  int64_t batch, samples;
  int n_fft, win_length, hop_length, first_sample, frame_bias, frame_add, min_samples;
  int n_mels, n_intervals, n_frames, patch_mels, patch_frames, patches;  // n_frames kept, patches x patch_frames written
  int patch_rows, patch_mels_inverse;  // n_mels / patch_mels; x / patch_mels is x * inverse >> 16 for x < 256
  int power, waveform_norm;
  bool is_int16, remove_dc, take_log;  // take_log off: mel values, neither floored nor scaled
  Edge edge;
  Out dtype;
  float preemphasis, scale, floor, log_scale, log_shift, top;  // scale of the input; top < 0: no limit

#if defined(__CUDACC__) || defined(AJEPA_CUDA_ON_HOST)
#define AJEPA_HD __host__ __device__
#else
#define AJEPA_HD
#endif
  AJEPA_HD int64_t length(int64_t clip) const {
    if (!lengths) return samples;
    const int64_t n = lengths[clip];
    return n < 0 ? 0 : n > samples ? samples : n;
  }
  AJEPA_HD int frames(int64_t length) const {
    if (length < min_samples) return 0;
    const int64_t n = (length + frame_bias) / hop_length + frame_add;
    return n < n_frames ? int(n) : n_frames;
  }
  AJEPA_HD int mirror(int i, int length) const {
    const int repeat = edge == Edge::kRepeat;
    if (i < 0) i = -repeat - i;
    if (i >= length) i = 2 * length - 2 + repeat - i;
    return i < 0 ? 0 : i;
  }
  AJEPA_HD int64_t out_index(int64_t clip, int mel, int frame) const {  // in patch order
    const int64_t patch = (clip * patch_rows + mel / patch_mels) * patches + frame / patch_frames;
    return (patch * patch_mels + mel % patch_mels) * patch_frames + frame % patch_frames;
  }
};

}  // namespace ajepa
