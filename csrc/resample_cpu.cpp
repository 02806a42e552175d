// Resampling on the CPU. If the ratio of the rates has only small prime factors, blocks of `size_in` samples overlap by
// the length of the filter. A block's spectrum is multiplied by the filter's and cut (or padded) to `size_out` points;
// its inverse transform is the block at the new rate. The filter is real, so two neighbouring blocks share a complex
// transform as its real and imaginary part; a SIMD lane holds one such pair. For all other rates the taps are summed.
//
// The bits of an output depend only on its index and on the samples of its pair of blocks, not on the lane, the thread
// or the call, so a stream gives the same bits as the whole recording. Vectors have at most 8 lanes, because AVX2 and
// AVX-512 then add in the same order, and Zen 4 is as fast with 8 lanes as with 16. This file is compiled once per
// instruction set (AJEPA_KERNEL, AJEPA_LANES). Everything here has internal linkage, so that the linker cannot put a
// function built for AVX-512 into the portable path.
#include "resample_cpu.h"

#include <string.h>

#include <utility>  // for simd_cpu.h, types only

namespace ajepa::resample_cpu {
namespace {

constexpr int W = AJEPA_LANES < 8 ? AJEPA_LANES : 8;
constexpr int kPiece = 64;           // samples of each row that are converted and transposed together
constexpr int64_t kSpan = 1 << 13;   // direct: samples that are converted together, plus the filter's length
constexpr int kOutputs = 256;        // direct: largest number of outputs of such a span
constexpr int kTogether = 4;         // direct: outputs that are computed together
#include "simd_cpu.h"

// ---- Reading and writing samples ----

// The mean of each sample's channels, divided by 32768 for int16. Sums of int16 are exact and the division rounds once,
// so an average without resampling is the nearest float.
template <class Sum, class T, class Scale>
inline void average(const T* from, float* to, int64_t n, int channels, Scale scale) {
  if (channels == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = scale(float(from[i]));
  } else if (channels == 2) {
    for (int64_t i = 0; i < n; ++i) to[i] = scale(float(Sum(from[2 * i]) + Sum(from[2 * i + 1])));
  } else {
    for (int64_t i = 0; i < n; ++i, from += channels) {
      Sum sum = from[0];
      for (int c = 1; c < channels; ++c) sum += from[c];
      to[i] = scale(float(sum));
    }
  }
}

template <class Sum, class T>
void average(const T* from, float* to, int64_t n, int channels, float divisor) {
  const float factor = 1 / divisor;
  if (channels & (channels - 1)) average<Sum>(from, to, n, channels, [=](float x) { return x / divisor; });
  else average<Sum>(from, to, n, channels, [=](float x) { return x * factor; });
}

struct Clip {  // one row of pcm
  const Resample& p;
  const char* pcm;
  int64_t stop, start;  // range of samples that count; `start` is not 0 if pcm begins before the recording

  Clip(const Resample& p, int64_t clip) : p(p), stop(p.stop(clip)), start(p.offset < 0 ? -p.offset : 0) {
    pcm = static_cast<const char*>(p.pcm) + clip * p.samples * p.channels * (p.pcm_int16 ? 2 : 4);
  }
  // Returns `n` samples from index `at` of pcm on, with zeros outside the range: in `buffer`, or a pointer into pcm.
  const float* read(int64_t at, int64_t n, float* buffer) const {
    const bool inside = at >= start && at + n <= stop;
    const int64_t frame = p.channels * (p.pcm_int16 ? 2 : 4), bytes = n * frame;
    // Prefetch the piece after the next one. Hardware prefetching fails, because many rows are read in turn.
    if (inside && bytes <= 2048)
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(pcm + (at + 2 * n) * frame + line);
    if (inside && !p.pcm_int16 && p.channels == 1) return reinterpret_cast<const float*>(pcm) + at;
    const int64_t low = at > start ? at : start, high = at + n < stop ? at + n : stop;
    if (low >= high) {
      memset(buffer, 0, n * sizeof(float));
      return buffer;
    }
    memset(buffer, 0, (low - at) * sizeof(float));
    memset(buffer + (high - at), 0, (at + n - high) * sizeof(float));
    float* to = buffer + (low - at);
    const int64_t from = low * p.channels;
    if (p.pcm_int16)
      average<int32_t>(reinterpret_cast<const int16_t*>(pcm) + from, to, high - low, p.channels, 32768.0f * p.channels);
    else
      average<float>(reinterpret_cast<const float*>(pcm) + from, to, high - low, p.channels, float(p.channels));
    return buffer;
  }
};

struct Row {  // one row of out
  const Resample& p;
  char* out;
  int64_t outputs;

