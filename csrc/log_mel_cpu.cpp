// Log-mel on the CPU, with one frame a SIMD lane: every step is plain arithmetic on vectors of frames, no shuffles but
// the transpose that loads them. A real transform of n_fft points is a complex one of half the size. Compiled once per
// instruction set (AJEPA_KERNEL, AJEPA_LANES); everything here has internal linkage, so that no function built for
// AVX-512 can be linked into the portable path.
#include "log_mel_cpu.h"

#include <math.h>
#include <string.h>

#include <utility>  // index_sequence: types only

namespace ajepa {
namespace {

constexpr int W = AJEPA_LANES;
typedef float vf __attribute__((vector_size(4 * W), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W), may_alias));
typedef float vf_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int16_t vs_unaligned __attribute__((vector_size(2 * W), aligned(2), may_alias));

struct Complex {
  vf re, im;
};
inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex times_minus_i(Complex a) { return {a.im, -a.re}; }
inline Complex times(Complex a, const float* w) { return {a.re * w[0] - a.im * w[1], a.re * w[1] + a.im * w[0]}; }

// ---- Transform: decimation in frequency, in place, result in digit-reversed order ----

inline void dft(Complex (&a)[2]) {
  const Complex t = a[0] - a[1];
  a[0] = a[0] + a[1];
  a[1] = t;
}
inline void dft(Complex (&a)[4]) {
  const Complex s = a[0] + a[2], d = a[0] - a[2], t = a[1] + a[3], e = times_minus_i(a[1] - a[3]);
  a[0] = s + t, a[1] = d + e, a[2] = s - t, a[3] = d - e;
}
inline void dft(Complex (&a)[5]) {
  constexpr float c1 = 0.30901699437494742f, c2 = -0.80901699437494742f, s1 = 0.95105651629515357f,
                  s2 = 0.58778525229247313f;
  const Complex p = a[1] + a[4], q = a[2] + a[3], m = times_minus_i(a[1] - a[4]), n = times_minus_i(a[2] - a[3]);
  const Complex r = {a[0].re + c1 * p.re + c2 * q.re, a[0].im + c1 * p.im + c2 * q.im};
  const Complex s = {a[0].re + c2 * p.re + c1 * q.re, a[0].im + c2 * p.im + c1 * q.im};
  const Complex u = {s1 * m.re + s2 * n.re, s1 * m.im + s2 * n.im}, v = {s2 * m.re - s1 * n.re, s2 * m.im - s1 * n.im};
  a[0] = a[0] + p + q, a[1] = r + u, a[2] = s + v, a[3] = s - v, a[4] = r - u;
}
inline void dft(Complex (&a)[8]) {
  constexpr float h = 0.70710678118654752f;
  Complex even[4] = {a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]};
  const Complex d1 = a[1] - a[5], d3 = a[3] - a[7];
  Complex odd[4] = {a[0] - a[4],
                    {(d1.re + d1.im) * h, (d1.im - d1.re) * h},
                    times_minus_i(a[2] - a[6]),
                    {(d3.im - d3.re) * h, (d3.re + d3.im) * -h}};
  dft(even), dft(odd);
  for (int q = 0; q < 4; ++q) a[2 * q] = even[q], a[2 * q + 1] = odd[q];
}

constexpr int kMaxPasses = 5;
struct Plan {  // of a complex transform of `size` points
  int size = 0, passes = 0, radix[kMaxPasses];
  float* twiddles[kMaxPasses];  // [size of the pass / radix, radix - 1, 2]
  float* post;                  // [size / 2 + 1, 2]: exp(-i pi k / size)
  int32_t* slot;                // [size + 1]: where the power of bin k stands, in vectors
};

template <int R>
inline void pass(vf* x, int size, const float* twiddles) {
  const int stride = size / R;
  for (int j = 0; j < stride; ++j, twiddles += 2 * (R - 1)) {
    Complex a[R];
    for (int q = 0; q < R; ++q) a[q] = {x[2 * (j + q * stride)], x[2 * (j + q * stride) + 1]};
    dft(a);
    for (int q = 0; q < R; ++q) {
      if (q && stride > 1) a[q] = times(a[q], twiddles + 2 * (q - 1));
      x[2 * (j + q * stride)] = a[q].re, x[2 * (j + q * stride) + 1] = a[q].im;
    }
  }
}

