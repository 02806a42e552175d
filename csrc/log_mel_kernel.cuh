// Log-mel on the GPU: PCM to patches in one kernel (two more, both tiny, where a clip's peak or its top_db is asked for).
// A block makes kChunk frames of one clip. Two real frames share a complex transform; 16 points a thread, radix 16 (20 and
// 20 for n_fft 400), one exchange through shared memory between passes (Stockham, natural order). fp32 throughout: tf32 or fp16 would put a nat
// of error on quiet bins. Nothing here needs nvcc: the tests run this file on a CPU, one fiber a thread.
#pragma once
#include "log_mel.h"

#ifndef AJEPA_CUDA_ON_HOST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define AJEPA_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace ajepa {

constexpr int kChunk = 16;   // frames of a block: a patch row of 32 bytes in bf16
constexpr int kStageStride = kChunk + 1;
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr int passes(int n, int radix) { return n < radix ? 0 : 1 + passes(n / radix, radix); }
constexpr int rest(int n, int radix) { return n < radix ? n : rest(n / radix, radix); }

template <int Points>  // of the transform
struct Shape {
  static constexpr int N = Points;
  static constexpr bool kPowerOfTwo = (N & (N - 1)) == 0;
  static constexpr int kRadix = kPowerOfTwo ? 16 : 20;             // complex values a thread holds
  static constexpr int kLanes = N / kRadix;                        // threads of a transform that hold some
  static constexpr int kThreads = kPowerOfTwo ? kLanes : 32;       // all its threads
  static constexpr int kTogether = kThreads >= 256 ? 1 : 256 / kThreads < kChunk / 2 ? 256 / kThreads : kChunk / 2;
  static constexpr int kBlock = kThreads * kTogether, kRounds = kChunk / 2 / kTogether;
  static constexpr int kResident = (kPowerOfTwo ? 1024 : 768) / kBlock;  // blocks on a multiprocessor: 64, 80 registers
  static constexpr int kWide = passes(N, kRadix), kLast = rest(N, kRadix);  // passes of kRadix, then one of radix kLast
  static constexpr int kValues = N + N / kRadix;  // of shared memory, padded: no bank is hit twice
  static_assert(kPowerOfTwo || N == 400);

  static __device__ __forceinline__ int padded(int i) { return i + int(unsigned(i) / kRadix); }
  static __device__ __forceinline__ bool holds(int t) { return kLanes == kThreads || t < kLanes; }
};

inline int64_t shared_bytes(const LogMel& p, int together, int values) {
  return int64_t(together) * (values * 8 + p.n_segments * 16) + int64_t(p.n_mels) * kStageStride * 4;
}