  Row(const Resample& p, int64_t clip) : p(p), outputs(p.outputs(clip)) {
    out = static_cast<char*>(p.out) + clip * p.count * (p.out_int16 ? 2 : 4);
  }
  // Writes outputs m to m + n - 1 of the recording; those that are outside the call's range are dropped.
  void write(int64_t m, int64_t n, const float* values) const {
    const int64_t at = m - p.first, low = at > 0 ? at : 0, high = at + n < outputs ? at + n : outputs;
    if (low >= high) return;
    values += low - at;
    if (!p.out_int16) {
      memcpy(reinterpret_cast<float*>(out) + low, values, (high - low) * sizeof(float));
      return;
    }
    int16_t* to = reinterpret_cast<int16_t*>(out) + low;
    for (int64_t i = 0; i < high - low; ++i) {
      float x = values[i] == values[i] ? values[i] * 32768 : 0;
      x = x > -32768 ? x : -32768;
      x = x < 32767 ? x : 32767;
      // The last place of 1.5 * 2^23 is 1, so adding it rounds to a whole number, with ties to even.
      to[i] = int16_t(int32_t((x + 12582912.0f) - 12582912.0f));
    }
  }
  void zeros_after_the_end() const {
    const int size = p.out_int16 ? 2 : 4;
    memset(out + outputs * size, 0, (p.count - outputs) * size);
  }
};

// ---- Transforms: decimation in frequency to digit-reversed order, and back by decimation in time ----

// One pass over `total` points in blocks of `size`. A forward pass ends with the twiddles, an inverse pass begins with
// them.
template <int R, bool Forward>
void pass(vf* x, int total, int size, const float* twiddles) {
  const int stride = size / R;
  for (vf* block = x; block < x + 2 * total; block += 2 * size) {
    const float* w = twiddles;
    for (int j = 0; j < stride; ++j, w += 2 * (R - 1)) {
      Complex a[R];
      for (int q = 0; q < R; ++q) {
        const vf* at = block + 2 * (j + q * stride);
        a[q] = {at[0], at[1]};
        if (!Forward && q && j) a[q] = times(a[q], w + 2 * (q - 1));
      }
      dft(a);
      for (int q = 0; q < R; ++q) {
        vf* at = block + 2 * (j + q * stride);
        const Complex y = Forward && q && j ? times(a[q], w + 2 * (q - 1)) : a[q];
        at[0] = y.re, at[1] = y.im;
      }
    }
  }
}

template <bool Forward>
void pass(int radix, vf* x, int total, int size, const float* twiddles) {
  switch (radix) {
    case 2: return pass<2, Forward>(x, total, size, twiddles);
    case 3: return pass<3, Forward>(x, total, size, twiddles);
    case 4: return pass<4, Forward>(x, total, size, twiddles);
    case 5: return pass<5, Forward>(x, total, size, twiddles);
    case 7: return pass<7, Forward>(x, total, size, twiddles);
    case 8: return pass<8, Forward>(x, total, size, twiddles);
  }
}

struct Plan {
  int passes = 0, size = 0, radix[16], sizes[16];
  const float* twiddles[16];

