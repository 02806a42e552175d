// Log-mel on the CPU, with one frame per SIMD lane. Every step is plain arithmetic on vectors of frames; only the
// transpose that loads frames shuffles values. A real transform of n_fft points is a complex one of half the size. This
// file is compiled once per instruction set (AJEPA_KERNEL, AJEPA_LANES). Everything here has internal linkage, so that
// the linker cannot put a function built for AVX-512 into the portable path.
#include "log_mel_cpu.h"

#include <math.h>
#include <string.h>

#include <utility>  // for simd_cpu.h, types only
#if defined(__F16C__)
#include <immintrin.h>  // all its functions are forced inline
#endif

namespace ajepa {
namespace {

constexpr int W = AJEPA_LANES;
#include "simd_cpu.h"

// ---- Transform: decimation in frequency, in place, result in digit-reversed order ----

// Strides of 2^n bytes would put all inputs of a butterfly into one set of the cache, so a padding value follows each
// block of 2^granule values. Smaller blocks have no padding inside.
constexpr int kMaxPasses = 7, kNoPads = 31;  // 3888 is 8 x 3^5 x 2
inline int padded(int j, int granule) { return j + (j >> granule); }

struct Plan {  // a complex transform of `size` points, 8 times a product of 2, 3 and 5
  explicit Plan(int size);
  ~Plan();
  int size, passes = 0, radix[kMaxPasses];
  int granule[kMaxPasses];      // for each pass, log2 of the values between two padding values
  float* twiddles[kMaxPasses];  // for each pass, [its size / radix, radix - 1, 2]
  float* post;                  // [size / 2 + 1, 2]: exp(-i pi k / size)
  int32_t* slot;                // [size]: the place of bin k, in vectors
};

template <int R>
inline void butterfly(Complex (&a)[R], vf* x, int stride, const float* twiddles) {
  dft(a);
  for (int q = 0; q < R; ++q) {
    if (q && twiddles) a[q] = times(a[q], twiddles + 2 * (q - 1));
    x[2 * q * stride] = a[q].re, x[2 * q * stride + 1] = a[q].im;
  }
}

template <int R>
void pass(vf* x, int size, const float* twiddles, int granule, int blocks, int apart) {
  const int count = size / R, stride = padded(count, granule);
  for (int block = 0; block < blocks; ++block, x += apart)
    for (int j = 0; j < count; ++j) {
      vf* at = x + 2 * padded(j, granule);
      Complex a[R];
      for (int q = 0; q < R; ++q) a[q] = {at[2 * q * stride], at[2 * q * stride + 1]};
      butterfly(a, at, stride, count > 1 ? twiddles + 2 * (R - 1) * j : nullptr);
    }
}

// Runs the passes depth first, so that small transforms stay in the first-level cache. The last pass processes all
// blocks of its parent in one call.
void transform(const Plan& plan, int level, vf* x, int size, int blocks = 1, int apart = 0) {
  const int radix = plan.radix[level], granule = plan.granule[level];
  switch (radix) {
    case 2: pass<2>(x, size, plan.twiddles[level], granule, blocks, apart); break;
    case 3: pass<3>(x, size, plan.twiddles[level], granule, blocks, apart); break;
    case 4: pass<4>(x, size, plan.twiddles[level], granule, blocks, apart); break;
    case 5: pass<5>(x, size, plan.twiddles[level], granule, blocks, apart); break;
    default: pass<8>(x, size, plan.twiddles[level], granule, blocks, apart);
  }
  size /= radix;
  const int left = plan.passes - level - 1, next = 2 * padded(size, granule);
  if (left == 1) transform(plan, level + 1, x, size, radix, next);
  for (int q = 0; left > 1 && q < radix; ++q) transform(plan, level + 1, x + q * next, size);
}

Plan::Plan(int points) : size(points) {
  int rest = size;
  for (; rest % 8 == 0; rest /= 8) radix[passes++] = 8;
  for (int prime = 5; prime > 2; prime -= 2)
    for (; rest % prime == 0; rest /= prime) radix[passes++] = prime;
  if (rest > 1) radix[passes++] = rest;
  const bool power_of_two = (size & (size - 1)) == 0;  // other strides spread over the cache by themselves
  for (int p = 0; p < passes; ++p)
    granule[p] = !power_of_two ? kNoPads
                 : size < 1024 ? (p ? kNoPads : __builtin_ctz(size / 8))
                               : p < 2 ? __builtin_ctz(size / 64) : kNoPads;
  int span = size;
  for (int p = 0; p < passes; span /= radix[p++]) {
    const int stride = span / radix[p];
    float* w = twiddles[p] = new float[size_t(2) * stride * (radix[p] - 1)];
    for (int j = 0; j < stride; ++j)
      for (int q = 1; q < radix[p]; ++q, w += 2) {
        const double angle = -2 * M_PI * j * q / span;
        w[0] = float(cos(angle)), w[1] = float(sin(angle));
      }
  }
  post = new float[size + 2];
  for (int k = 0; k <= size / 2; ++k)
    post[2 * k] = float(cos(-M_PI * k / size)), post[2 * k + 1] = float(sin(-M_PI * k / size));
  slot = new int32_t[size];
  for (int k = 0; k < size; ++k) {
    int at = 0, rest_k = k, block = size;
    for (int p = 0; p < passes; ++p) {
      block /= radix[p];
      at += rest_k % radix[p] * block, rest_k /= radix[p];
    }
    slot[k] = 2 * padded(at, granule[0]);
  }
}

Plan::~Plan() {
  for (int p = 0; p < passes; ++p) delete[] twiddles[p];
  delete[] post, delete[] slot;
}

const Plan& plan_for(int size) {  // plans are made once and never freed
  static const Plan* plans[8192 / 16 + 1];
  const Plan*& place = plans[size / 8];
  const Plan* plan = __atomic_load_n(&place, __ATOMIC_ACQUIRE);
  if (plan) return *plan;
  const Plan* const made = new Plan(size);
  if (__atomic_compare_exchange_n(&place, &plan, made, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return *made;
  delete made;  // another thread was faster
  return *plan;
}

// The power spectrum of the real signal from the complex transform, in the order of bins. The window has the factor 1/2.
void power_spectrum(const Plan& plan, const vf* x, vf* power) {
  const int size = plan.size;
  const vf re = x[0], im = x[1];
  power[0] = 4 * (re + im) * (re + im), power[size] = 4 * (re - im) * (re - im);
  for (int k = 1; k <= size / 2; ++k) {
    const vf *u = x + plan.slot[k], *v = x + plan.slot[size - k];
    const Complex a = {u[0], u[1]}, b = {v[0], -v[1]};
    const Complex even = a + b, odd = times(times_minus_i(a - b), plan.post + 2 * k);
    const Complex lower = even + odd, upper = even - odd;
    power[k] = lower.re * lower.re + lower.im * lower.im;
    power[size - k] = upper.re * upper.re + upper.im * upper.im;
  }
}

// ---- Loading frames ----

double sum(const int16_t* x, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t stop = n - i > 32768 ? i + 32768 : n;  // 2^15 samples of up to 2^15 fit 32 bits
    int32_t part = 0;
    for (; i < stop; ++i) part += x[i];
    total += part;
  }
  return double(total);
}
double sum(const float* x, int64_t n) {
  double part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) part[j] += x[i + j];
  for (; i < n; ++i) part[0] += x[i];
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

template <class T>
void stats_of(const LogMel& p, int64_t begin, int64_t end) {
  for (int64_t clip = begin; clip < end; ++clip) {
    const T* x = static_cast<const T*>(p.pcm) + clip * p.samples;
    const int64_t n = p.length(clip);
    const double mean = n ? sum(x, n) / double(n) : 0;
    T low = n ? x[0] : T(0), high = low;
    for (int64_t i = 0; i < n; ++i) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
    const double peak = high - mean > mean - low ? high - mean : mean - low;
    p.stats[2 * clip] = float(mean);
    p.stats[2 * clip + 1] = p.waveform_norm == 2 ? float(p.scale / (peak * p.scale + 1e-6)) : p.scale;
  }
}

// Returns samples 2 j and 2 j + 1 of all frames as a complex number, the input of the first pass. A pair of int16
// samples is one 32-bit element.
inline Complex pair(const int16_t*, const vf* pairs, int j) {
  const vi both = reinterpret_cast<const vi*>(pairs)[j];
  return {__builtin_convertvector(both << 16 >> 16, vf), __builtin_convertvector(both >> 16, vf)};
}
inline Complex pair(const float*, const vf* pairs, int j) { return {pairs[2 * j], pairs[2 * j + 1]}; }

// Transposes W frames into vectors of sample pairs, with zeros after the last sample.
template <class T>
void load_frames(const T* const (&row)[W], int length, vf* pairs) {
  constexpr int step = W * int(sizeof(float) / sizeof(T));  // samples of one frame in one vector
  for (int n = 0; n < length; n += step, pairs += W) {
    vf v[W];
    if (n + step <= length) {
      for (int lane = 0; lane < W; ++lane) v[lane] = *reinterpret_cast<const vf_unaligned*>(row[lane] + n);
    } else {
      for (int lane = 0; lane < W; ++lane) v[lane] = vf{}, memcpy(&v[lane], row[lane] + n, (length - n) * sizeof(T));
    }
    transpose(v);
    for (int i = 0; i < W; ++i) pairs[i] = v[i];
  }
}

// Loads frames as (sample - offset), pre-emphasised, windowed and padded with zeros, and runs the first pass of the
// transform on them. The first radix is always 8. half_window: half the window, followed by zeros up to n_fft.
template <class T>
void load_and_pass(const LogMel& p, const Plan& plan, const T* clip, int64_t length, const int* frame, float clip_mean,
                   const float* half_window, T* edge_rows, vf* pairs, vf* x) {
  constexpr int R = 8;
  const T* row[W];
  vf offset = vf{} + clip_mean;
  for (int lane = 0; lane < W; ++lane) {
    const int64_t start = int64_t(frame[lane]) * p.hop_length + p.first_sample;
    row[lane] = clip + start;
    if (start < 0 || start + p.win_length > length) {
      T* edge = edge_rows + int64_t(lane) * p.win_length;
      for (int i = 0; i < p.win_length; ++i) {
        const int at = p.place(int(start) + i, int(length));
        edge[i] = at < 0 ? T(clip_mean) : clip[at];  // a zero once the mean is subtracted
      }
      row[lane] = edge;
    }
    if (p.remove_dc) offset[lane] = float(sum(row[lane], p.win_length) / p.win_length);
  }
  load_frames(row, p.win_length, pairs);
  const int used = (p.win_length + 1) / 2, count = plan.size / R, granule = plan.granule[0];
  const int stride = padded(count, granule);  // complex values
  const float c = p.preemphasis, *twiddles = plan.twiddles[0];
  vf before[R];  // for each of the R inputs, the sample before it
  before[0] = pair(clip, pairs, 0).re - offset;
  for (int q = 1; q < R; ++q) before[q] = q * count <= used ? pair(clip, pairs, q * count - 1).im - offset : vf{};
  for (int j = 0; j < count; ++j, twiddles += 2 * (R - 1)) {
    Complex a[R];
    for (int q = 0; q < R; ++q) {
      const int at = j + q * count;
      if (at >= used) {
        a[q] = {vf{}, vf{}};
        continue;
      }
      const Complex sample = pair(clip, pairs, at), d = {sample.re - offset, sample.im - offset};
      a[q] = {(d.re - c * before[q]) * half_window[2 * at], (d.im - c * d.re) * half_window[2 * at + 1]};
      before[q] = d.im;
    }
    butterfly(a, x + 2 * padded(j, granule), stride, twiddles);
  }
}

// ---- Mel bands, logarithm, output ----

inline vf square_root(vf x) {
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// ln of positive normal numbers 2^e (1 + f), where 1 + f is in [sqrt(1/2), sqrt(2)): ln(1 + f) is computed as
// f - f^2 / 2 + f^3 P(f). P is fitted by weighted least squares, with a relative error of 6e-9 before rounding. ln 2 is
// split into two parts.
inline vf ln(vf x) {
  constexpr float fit[] = {0.333333284f,  -0.250008464f, 0.200014129f, -0.166227534f,
                           0.141978756f, -0.131616011f, 0.127863303f, -0.0766083002f};
  const vi bits = reinterpret_cast<vi&>(x), e = (bits - 0x3f3504f3) >> 23;
  const vi scaled = bits - (e << 23);
  const vf f = reinterpret_cast<const vf&>(scaled) - 1, exponent = __builtin_convertvector(e, vf);
  vf series = vf{} + fit[7];
  for (int i = 6; i >= 0; --i) series = series * f + fit[i];
  return exponent * 0.693359375f + (f - (0.5f - f * series) * f * f + exponent * -2.12194440e-4f);
}

// Expands the table of intervals to bins; every bin lies in one interval between two mel edges. weights: [bins, 2], the
// weight of a bin in its falling and its rising band; starts: [n_mels + 2], the first bin of each interval.
void spread_weights(const LogMel& p, float* weights, int32_t* starts) {
  int32_t bin = p.intervals[0];
  for (int i = 0; i <= p.n_mels; ++i) {
    starts[i] = bin;
    for (int k = 0; k < p.intervals[2 * i + 1]; ++k, ++bin)
      for (int side = 0; side < 2; ++side)
        weights[2 * bin + side] = p.weights[((int64_t(k / 4) * p.n_intervals + i) * 2 + side) * 4 + k % 4];
  }
  starts[p.n_mels + 1] = bin;
}

template <int Power, bool Log>
void mel_bands(const LogMel& p, const float* weights, const int32_t* starts, const vf* spectrum, float gain, int valid,
               vf missing, vf* bands) {
  const float floor = p.floor, log_scale = p.log_scale, log_shift = p.log_shift;
  vi outside;  // lanes after the clip's last frame, whose values are `missing`
  for (int lane = 0; lane < W; ++lane) outside[lane] = lane < valid ? 0 : -1;
  vf rising = vf{};  // sum of interval i - 1 for band i - 1
  for (int i = 0; i <= p.n_mels; ++i) {
    vf up = vf{}, down = rising;
    for (int k = starts[i]; k < starts[i + 1]; ++k) {
      const vf power = Power == 2 ? spectrum[k] : square_root(spectrum[k]);
      down += weights[2 * k] * power;
      up += weights[2 * k + 1] * power;
    }
    rising = up;
    if (!i) continue;
    const vf mel = down * gain;
    if constexpr (Log) {
      const vf log = ln(mel > floor ? mel : vf{} + floor);
      const vf value = mel <= 3.4e38f ? log : mel;  // Inf and NaN are kept
      bands[i - 1] = outside ? missing : value * log_scale + log_shift;
    } else {
      bands[i - 1] = outside ? missing : mel;
    }
  }
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
inline void store(float* out, vf x) { *reinterpret_cast<vf_unaligned*>(out) = x; }
template <class T>
inline void store_low_halves(T* out, vi x) {
  typedef int16_t vs __attribute__((vector_size(2 * W)));
  const vs low = __builtin_convertvector(x, vs);
  memcpy(out, &low, sizeof low);
}
inline void store(Half* out, vf x) {  // to nearest, ties to even
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(reinterpret_cast<__m512&>(x), 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(reinterpret_cast<__m256&>(x), 0));
#else  // _Float16 needs GCC 12
  const vi bits = reinterpret_cast<const vi&>(x), size = bits & 0x7fffffff;
  const vf fixed = reinterpret_cast<const vf&>(size) + 0.5f;  // its last bit has the value of half's smallest subnormal
  const vi subnormal = reinterpret_cast<const vi&>(fixed) - 0x3f000000;
  const vi normal = (size - (112 << 23) + 0xfff + (size >> 13 & 1)) >> 13;  // exponents are biased by 15, not 127
  const vi infinite = size > 0x7f800000 ? vi{} + 0x7e00 : vi{} + 0x7c00;
  store_low_halves(out, (size < 113 << 23 ? subnormal : size < 143 << 23 ? normal : infinite) | (bits >> 16 & 0x8000));
#endif
}
inline void store(BFloat16* out, vf x) {  // to nearest, ties to even
  const vi bits = reinterpret_cast<const vi&>(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
  store_low_halves(out, (x == x ? rounded : vi{} + 0x7fc00000) >> 16);
}

template <class T>
void store_bands(const LogMel& p, int64_t clip, int first, int count, const vf* bands) {
  const int height = p.patch_mels, width = p.patch_frames;
  for (int from = 0; from < count;) {  // a run is the frames within one patch
    const int room = width - (first + from) % width, run = count - from < room ? count - from : room;
    for (int mel = 0; mel < p.n_mels; mel += height) {
      T* to = static_cast<T*>(p.out) + p.out_index(clip, mel, first + from);
      for (int i = 0; i < height; ++i, to += width) {
        if (run == W) {
          store(to, bands[mel + i]);
        } else {
          T values[W];
          store(values, bands[mel + i]);
          memcpy(to, values + from, size_t(run) * sizeof(T));
        }
      }
    }
    from += run;
  }
}

int transform_vectors(const LogMel& p) { return p.n_fft + p.n_fft / 8; }  // with the most padding
int frame_vectors(const LogMel& p) {  // the loaded frames, later overwritten by the power spectrum
  const int frames = p.win_length + W, bins = p.n_fft / 2 + 1;
  return frames > bins ? frames : bins;
}
int64_t scratch_floats(const LogMel& p) {
  return int64_t(W) * (transform_vectors(p) + frame_vectors(p) + p.win_length + p.n_mels) + 2 * p.n_fft + 2 + p.n_mels + 2;
}

void clip_stats(const LogMel& p, int64_t begin, int64_t end) {
  p.is_int16 ? stats_of<int16_t>(p, begin, end) : stats_of<float>(p, begin, end);
}

void run(const LogMel& p, int64_t begin, int64_t end, float* scratch) {
  const Plan& plan = plan_for(p.n_fft / 2);
  vf* x = reinterpret_cast<vf*>(scratch);
  vf *frames = x + transform_vectors(p), *bands = frames + frame_vectors(p);
  float* edge_rows = reinterpret_cast<float*>(bands + p.n_mels);
  float *half_window = edge_rows + int64_t(W) * p.win_length, *weights = half_window + p.n_fft;
  int32_t* starts = reinterpret_cast<int32_t*>(weights + p.n_fft + 2);
  for (int i = 0; i < p.n_fft; ++i) half_window[i] = i < p.win_length ? 0.5f * p.window[i] : 0;
  spread_weights(p, weights, starts);
  const int rows = p.patches * p.patch_frames, groups = (rows + W - 1) / W;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t clip = item / groups;
    const int first = int(item % groups) * W, count = rows - first < W ? rows - first : W;
    const int64_t length = p.length(clip);
    const int valid = p.frames(length) - first, all = p.all_frames(length) - first;
    vf missing;
    for (int lane = 0; lane < W; ++lane) missing[lane] = lane < all ? p.silence : p.pad;
    float peak = valid < all ? p.silence : -INFINITY;
    if (valid > 0) {
      const float mean = p.stats ? p.stats[2 * clip] : 0.0f;
      const float gain = (p.stats ? p.stats[2 * clip + 1] : p.scale) * p.factor;
      int frame[W];
      for (int lane = 0; lane < W; ++lane) frame[lane] = first + (lane < valid ? lane : valid - 1);
      if (p.is_int16)
        load_and_pass(p, plan, static_cast<const int16_t*>(p.pcm) + clip * p.samples, length, frame, mean,
                      half_window, reinterpret_cast<int16_t*>(edge_rows), frames, x);
      else
        load_and_pass(p, plan, static_cast<const float*>(p.pcm) + clip * p.samples, length, frame, mean, half_window,
                      edge_rows, frames, x);
      for (int q = 0; q < 8; ++q) transform(plan, 1, x + 2 * q * padded(plan.size / 8, plan.granule[0]), plan.size / 8);
      power_spectrum(plan, x, frames);
      const auto bands_of = p.power == 2 ? (p.take_log ? mel_bands<2, true> : mel_bands<2, false>)
                                         : (p.take_log ? mel_bands<1, true> : mel_bands<1, false>);
      bands_of(p, weights, starts, frames, p.power == 2 ? gain * gain : gain, valid, missing, bands);
      if (p.peaks)
        for (int mel = 0; mel < p.n_mels; ++mel)
          for (int lane = 0; lane < W && lane < valid; ++lane) peak = bands[mel][lane] > peak ? bands[mel][lane] : peak;
    } else {
      for (int mel = 0; mel < p.n_mels; ++mel) bands[mel] = missing;
    }
    if (p.peaks) p.peaks[item] = peak;
    if (p.dtype == Out::kFloat) store_bands<float>(p, clip, first, count, bands);
    else if (p.dtype == Out::kHalf) store_bands<Half>(p, clip, first, count, bands);
    else store_bands<BFloat16>(p, clip, first, count, bands);
  }
}

}  // namespace

extern const CpuKernel AJEPA_KERNEL;
const CpuKernel AJEPA_KERNEL = {W, scratch_floats, clip_stats, run};

}  // namespace ajepa