void transform(const Plan& plan, int level, vf* x, int size) {  // depth first: the small ones stay in the first cache
  const int radix = plan.radix[level];
  const float* twiddles = plan.twiddles[level];
  switch (radix) {
    case 2: pass<2>(x, size, twiddles); break;
    case 4: pass<4>(x, size, twiddles); break;
    case 5: pass<5>(x, size, twiddles); break;
    default: pass<8>(x, size, twiddles);
  }
  if (level + 1 < plan.passes)
    for (int q = 0; q < radix; ++q) transform(plan, level + 1, x + 2 * q * (size / radix), size / radix);
}

Plan make_plan(int size) {
  Plan plan;
  plan.size = size;
  int rest = size;
  while (rest % 5 == 0) plan.radix[plan.passes++] = 5, rest /= 5;
  int lead = rest;
  while (lead % 8 == 0) lead /= 8;
  if (lead > 1) plan.radix[plan.passes++] = lead, rest /= lead;
  for (; rest > 1; rest /= 8) plan.radix[plan.passes++] = 8;
  int span = size;
  for (int p = 0; p < plan.passes; span /= plan.radix[p++]) {
    const int radix = plan.radix[p], stride = span / radix;
    float* w = plan.twiddles[p] = new float[size_t(2) * stride * (radix - 1)];
    for (int j = 0; j < stride; ++j)
      for (int q = 1; q < radix; ++q, w += 2) {
        const double angle = -2 * M_PI * j * q / span;
        w[0] = float(cos(angle)), w[1] = float(sin(angle));
      }
  }
  plan.post = new float[size + 2];
  for (int k = 0; k <= size / 2; ++k)
    plan.post[2 * k] = float(cos(-M_PI * k / size)), plan.post[2 * k + 1] = float(sin(-M_PI * k / size));
  plan.slot = new int32_t[size + 1];
  for (int k = 0; k < size; ++k) {
    int at = 0, rest_k = k, block = size;
    for (int p = 0; p < plan.passes; ++p) {
      block /= plan.radix[p];
      at += rest_k % plan.radix[p] * block, rest_k /= plan.radix[p];
    }
    plan.slot[k] = 2 * at;
  }
  plan.slot[size] = plan.slot[0] + 1;  // Nyquist, in the imaginary half of bin 0
  return plan;
}

const Plan& plan_for(int size) {  // made once, kept for good
  switch (size) {
#define AJEPA_PLAN(n) \
  case n: {           \
    static const Plan plan = make_plan(n); \
    return plan;      \
  }
    AJEPA_PLAN(64) AJEPA_PLAN(128) AJEPA_PLAN(256) AJEPA_PLAN(512) AJEPA_PLAN(1024) AJEPA_PLAN(2048) AJEPA_PLAN(4096)
    default: AJEPA_PLAN(200)
#undef AJEPA_PLAN
  }
}

// Spectrum of the real signal behind the complex one, as power in place of its real parts. The window carries the 1/2.
void power_spectrum(const Plan& plan, vf* x) {
  const int size = plan.size;
  const vf re = x[0], im = x[1];
  x[0] = 4 * (re + im) * (re + im), x[1] = 4 * (re - im) * (re - im);
  for (int k = 1; k <= size / 2; ++k) {
    vf *u = x + plan.slot[k], *v = x + plan.slot[size - k];
    const Complex a = {u[0], u[1]}, b = {v[0], -v[1]};
    const Complex even = a + b, odd = times(times_minus_i(a - b), plan.post + 2 * k);
    const Complex lower = even + odd, upper = even - odd;
    u[0] = lower.re * lower.re + lower.im * lower.im;
    v[0] = upper.re * upper.re + upper.im * upper.im;
  }
}

// ---- Frames in ----