  Plan(int points, uint64_t radices, const float*& table) : size(points) {  // moves `table` past its twiddles
    for (int left = points; radices; radices >>= 4, ++passes) {
      radix[passes] = int(radices & 15), sizes[passes] = left, twiddles[passes] = table;
      table += 2 * (left / radix[passes]) * (radix[passes] - 1);
      left /= radix[passes];
    }
  }
  // The first pass has the largest radix. The blocks that remain after it fit the first-level cache.
  void forward(vf* x) const {
    pass<true>(radix[0], x, size, size, twiddles[0]);
    if (passes == 1) return;
    for (vf* block = x; block < x + 2 * size; block += 2 * sizes[1])
      for (int i = 1; i < passes; ++i) pass<true>(radix[i], block, sizes[1], sizes[i], twiddles[i]);
  }
  void back(vf* x) const {
    if (passes > 1)
      for (vf* block = x; block < x + 2 * size; block += 2 * sizes[1])
        for (int i = passes - 1; i > 0; --i) pass<false>(radix[i], block, sizes[1], sizes[i], twiddles[i]);
    pass<false>(radix[0], x, size, size, twiddles[0]);
  }
};

// ---- Conversion between rows of samples and vectors ----

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Lane l holds block + 2 l in its real part and block + 2 l + 1 in its imaginary part.
void load_blocks(const Resample& p, const Clip& clip, int64_t block, int used, float* buffer, vf* x) {
  const int64_t hop_in = p.hop / p.up * p.down, begin = block * hop_in - p.half - p.offset;
  for (int i = 0; i < p.size_in; i += kPiece) {
    const int n = p.size_in - i < kPiece ? p.size_in - i : kPiece;
    for (int odd = 0; odd < 2; ++odd) {
      const float* row[W];
      for (int lane = 0; lane < W; ++lane) {
        float* own = buffer + lane * kPiece;
        if (2 * lane + odd < used) row[lane] = clip.read(begin + (2 * lane + odd) * hop_in + i, kPiece, own);
        else row[lane] = static_cast<const float*>(memset(own, 0, kPiece * sizeof(float)));
      }
      for (int k = 0; k < n; k += W) {
        vf v[W];
        for (int lane = 0; lane < W; ++lane) v[lane] = *reinterpret_cast<const vf_unaligned*>(row[lane] + k);
        transpose(v);
        for (int q = 0; q < W && k + q < n; ++q) x[2 * (i + k + q) + odd] = v[q];
      }
    }
  }
}

void store_blocks(const Resample& p, const Row& row, int64_t block, int used, float* buffer, const vf* y) {
  for (int i = 0; i < p.hop; i += kPiece) {
    const int n = p.hop - i < kPiece ? p.hop - i : kPiece;
    for (int odd = 0; odd < 2; ++odd) {
      for (int k = 0; k < n; k += W) {
        vf v[W];
        for (int q = 0; q < W; ++q) v[q] = y[2 * (i + k + q) + 1 - odd];  // `spectra` has exchanged the parts
        transpose(v);
        for (int lane = 0; lane < W; ++lane) *reinterpret_cast<vf*>(buffer + lane * kPiece + k) = v[lane];
      }
      for (int lane = 0; lane < W && 2 * lane + odd < used; ++lane)
        row.write((block + 2 * lane + odd) * p.hop + i, n, buffer + lane * kPiece);
    }
  }
}

// Filters blocks as spectra. It exchanges real and imaginary parts between the transforms: the forward transform of the
// exchanged values is the inverse transform with its parts exchanged.
void spectra(const Resample& p, const Clip& clip, const Row& row, float* scratch) {
  const float* table = p.twiddles;
  const Plan in(p.size_in, p.radices_in, table), out(p.size_out, p.radices_out, table);
  vf* x = reinterpret_cast<vf*>(scratch);
  vf* y = x + 2 * p.size_in;
  float* buffer = reinterpret_cast<float*>(y + 2 * (p.size_out + W));
  const int64_t end = p.first + row.outputs;
  for (int64_t block = p.first / p.hop / 2 * 2; block * p.hop < end; block += 2 * W) {  // pairs start at even blocks
    const int64_t blocks = up_to((end - block * p.hop + p.hop - 1) / p.hop, 2);
    const int used = blocks < 2 * W ? int(blocks) : 2 * W;
    load_blocks(p, clip, block, used, buffer, x);
    in.forward(x);
    if (p.bins < p.size_out) memset(y, 0, size_t(2 * p.size_out) * sizeof(vf));
    for (int bin = 0; bin < p.bins; ++bin) {
      const vf* from = x + 2 * p.positions[2 * bin];
      const Complex product = times({from[0], from[1]}, p.response + 2 * bin);
      vf* to = y + 2 * p.positions[2 * bin + 1];
      to[0] = product.im, to[1] = product.re;
    }
    out.back(y);
    store_blocks(p, row, block, used, buffer, y);
  }
}

// ---- The direct method ----

template <bool Interpolated>
void dots(const float* const (&x)[kTogether], const float* const (&row)[kTogether], const float (&share)[kTogether],
          int width, float* values) {
  vf sum[kTogether][kTapGroup / W] = {};
  for (int i = 0; i < width; i += kTapGroup)
    for (int k = 0; k < kTogether; ++k)
      for (int part = 0; part < kTapGroup / W; ++part) {
        const int at = i + part * W;
        vf taps = *reinterpret_cast<const vf_unaligned*>(row[k] + at);
        if (Interpolated) taps += share[k] * (*reinterpret_cast<const vf_unaligned*>(row[k] + width + at) - taps);
        sum[k][part] += taps * *reinterpret_cast<const vf_unaligned*>(x[k] + at);
      }
  for (int k = 0; k < kTogether; ++k) {
    vf all = sum[k][0];
    for (int part = 1; part < kTapGroup / W; ++part) all += sum[k][part];
    float lanes[W];
    memcpy(lanes, &all, sizeof lanes);
    for (int step = W / 2; step; step /= 2)
      for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
    values[k] = lanes[0];
  }
}

void direct(const Resample& p, const Clip& clip, const Row& row, float* scratch) {
  const int64_t end = p.first + row.outputs;
  for (int64_t m = p.first; m < end;) {
    int64_t n = (kSpan - p.down / p.up - 1) * p.up / p.down;  // number of outputs that kSpan samples suffice for
    n = n < kTogether ? kTogether : n < kOutputs ? n / kTogether * kTogether : kOutputs;
    n = n < end - m ? n : end - m;
    const int64_t begin = m * p.down / p.up - p.half + 1, last = (m + n - 1) * p.down / p.up - p.half + 1;
    const int64_t samples = last - begin + p.width;
    const float* x = clip.read(begin - p.offset, samples, scratch + kOutputs);
    for (int64_t i = 0; i < n; i += kTogether) {
      const float *from[kTogether], *taps[kTogether];
      float share[kTogether];
      for (int64_t k = 0; k < kTogether; ++k) {
        const int64_t at = (m + (i + k < n ? i + k : n - 1)) * p.down, rest = at % p.up, place = rest * p.phases;
        from[k] = x + (at / p.up - p.half + 1 - begin);
        taps[k] = p.rows + place / p.up * p.width;
        share[k] = float(place % p.up) / float(p.up);
      }
      p.interpolated ? dots<true>(from, taps, share, p.width, scratch + i)
                     : dots<false>(from, taps, share, p.width, scratch + i);
    }
    row.write(m, n, scratch);
    m += n;
  }
}

void convert(const Resample& p, const Clip& clip, const Row& row, float* scratch) {  // equal rates: no filter
  for (int64_t i = 0; i < row.outputs; i += kSpan) {
    const int64_t n = row.outputs - i < kSpan ? row.outputs - i : kSpan;
    row.write(p.first + i, n, clip.read(p.first + i - p.offset, n, scratch));
  }
}

int64_t scratch_floats(const Resample& p) {
  if (p.size_in) return int64_t(2 * W) * (p.size_in + p.size_out + W) + W * kPiece;
  return kOutputs + (kTogether * (p.down / p.up + 1) > kSpan ? kTogether * (p.down / p.up + 1) : kSpan) + p.width;
}

void run(const Resample& p, int64_t begin, int64_t end, float* scratch) {
  for (int64_t i = begin; i < end; ++i) {
    const Clip clip(p, i);
    const Row row(p, i);
    if (p.up == p.down) convert(p, clip, row, scratch);
    else if (p.size_in) spectra(p, clip, row, scratch);
    else direct(p, clip, row, scratch);
    row.zeros_after_the_end();
  }
}

}  // namespace

extern const Kernel AJEPA_KERNEL;
const Kernel AJEPA_KERNEL = {scratch_floats, run};

}  // namespace ajepa::resample_cpu
