// The arguments of one call of log_mel, shared by the CPU and the CUDA kernels. Samples are in raw units (int16 steps
// or floats). The chain up to the spectrum is linear, so the clip's gain is applied to the mel power instead.
#pragma once
#include <cstdint>

namespace ajepa {

// A frame is n_fft samples: 16 times a product of 2, 3 and 5, because the CPU kernel's first pass has radix 8 and a real
// frame is a complex transform of half its size.
constexpr bool has_transform(int64_t n_fft) {
  if (n_fft < 128 || n_fft > 8192 || n_fft % 16) return false;
  for (int prime = 2; prime <= 5; ++prime)
    while (n_fft % prime == 0) n_fft /= prime;
  return n_fft == 1;
}

// Rows of the CUDA transform of n_fft / 2 points: for the passes of radix 16 after the first and for a last pass of
// smaller radix, and n_fft / 8 rows of two roots each, which make the spectrum of the real samples. 200 is 20 x 10, 320
// is 20 x 4 x 4 and 600 is 25 x 24; there is no CUDA kernel for other sizes than these and powers of two.
constexpr int twiddle_rows(int n_fft) {
  const int points = n_fft / 2;
  if (points & (points - 1)) return (n_fft == 400 ? 10 : n_fft == 640 ? 20 + 16 : n_fft == 1200 ? 25 : 0) + n_fft / 8;
  int rows = 0, done = 16;
  for (; 16 * done <= points; done *= 16) rows += done;
  return rows + (done < points ? points / 16 : 0) + n_fft / 8;
}

// kRepeat and kReflect mirror the ends of a clip, with and without repeating the edge sample. kZero: zeros are there.
enum class Edge : int { kInside = 0, kRepeat = 1, kReflect = 2, kZero = 3 };
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
  int n_samples;  // clips are cropped or padded with zeros to this many; 0: they stay as they are
  bool is_int16, remove_dc, take_log;  // take_log off: mel values, neither floored nor scaled
  Edge edge;
  Out dtype;
  float preemphasis, scale, floor, log_scale, log_shift, top;  // scale of the input; top < 0: no limit
  float factor;        // of the samples after the waveform norm
  float pad, silence;  // values of frames that a clip does not have, and of frames of zeros

#if defined(__CUDACC__) || defined(AJEPA_CUDA_ON_HOST)
#define AJEPA_HD __host__ __device__
#else
#define AJEPA_HD
#endif
  AJEPA_HD int64_t length(int64_t clip) const {
    const int64_t most = n_samples && n_samples < samples ? n_samples : samples;
    if (!lengths) return most;
    const int64_t n = lengths[clip];
    return n < 0 ? 0 : n > most ? most : n;
  }
  AJEPA_HD int frames(int64_t length) const {  // with n_samples: those that a sample may reach
    if (length < min_samples) return 0;
    const int64_t n = (length + frame_bias) / hop_length + frame_add;
    return n < n_frames ? int(n) : n_frames;
  }
  AJEPA_HD int all_frames(int64_t length) const { return n_samples ? n_frames : frames(length); }  // the later ones are `pad`
  AJEPA_HD int place(int i, int length) const {  // of sample i of the padded clip, or -1 for a zero
    const int all = n_samples ? n_samples : length;
    if (edge != Edge::kZero) {
      const int repeat = edge == Edge::kRepeat;
      if (i < 0) i = -repeat - i;
      if (i >= all) i = 2 * all - 2 + repeat - i;
      if (i < 0) i = 0;
    }
    return i < 0 || i >= length ? -1 : i;
  }
  AJEPA_HD int64_t out_index(int64_t clip, int mel, int frame) const {  // in patch order
    const int64_t patch = (clip * patch_rows + mel / patch_mels) * patches + frame / patch_frames;
    return (patch * patch_mels + mel % patch_mels) * patch_frames + frame % patch_frames;
  }
};

}  // namespace ajepa