__device__ __forceinline__ float2 add(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ __forceinline__ float2 sub(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
__device__ __forceinline__ float2 times_minus_i(float2 a) { return make_float2(a.y, -a.x); }
__device__ __forceinline__ float2 mul(float2 a, float2 b) {
  return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x);
}
__device__ __forceinline__ float2 turn(int numerator, int denominator) {  // exp(-2 pi i numerator / denominator)
  float s, c;
  sincospif(-2.0f * float(numerator) / float(denominator), &s, &c);  // the argument is exact where the denominator is 2^n
  return make_float2(c, s);
}
__device__ __forceinline__ float2 sixteenth(int i) {  // exp(-2 pi i / 16)^i, folded where i is known
  constexpr float kCos[16] = {1.0f,  0.92387953251128674f,  0.70710678118654752f,  0.38268343236508977f,
                              0.0f,  -0.38268343236508977f, -0.70710678118654752f, -0.92387953251128674f,
                              -1.0f, -0.92387953251128674f, -0.70710678118654752f, -0.38268343236508977f,
                              0.0f,  0.38268343236508977f,  0.70710678118654752f,  0.92387953251128674f};
  return make_float2(kCos[i & 15], kCos[(i + 4) & 15]);
}
__device__ __forceinline__ float2 twentieth(int i) {
  constexpr float kCos[20] = {1.0f,  0.95105651629515357f,  0.80901699437494742f,  0.58778525229247313f,  0.30901699437494742f,
                              0.0f,  -0.30901699437494742f, -0.58778525229247313f, -0.80901699437494742f, -0.95105651629515357f,
                              -1.0f, -0.95105651629515357f, -0.80901699437494742f, -0.58778525229247313f, -0.30901699437494742f,
                              0.0f,  0.30901699437494742f,  0.58778525229247313f,  0.80901699437494742f,  0.95105651629515357f};
  return make_float2(kCos[i % 20], kCos[(i + 5) % 20]);
}

template <int R>
__device__ __forceinline__ void dft(float2* a);  // a[0..R), stride 1, natural order
template <>
__device__ __forceinline__ void dft<1>(float2*) {}
template <>
__device__ __forceinline__ void dft<2>(float2* a) {
  const float2 t = sub(a[0], a[1]);
  a[0] = add(a[0], a[1]), a[1] = t;
}
template <>
__device__ __forceinline__ void dft<4>(float2* a) {
  const float2 s = add(a[0], a[2]), d = sub(a[0], a[2]), t = add(a[1], a[3]), e = times_minus_i(sub(a[1], a[3]));
  a[0] = add(s, t), a[1] = add(d, e), a[2] = sub(s, t), a[3] = sub(d, e);
}
template <>
__device__ __forceinline__ void dft<8>(float2* a) {
  float2 even[4] = {a[0], a[2], a[4], a[6]}, odd[4] = {a[1], a[3], a[5], a[7]};
  dft<4>(even), dft<4>(odd);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const float2 o = q ? mul(odd[q], sixteenth(2 * q)) : odd[0];
    a[q] = add(even[q], o), a[q + 4] = sub(even[q], o);
  }
}
template <>
__device__ __forceinline__ void dft<5>(float2* a) {
  constexpr float c1 = 0.30901699437494742f, c2 = -0.80901699437494742f, s1 = 0.95105651629515357f,
                  s2 = 0.58778525229247313f;
  const float2 p = add(a[1], a[4]), q = add(a[2], a[3]), m = times_minus_i(sub(a[1], a[4])), n = times_minus_i(sub(a[2], a[3]));
  const float2 r = make_float2(a[0].x + c1 * p.x + c2 * q.x, a[0].y + c1 * p.y + c2 * q.y);
  const float2 s = make_float2(a[0].x + c2 * p.x + c1 * q.x, a[0].y + c2 * p.y + c1 * q.y);
  const float2 u = make_float2(s1 * m.x + s2 * n.x, s1 * m.y + s2 * n.y);
  const float2 v = make_float2(s2 * m.x - s1 * n.x, s2 * m.y - s1 * n.y);
  a[0] = add(a[0], add(p, q));
  a[1] = add(r, u), a[2] = add(s, v), a[3] = sub(s, v), a[4] = sub(r, u);
}
template <>
__device__ __forceinline__ void dft<20>(float2* a) {
  float2 column[4][5];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 5; ++j) column[i][j] = a[i + 4 * j];
    dft<5>(column[i]);
  }
#pragma unroll
  for (int q = 0; q < 5; ++q) {
    float2 row[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) row[i] = i && q ? mul(column[i][q], twentieth(i * q)) : column[i][q];
    dft<4>(row);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[q + 5 * i] = row[i];
  }
}
template <>
__device__ __forceinline__ void dft<16>(float2* a) {
  float2 column[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) column[i][j] = a[i + 4 * j];
    dft<4>(column[i]);
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    float2 row[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) row[i] = i && q ? mul(column[i][q], sixteenth(i * q)) : column[i][q];
    dft<4>(row);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[q + 4 * i] = row[i];
  }
}

// Keeps the compiler from computing what follows from `a` before the loop over pairs, in registers it has not got.
__device__ __forceinline__ float2 fresh(float2 a) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+f"(a.x), "+f"(a.y));
#endif
  return a;
}

// a[q] *= w^q, from w and w^4. The rounding of w grows with the power and is alike for all frames: a chain of powers would
// set an echo 100 dB below a loud bin.
template <int R>
__device__ __forceinline__ void twist(float2* a, float2 w, float2 w4) {
  a[1] = mul(a[1], w);
  if constexpr (R >= 4) {
    const float2 w2 = mul(w, w), w3 = mul(w2, w);
    float2 high = w4;
    a[2] = mul(a[2], w2), a[3] = mul(a[3], w3);
#pragma unroll
    for (int q = 4; q < R; q += 4) {
      a[q] = mul(a[q], high);
      a[q + 1] = mul(a[q + 1], mul(high, w)), a[q + 2] = mul(a[q + 2], mul(high, w2));
      a[q + 3] = mul(a[q + 3], mul(high, w3));
      high = mul(high, w4);
    }
  }
}