template <int H, size_t... I>
inline void exchange(vf& a, vf& b, std::index_sequence<I...>) {
  const vf low = __builtin_shufflevector(a, b, (I & H ? W + I - H : I)...);
  b = __builtin_shufflevector(a, b, (I & H ? W + I : I + H)...);
  a = low;
}
template <int H = W / 2>
inline void transpose(vf (&rows)[W]) {
  for (int i = 0; i < W; ++i)
    if (!(i & H)) exchange<H>(rows[i], rows[i + H], std::make_index_sequence<W>{});
  if constexpr (H > 1) transpose<H / 2>(rows);
}

inline vf load(const int16_t* x) { return __builtin_convertvector(*reinterpret_cast<const vs_unaligned*>(x), vf); }
inline vf load(const float* x) { return *reinterpret_cast<const vf_unaligned*>(x); }

double sum(const int16_t* x, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t stop = n - i > 32768 ? i + 32768 : n;  // 2^15 samples of 2^15 fit 32 bits
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

// W frames from sample `start` on, `hop` apart, into x: (sample - offset) pre-emphasised and windowed, zeros after them.
template <class T>
void load_frames(const LogMel& p, const T* clip, int64_t length, const int* frame, float clip_mean, T* edge_rows, vf* x) {
  const T* row[W];
  vf offset;
  for (int lane = 0; lane < W; ++lane) {
    const int64_t start = int64_t(frame[lane]) * p.hop_length + p.first_sample;
    row[lane] = clip + start;
    if (start < 0 || start + p.win_length > length) {
      T* edge = edge_rows + int64_t(lane) * p.win_length;
      for (int i = 0; i < p.win_length; ++i) edge[i] = clip[p.mirror(start + i, length)];
      row[lane] = edge;
    }
    offset[lane] = p.remove_dc ? float(sum(row[lane], p.win_length) / p.win_length) : clip_mean;
  }
  vf before = vf{} + 0;
  for (int lane = 0; lane < W; ++lane) before[lane] = float(row[lane][0]);
  before -= offset;
  const float c = p.preemphasis;
  int n = 0;
  for (; n + W <= p.win_length; n += W) {
    vf v[W];
    for (int lane = 0; lane < W; ++lane) v[lane] = load(row[lane] + n);
    transpose(v);
    for (int i = 0; i < W; ++i) {
      const vf d = v[i] - offset;
      x[n + i] = (d - c * before) * (0.5f * p.window[n + i]);
      before = d;
    }
  }
  for (; n < p.win_length; ++n) {
    vf d;
    for (int lane = 0; lane < W; ++lane) d[lane] = float(row[lane][n]);
    d -= offset;
    x[n] = (d - c * before) * (0.5f * p.window[n]);
    before = d;
  }
  for (; n < p.n_fft; ++n) x[n] = vf{};
}

// ---- Mel, log, out ----

inline vf square_root(vf x) {
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// ln of positive normal numbers, to 2 ulp: 2^e m with m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh((m - 1)/(m + 1)).
inline vf ln(vf x) {
  const vi bits = reinterpret_cast<vi&>(x), e = (bits - 0x3f3504f3) >> 23;
  const vi scaled = bits - (e << 23);
  const vf m = reinterpret_cast<const vf&>(scaled), s = (m - 1) / (m + 1), s2 = s * s;
  const vf series = s2 * (0.66666667f + s2 * (0.4f + s2 * (0.28571429f + s2 * (0.22222222f + s2 * 0.18181818f))));
  const vf exponent = __builtin_convertvector(e, vf);
  return exponent * 0.693359375f + (exponent * -2.12194440e-4f + (2 * s + s * series));
}

inline vf mel_log(const LogMel& p, vf mel, float gain) {
  mel *= gain;
  return ln(mel > p.floor ? mel : vf{} + p.floor) * p.log_scale + p.log_shift;
}

template <int Power>
void mel_bands(const LogMel& p, const Plan& plan, const vf* x, float gain, vf* bands) {
  vf rising = vf{};  // into band i - 1, from interval i - 1
  for (int i = 0; i <= p.n_mels; ++i) {
    vf up = vf{}, down = vf{};
    for (int s = p.offsets[i]; s < p.offsets[i + 1]; ++s) {
      const int32_t* slot = plan.slot + p.segments[2 * s];
      const float* weight = p.weights + 2 * s;
      for (int k = 0; k < p.segments[2 * s + 1]; ++k, weight += 2 * p.n_segments) {
        const vf power = Power == 2 ? x[slot[k]] : square_root(x[slot[k]]);
        down += weight[0] * power;
        up += weight[1] * power;
      }
    }
    if (i) bands[i - 1] = mel_log(p, rising + down, gain);
    rising = up;
  }
}

inline void store(float* out, float x) { *out = x; }
inline void store(_Float16* out, float x) { *out = _Float16(x); }
struct BFloat16 {
  uint16_t bits;
};
inline void store(BFloat16* out, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out->bits = uint16_t(x == x ? rounded : 0x7fc0);
}

template <class T>
void store_bands(const LogMel& p, int64_t clip, int first, int count, int valid, const vf* bands) {
  T* out = static_cast<T*>(p.out);
  for (int from = 0; from < count;) {  // runs of frames within one patch
    const int room = p.patch_frames - (first + from) % p.patch_frames, run = count - from < room ? count - from : room;
    for (int mel = 0; mel < p.n_mels; ++mel) {
      T* to = out + p.out_index(clip, mel, first + from);
      const float* values = reinterpret_cast<const float*>(bands + mel) + from;
      if (run == W && valid >= W)
        for (int i = 0; i < W; ++i) store(to + i, values[i]);
      else
        for (int i = 0; i < run; ++i) store(to + i, from + i < valid ? values[i] : p.log_shift);
    }
    from += run;
  }
}

int64_t scratch_floats(const LogMel& p) { return int64_t(W) * (p.n_fft + p.win_length + p.n_mels); }

void clip_stats(const LogMel& p, int64_t begin, int64_t end) {
  p.is_int16 ? stats_of<int16_t>(p, begin, end) : stats_of<float>(p, begin, end);
}

void run(const LogMel& p, int64_t begin, int64_t end, float* scratch) {
  const Plan& plan = plan_for(p.n_fft / 2);
  vf* x = reinterpret_cast<vf*>(scratch);
  vf* bands = x + p.n_fft;
  float* edge_rows = reinterpret_cast<float*>(bands + p.n_mels);
  const int padded = p.patches * p.patch_frames, groups = (padded + W - 1) / W;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t clip = item / groups;
    const int first = int(item % groups) * W, count = padded - first < W ? padded - first : W;
    const int64_t length = p.length(clip);
    const int valid = p.frames(length) - first;
    float peak = -INFINITY;
    if (valid > 0) {
      const float mean = p.stats ? p.stats[2 * clip] : 0.0f, gain = p.stats ? p.stats[2 * clip + 1] : p.scale;
      int frame[W];
      for (int lane = 0; lane < W; ++lane) frame[lane] = first + (lane < valid ? lane : valid - 1);
      if (p.is_int16)
        load_frames(p, static_cast<const int16_t*>(p.pcm) + clip * p.samples, length, frame, mean,
                    reinterpret_cast<int16_t*>(edge_rows), x);
      else
        load_frames(p, static_cast<const float*>(p.pcm) + clip * p.samples, length, frame, mean, edge_rows, x);
      transform(plan, 0, x, plan.size);
      power_spectrum(plan, x);
      p.power == 2 ? mel_bands<2>(p, plan, x, gain * gain, bands) : mel_bands<1>(p, plan, x, gain, bands);
      if (p.peaks)
        for (int mel = 0; mel < p.n_mels; ++mel)
          for (int lane = 0; lane < W; ++lane) peak = bands[mel][lane] > peak ? bands[mel][lane] : peak;
    }
    if (p.peaks) p.peaks[item] = peak;
    if (p.dtype == Out::kFloat) store_bands<float>(p, clip, first, count, valid, bands);
    else if (p.dtype == Out::kHalf) store_bands<_Float16>(p, clip, first, count, valid, bands);
    else store_bands<BFloat16>(p, clip, first, count, valid, bands);
  }
}

}  // namespace

extern const CpuKernel AJEPA_KERNEL;
const CpuKernel AJEPA_KERNEL = {W, scratch_floats, clip_stats, run};

}  // namespace ajepa