// The transform of one pair: `a` holds inputs t + q N / kRadix; leaves the spectrum in `z`, natural order. Offsets are
// split so that one register and immediates address all of a thread's values.
template <class S>
__device__ __forceinline__ void transform(float2 (&a)[S::kRadix], float2* z, int t, const float2 (&turns)[3][2]) {
  constexpr int R = S::kRadix, T = S::kLanes;
  float2* const mine = z + S::padded(t);
  if (S::holds(t)) {
    dft<R>(a);
#pragma unroll
    for (int q = 0; q < R; ++q) z[(R + 1) * t + q] = a[q];
  }
  __syncthreads();
#pragma unroll
  for (int pass = 1, L = R; pass < S::kWide; ++pass, L *= R) {
    const int k = S::kPowerOfTwo ? t & (L - 1) : t;
    if (S::holds(t)) {
#pragma unroll
      for (int q = 0; q < R; ++q) a[q] = mine[S::padded(q * T)];
    }
    __syncthreads();
    if (S::holds(t)) {
      twist<R>(a, fresh(turns[pass - 1][0]), fresh(turns[pass - 1][1]));
      dft<R>(a);
      float2* const to = z + (R + 1) * (t - k) + S::padded(k);
#pragma unroll
      for (int q = 0; q < R; ++q) to[S::padded(q * L)] = a[q];
    }
    __syncthreads();
  }
  if constexpr (S::kLast > 1) {
    const float2 last_turn[2] = {fresh(turns[S::kWide - 1][0]), fresh(turns[S::kWide - 1][1])};
    constexpr int Last = S::kLast, each = R / Last, L = S::N / Last;
#pragma unroll
    for (int i = 0; i < each; ++i)
#pragma unroll
      for (int q = 0; q < Last; ++q) a[i * Last + q] = mine[S::padded(i * T + q * L)];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const float2 w = i ? mul(last_turn[0], sixteenth(i)) : last_turn[0];
      twist<Last>(a + i * Last, w, i ? mul(last_turn[1], sixteenth(4 * i)) : last_turn[1]);
      dft<Last>(a + i * Last);
#pragma unroll
      for (int q = 0; q < Last; ++q) mine[S::padded(i * T + q * L)] = a[i * Last + q];
    }
    __syncthreads();
  }
}

template <class T>
struct Range {  // sum, least and greatest of a frame's samples
  T sum, low, high;
};
template <int Width, class T>
__device__ __forceinline__ void merge_lanes(Range<T>& r) {
#pragma unroll
  for (int m = Width / 2; m > 0; m >>= 1) {
    r.sum += __shfl_xor_sync(kAllLanes, r.sum, m);
    r.low = min(r.low, __shfl_xor_sync(kAllLanes, r.low, m));
    r.high = max(r.high, __shfl_xor_sync(kAllLanes, r.high, m));
  }
}
#if defined(AJEPA_CUDA_ON_HOST) || __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ void merge_lanes<32, int>(Range<int>& r) {
  r.sum = __reduce_add_sync(kAllLanes, r.sum);
  r.low = __reduce_min_sync(kAllLanes, r.low);
  r.high = __reduce_max_sync(kAllLanes, r.high);
}
#endif
template <class T>
__device__ __forceinline__ T as(int bits);
template <>
__device__ __forceinline__ int as<int>(int bits) { return bits; }
template <>
__device__ __forceinline__ float as<float>(int bits) { return __int_as_float(bits); }
__device__ __forceinline__ int bits_of(int x) { return x; }
__device__ __forceinline__ int bits_of(float x) { return __float_as_int(x); }

// Over the threads of a transform; every thread gets the result.
template <int Threads, class T>
__device__ __forceinline__ void merge_threads(Range<T>& r, int (*scratch)[3]) {
  merge_lanes<(Threads < 32 ? Threads : 32)>(r);
  if constexpr (Threads > 32) {
    constexpr int warps = Threads / 32;
    const int warp = threadIdx.x / 32, first = warp / warps * warps;
    __syncthreads();
    if (threadIdx.x % 32 == 0)
      scratch[warp][0] = bits_of(r.sum), scratch[warp][1] = bits_of(r.low), scratch[warp][2] = bits_of(r.high);
    __syncthreads();
    const int* of = scratch[first + threadIdx.x % warps];
    r = {as<T>(of[0]), as<T>(of[1]), as<T>(of[2])};
    merge_lanes<warps>(r);
  }
}

// Frame `frame` of the clip into one half of `a`: (sample - offset), pre-emphasised and windowed. Returns a bound on the
// magnitude of sample - offset.
template <class Sample>
struct Total {
  using type = float;
};
template <>
struct Total<int16_t> {
  using type = int;  // exact
};
__device__ __forceinline__ float mean_of(float sum, int count) { return sum / float(count); }
__device__ __forceinline__ float mean_of(int sum, int count) {  // rounded once, though a sum may need 29 bits
  const float whole = rintf(float(sum) / float(count));
  return whole + float(sum - int(whole) * count) / float(count);
}
template <class S, int Half, class Sample>
__device__ __forceinline__ float load_frame(const LogMel& p, const Sample* clip, int length, int frame, float mean,
                                            int t, float2 (&a)[S::kRadix], int (*scratch)[3], float2* places) {
  using Sum = typename Total<Sample>::type;
  const int start = frame * p.hop_length + p.first_sample;
  // Barriers stand outside these branches: transforms of one block may differ here.
  const bool inside = start >= 0 && start + p.win_length <= length;
  const Sample* const from = clip + start;
  const auto mirrored = [&](int n) { return clip[p.mirror(start + n, length)]; };
  const auto within = [&](int n) { return S::holds(t) && n < p.win_length; };

  const Sum any = inside ? from[0] : mirrored(0);
  Range<Sum> range = {0, any, any};
  if (inside) {
#pragma unroll
    for (int q = 0; q < S::kRadix; ++q) {
      const int n = t + q * S::kLanes;
      const bool in = within(n);
      const Sum x = in ? Sum(from[n]) : any;
      range.sum += in ? x : Sum(0), range.low = min(range.low, x), range.high = max(range.high, x);
    }
  } else {
#pragma unroll 1
    for (int n = t; n < p.win_length; n += S::kThreads) {
      const Sum x = mirrored(n);
      range.sum += x, range.low = min(range.low, x), range.high = max(range.high, x);
    }
  }
  merge_threads<S::kThreads>(range, scratch);

  const float offset = p.remove_dc ? mean_of(range.sum, p.win_length) : mean;
  if (inside) {
#pragma unroll
    for (int q = 0; q < S::kRadix; ++q) {
      const int n = t + q * S::kLanes;
      float y = 0;
      if (within(n)) {
        y = float(from[n]) - offset;
        if (p.preemphasis != 0) y -= p.preemphasis * (float(from[n ? n - 1 : 0]) - offset);
        y *= p.window[n];
      }
      (Half ? a[q].y : a[q].x) = y;
    }
  } else {  // rare: a loop, by way of the places in shared memory that this thread writes next
#pragma unroll 1
    for (int q = 0; q < S::kRadix; ++q) {
      const int n = t + q * S::kLanes;
      float y = 0;
      if (within(n)) {
        const float before = float(mirrored(n ? n - 1 : 0)) - offset;
        y = (float(mirrored(n)) - offset - p.preemphasis * before) * p.window[n];
      }
      if (S::holds(t)) places[q].x = y;
    }
#pragma unroll
    for (int q = 0; q < S::kRadix; ++q) (Half ? a[q].y : a[q].x) = S::holds(t) ? places[q].x : 0.0f;
  }
  return fmaxf(float(range.high) - offset, offset - float(range.low));
}

__device__ __forceinline__ void store(const LogMel& p, int64_t at, float x) {
  if (p.dtype == Out::kFloat) static_cast<float*>(p.out)[at] = x;
  else if (p.dtype == Out::kHalf) static_cast<unsigned short*>(p.out)[at] = __half_as_ushort(__float2half_rn(x));
  else static_cast<unsigned short*>(p.out)[at] = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ int ordered(float x) {  // integers in the order of floats
  const int bits = __float_as_int(x);
  return bits >= 0 ? bits : bits ^ 0x7fffffff;
}

// Grid: batch * ceil(frames written / kChunk).
template <int Points, class Sample>
__global__ void __launch_bounds__(Shape<Points>::kBlock, Shape<Points>::kResident) log_mel_fwd_kernel(const LogMel p) {
  using S = Shape<Points>;
  constexpr int N = S::N, T = S::kThreads, R = S::kRadix;
  AJEPA_DYNAMIC_SHARED(float4, shared);
  __shared__ int scratch[S::kBlock > 32 ? S::kBlock / 32 : 1][3];
  const int group = threadIdx.x / T, t = threadIdx.x % T;
  float4* partials = shared + group * p.n_segments;  // of a segment: falling and rising sums of both frames
  float2* z = reinterpret_cast<float2*>(shared + S::kTogether * p.n_segments) + group * S::kValues;
  float* stage = reinterpret_cast<float*>(reinterpret_cast<float2*>(shared + S::kTogether * p.n_segments) +
                                          S::kTogether * S::kValues);

  const int rows = p.patches * p.patch_frames, chunks = (rows + kChunk - 1) / kChunk;
  const int64_t clip = blockIdx.x / chunks;
  const int first = int(blockIdx.x % chunks) * kChunk;
  const int length = int(p.length(clip));
  const int valid = min(p.frames(length) - first, kChunk);
  const float mean = p.stats ? p.stats[2 * clip] : 0.0f, gain = p.stats ? p.stats[2 * clip + 1] : p.scale;

  const Sample* pcm = static_cast<const Sample*>(p.pcm) + clip * p.samples;

  float2 turns[3][2];
#pragma unroll
  for (int pass = 1, L = R; pass < S::kWide; ++pass, L *= R) {
    const int k = S::kPowerOfTwo ? t & (L - 1) : t;
    turns[pass - 1][0] = turn(k, R * L), turns[pass - 1][1] = turn(4 * k, R * L);
  }
  if constexpr (S::kLast > 1) turns[S::kWide - 1][0] = turn(t, N), turns[S::kWide - 1][1] = turn(4 * t, N);

  for (int round = 0; round < S::kRounds && 2 * S::kTogether * round < valid; ++round) {
    const int pair = round * S::kTogether + group;
    const int even = first + min(2 * pair, valid - 1), odd = first + min(2 * pair + 1, valid - 1);
    float2 a[R];
    float loud[2];
    loud[0] = load_frame<S, 0>(p, pcm, length, even, mean, t, a, scratch, z + (R + 1) * t);
    loud[1] = load_frame<S, 1>(p, pcm, length, odd, mean, t, a, scratch, z + (R + 1) * t);
    // Rounding leaks from one frame of a pair into the other, so the second is brought to the first's level, by a power
    // of two, which is exact; a silent frame's share is dropped.
    int level = (__float_as_int(loud[0]) >> 23) - (__float_as_int(loud[1]) >> 23);
    level = loud[0] > 0 && loud[1] > 0 ? max(-60, min(60, level)) : 0;
    const float lift = __int_as_float((127 + level) << 23), lower = __int_as_float((127 - level) << 23);
#pragma unroll
    for (int q = 0; q < R; ++q) a[q].y *= lift;
    transform<S>(a, z, t, turns);

    // X = (Z[k] + conj Z[N - k]) / 2, Y = (Z[k] - conj Z[N - k]) / 2i; each bin pair has one reader, which is its writer.
    for (int k = t; k <= N / 2; k += T) {
      const float2 u = z[S::padded(k)], v = z[S::padded(S::kPowerOfTwo ? (N - k) & (N - 1) : k ? N - k : 0)];
      const float2 x = make_float2(u.x + v.x, u.y - v.y), y = make_float2(u.y + v.y, v.x - u.x);
      float2 power = make_float2(x.x * x.x + x.y * x.y, y.x * y.x + y.y * y.y);
      if (p.power == 1) power = make_float2(sqrtf(power.x), sqrtf(power.y));
      z[S::padded(k)] = power;
    }
    __syncthreads();
    for (int s = t; s < p.n_segments; s += T) {
      const int bin = p.segments[2 * s], bins = p.segments[2 * s + 1];
      float4 sum = make_float4(0, 0, 0, 0);
      for (int i = 0; i < bins; ++i) {
        const float2 weight = reinterpret_cast<const float2*>(p.weights)[i * p.n_segments + s], power = z[S::padded(bin + i)];
        sum.x += weight.x * power.x, sum.y += weight.x * power.y;
        sum.z += weight.y * power.x, sum.w += weight.y * power.y;
      }
      partials[s] = sum;
    }
    __syncthreads();
    const float unit = p.power == 2 ? 0.25f * gain * gain : 0.5f * gain;
    const float gain_x = loud[0] > 0 ? unit : 0.0f;
    const float gain_y = loud[1] > 0 ? (p.power == 2 ? unit * lower * lower : unit * lower) : 0.0f;
    for (int m = t; m < p.n_mels; m += T) {
      float x = 0, y = 0;
      const int begin = p.offsets[m], middle = p.offsets[m + 1], end = p.offsets[m + 2];
      for (int s = begin; s < middle; ++s) x += partials[s].z, y += partials[s].w;
      for (int s = middle; s < end; ++s) x += partials[s].x, y += partials[s].y;
      x *= gain_x, y *= gain_y;  // NaN stays NaN, in both frames of the pair
      stage[m * kStageStride + 2 * pair] = logf(x < p.floor ? p.floor : x) * p.log_scale + p.log_shift;
      stage[m * kStageStride + 2 * pair + 1] = logf(y < p.floor ? p.floor : y) * p.log_scale + p.log_shift;
    }
    __syncthreads();
  }

  float peak = -INFINITY;
  const int count = min(rows - first, kChunk);
  for (int i = threadIdx.x; i < p.n_mels * kChunk; i += S::kBlock) {
    const int mel = i / kChunk, frame = i % kChunk;
    if (frame >= count) continue;
    const float x = frame < valid ? stage[mel * kStageStride + frame] : p.log_shift;
    if (frame < valid) peak = fmaxf(peak, x);
    store(p, p.out_index(clip, mel, first + frame), x);
  }
  if (p.peaks && valid > 0) atomicMax(reinterpret_cast<int*>(p.peaks) + clip, ordered(peak));
}

constexpr int kStatsBlock = 1024;

// Subtrahend and gain of each clip. Grid: batch.
template <class Sample, class Sum>
__global__ void __launch_bounds__(kStatsBlock) log_mel_stats_kernel(const LogMel p) {
  __shared__ Sum sums[kStatsBlock / 32];
  __shared__ float lows[kStatsBlock / 32], highs[kStatsBlock / 32];
  const int64_t clip = blockIdx.x, length = p.length(clip);
  const Sample* x = static_cast<const Sample*>(p.pcm) + clip * p.samples;
  Sum sum = 0;
  float low = length ? float(x[0]) : 0.0f, high = low;
  for (int64_t i = threadIdx.x; i < length; i += kStatsBlock) {
    sum += x[i];
    low = fminf(low, float(x[i])), high = fmaxf(high, float(x[i]));
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // lanes, then warps
#pragma unroll
    for (int m = 16; m > 0; m >>= 1) {
      sum += __shfl_xor_sync(kAllLanes, sum, m);
      low = fminf(low, __shfl_xor_sync(kAllLanes, low, m)), high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, m));
    }
    if (half) break;
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum, lows[threadIdx.x / 32] = low, highs[threadIdx.x / 32] = high;
    __syncthreads();
    sum = sums[threadIdx.x % 32], low = lows[threadIdx.x % 32], high = highs[threadIdx.x % 32];
  }
  if (threadIdx.x == 0) {
    const double mean = length ? double(sum) / double(length) : 0.0;
    const double peak = fmax(double(high) - mean, mean - double(low)) * p.scale;
    p.stats[2 * clip] = float(mean);
    p.stats[2 * clip + 1] = p.waveform_norm == 2 ? float(p.scale / (peak + 1e-6)) : p.scale;
  }
}

// Raises values below the clip's peak - top. Grid: (any, batch).
template <class Value>
__global__ void log_mel_limit_kernel(const LogMel p) {
  const int64_t clip = blockIdx.y;
  const int frames = p.frames(p.length(clip));
  const int key = reinterpret_cast<const int*>(p.peaks)[clip];
  const float cutoff = __int_as_float(key >= 0 ? key : key ^ 0x7fffffff) - p.top;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < int64_t(p.n_mels) * frames; i += gridDim.x * blockDim.x) {
    const int64_t at = p.out_index(clip, int(i / frames), int(i % frames));
    if (float(static_cast<const Value*>(p.out)[at]) < cutoff) store(p, at, cutoff);
  }
}

}  // namespace ajepa
