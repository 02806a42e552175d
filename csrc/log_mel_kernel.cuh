// Log-mel on the GPU: one kernel computes patches from PCM. A waveform norm and top_db need one more tiny kernel each.
// A block computes kChunk frames of one clip. Two real frames share a complex transform. A thread holds 16 points,
// passes have radix 16 (both 20 for n_fft 400), and the passes exchange values through shared memory (Stockham, natural
// order). All arithmetic is fp32, because tf32 or fp16 would cause an error of a nat in quiet bins. Nothing here needs
// nvcc: the tests run this file on a CPU, with one fiber per CUDA thread.
#pragma once
#include "log_mel.h"

#ifndef AJEPA_CUDA_ON_HOST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define AJEPA_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace ajepa {

constexpr int kChunk = 16;   // frames of a block, so that a patch row has 32 bytes in bf16
constexpr int kStageStride = kChunk + 1;
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr int passes(int n, int radix) { return n < radix ? 0 : 1 + passes(n / radix, radix); }
constexpr int rest(int n, int radix) { return n < radix ? n : rest(n / radix, radix); }

template <int Points>  // points of the transform
struct Shape {
  static constexpr int N = Points;
  static constexpr bool kPowerOfTwo = (N & (N - 1)) == 0;
  static constexpr int kRadix = kPowerOfTwo ? 16 : 20;             // complex values that a thread holds
  static constexpr int kLanes = N / kRadix;                        // threads of a transform that hold values
  static constexpr int kThreads = kPowerOfTwo ? kLanes : 32;       // all threads of a transform
  static constexpr int kTogether = kThreads >= 256 ? 1 : 256 / kThreads < kChunk / 2 ? 256 / kThreads : kChunk / 2;
  static constexpr int kBlock = kThreads * kTogether, kRounds = kChunk / 2 / kTogether;
  static constexpr int kResident = (kPowerOfTwo ? 1024 : 768) / kBlock;  // blocks per multiprocessor (64, 80 registers)
  static constexpr int kWide = passes(N, kRadix), kLast = rest(N, kRadix);  // passes of kRadix, then one of radix kLast
  static constexpr int kValues = N + N / kRadix;  // in shared memory, padded to avoid bank conflicts
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
__device__ __forceinline__ float2 sixteenth(int i) {  // exp(-2 pi i / 16)^i, a constant if i is known at compile time
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

// a[q] *= w^q, from w and w^4. The rounding error of w grows with the power and is the same in all frames. A longer
// chain of powers would therefore produce an echo 100 dB below a loud bin.
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

// The transform of a pair of frames. `a` holds the inputs t + q N / kRadix, and `z` receives the spectrum in natural
// order. Offsets are split so that one register plus immediate values address all values of a thread. `twiddles` holds
// w and w^4 for the threads of each pass, one pass after the other.
template <class S>
__device__ __forceinline__ void transform(float2 (&a)[S::kRadix], float2* z, int t, const float4* twiddles) {
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
    float4 w = make_float4(1, 0, 1, 0);
    if (S::holds(t)) {
      w = twiddles[k];
#pragma unroll
      for (int q = 0; q < R; ++q) a[q] = mine[S::padded(q * T)];
    }
    twiddles += L;
    __syncthreads();
    if (S::holds(t)) {
      twist<R>(a, make_float2(w.x, w.y), make_float2(w.z, w.w));
      dft<R>(a);
      float2* const to = z + (R + 1) * (t - k) + S::padded(k);
#pragma unroll
      for (int q = 0; q < R; ++q) to[S::padded(q * L)] = a[q];
    }
    __syncthreads();
  }
  if constexpr (S::kLast > 1) {
    const float4 first = twiddles[t];
    constexpr int Last = S::kLast, each = R / Last, L = S::N / Last;
#pragma unroll
    for (int i = 0; i < each; ++i)
#pragma unroll
      for (int q = 0; q < Last; ++q) a[i * Last + q] = mine[S::padded(i * T + q * L)];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const float2 w = make_float2(first.x, first.y), w4 = make_float2(first.z, first.w);
      twist<Last>(a + i * Last, i ? mul(w, sixteenth(i)) : w, i ? mul(w4, sixteenth(4 * i)) : w4);
      dft<Last>(a + i * Last);
#pragma unroll
      for (int q = 0; q < Last; ++q) mine[S::padded(i * T + q * L)] = a[i * Last + q];
    }
    __syncthreads();
  }
}

template <class T>
struct Range {  // sum, minimum and maximum of a frame's samples
  T sum, low, high;
  __device__ __forceinline__ void take(T x) { sum += x, low = min(low, x), high = max(high, x); }
  __device__ __forceinline__ void take(T x, bool counts);
};
// The frame's first sample replaces values outside the frame. For integers, `surplus` removes it from the sum at the
// end, which costs less.
template <>
__device__ __forceinline__ void Range<int>::take(int x, bool) { take(x); }
template <>
__device__ __forceinline__ void Range<float>::take(float x, bool counts) {
  sum += counts ? x : 0.0f, low = min(low, x), high = max(high, x);
}
__device__ __forceinline__ int surplus(int first, int outside) { return first * outside; }
__device__ __forceinline__ float surplus(float, int) { return 0; }
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

// Merges the ranges of both frames over the threads of a transform. Every thread receives the result.
template <int Threads, class T>
__device__ __forceinline__ void merge_threads(Range<T> (&both)[2], int (*scratch)[6]) {
  constexpr int warps = Threads / 32;
#pragma unroll
  for (int f = 0; f < 2; ++f) merge_lanes<(Threads < 32 ? Threads : 32)>(both[f]);
  if constexpr (warps > 1) {
    const int warp = threadIdx.x / 32, first = warp / warps * warps;
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        int* const to = scratch[warp] + 3 * f;
        to[0] = bits_of(both[f].sum), to[1] = bits_of(both[f].low), to[2] = bits_of(both[f].high);
      }
    __syncthreads();
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const int* from = scratch[first + threadIdx.x % warps] + 3 * f;
      both[f] = {as<T>(from[0]), as<T>(from[1]), as<T>(from[2])};
      merge_lanes<warps>(both[f]);
    }
  }
}

template <class Sample>
struct Total {
  using type = float;
};
template <>
struct Total<int16_t> {
  using type = int;  // exact
};
__device__ __forceinline__ float mean_of(float sum, int count) { return sum / float(count); }
__device__ __forceinline__ float mean_of(int sum, int count) {  // rounds only once, although a sum may need 29 bits
  const float whole = rintf(float(sum) / float(count));
  return whole + float(sum - int(whole) * count) / float(count);
}

struct Chunk {  // the frames of a block; in shared memory, to save registers
  int clip, length, first, valid;  // `first`: first frame; `valid`: frames of the chunk that the clip has
  float mean, gain;
};

// Loads two frames of the clip into `a`: (sample - offset), pre-emphasised and windowed. Rounding errors leak from one
// frame of a transform into the other. The second frame is therefore scaled to the first one's level, by a power of
// two, which is exact; and a silent frame gets gain 0, which drops the leak. `gains` holds the factors of the frames'
// powers (or magnitudes), which the transform yields from twice the spectrum.
template <class S, class Sample>
__device__ __forceinline__ void load_frames(const LogMel& p, const Chunk& chunk, int frame, int t, float2 (&a)[S::kRadix],
                                            float* gains, int (*scratch)[6], float2* places) {
  using Sum = typename Total<Sample>::type;
  const int even = chunk.first + min(frame, chunk.valid - 1), odd = chunk.first + min(frame + 1, chunk.valid - 1);
  const int x_start = even * p.hop_length + p.first_sample, y_start = odd * p.hop_length + p.first_sample;
  const int length = chunk.length;
  const Sample* const clip = static_cast<const Sample*>(p.pcm) + chunk.clip * p.samples;
  // No barrier may be inside these branches, because the transforms of one block may take different ones.
  const bool inside = x_start >= 0 && y_start + p.win_length <= length;
  const Sample *const x_from = clip + x_start + t, *const y_from = clip + y_start + t;
  const auto mirrored = [&](int i) { return clip[p.mirror(i, length)]; };
  const int left = S::holds(t) ? p.win_length - t : 0;  // a thread has the samples with q kLanes < left

  const Sum x_any = mirrored(x_start), y_any = mirrored(y_start);
  Range<Sum> range[2] = {{0, x_any, x_any}, {0, y_any, y_any}};
  if (inside) {
#pragma unroll
    for (int q = 0; q < S::kRadix; ++q) {
      const bool in = q * S::kLanes < left;
      const Sum x = in ? Sum(x_from[q * S::kLanes]) : x_any, y = in ? Sum(y_from[q * S::kLanes]) : y_any;
      range[0].take(x, in), range[1].take(y, in);
      a[q] = make_float2(float(x), float(y));
    }
    const int outside = S::kRadix - min(S::kRadix, (max(left, 0) + S::kLanes - 1) / S::kLanes);
    range[0].sum -= surplus(x_any, outside), range[1].sum -= surplus(y_any, outside);
  } else {
#pragma unroll 1
    for (int n = t; n < p.win_length; n += S::kThreads)
      range[0].take(mirrored(x_start + n)), range[1].take(mirrored(y_start + n));
  }
  merge_threads<S::kThreads>(range, scratch);

  const float x_offset = p.remove_dc ? mean_of(range[0].sum, p.win_length) : chunk.mean;
  const float y_offset = p.remove_dc ? mean_of(range[1].sum, p.win_length) : chunk.mean;
  const float x_loud = fmaxf(float(range[0].high) - x_offset, x_offset - float(range[0].low));
  const float y_loud = fmaxf(float(range[1].high) - y_offset, y_offset - float(range[1].low));
  int level = (__float_as_int(x_loud) >> 23) - (__float_as_int(y_loud) >> 23);
  level = x_loud > 0 && y_loud > 0 ? max(-60, min(60, level)) : 0;
  if (t == 0) {
    const float lower = __int_as_float((127 - level) << 23), x_unit = 0.5f * chunk.gain, y_unit = x_unit * lower;
    gains[0] = x_loud > 0 ? (p.power == 2 ? x_unit * x_unit : x_unit) : 0.0f;
    gains[1] = y_loud > 0 ? (p.power == 2 ? y_unit * y_unit : y_unit) : 0.0f;
  }
  const float lift = __int_as_float((127 + level) << 23), y_lifted = y_offset * lift, c = p.preemphasis;
  if (inside) {
    const float* const window = p.window + t;
    if (c != 0) {
#pragma unroll
      for (int q = 0; q < S::kRadix; ++q) {
        const bool in = q * S::kLanes < left && (q || t);  // the first sample has none before it and uses itself
        const float x = in ? float(x_from[q * S::kLanes - 1]) : a[q].x, y = in ? float(y_from[q * S::kLanes - 1]) : a[q].y;
        a[q].x = fmaf(-c, x - x_offset, a[q].x - x_offset);
        a[q].y = fmaf(-c, fmaf(y, lift, -y_lifted), fmaf(a[q].y, lift, -y_lifted));
      }
    } else {
#pragma unroll
      for (int q = 0; q < S::kRadix; ++q) a[q] = make_float2(a[q].x - x_offset, fmaf(a[q].y, lift, -y_lifted));
    }
#pragma unroll
    for (int q = 0; q < S::kRadix; ++q) {
      const float w = q * S::kLanes < left ? window[q * S::kLanes] : 0.0f;
      a[q] = make_float2(a[q].x * w, a[q].y * w);
    }
  } else {  // rare, so a loop; it uses the shared memory that this thread writes next
    if (S::holds(t)) {
#pragma unroll 1
      for (int q = 0; q < S::kRadix; ++q) {
        const int n = t + q * S::kLanes, before = n ? n - 1 : 0;
        float2 out = make_float2(0, 0);
        if (n < p.win_length) {
          out.x = fmaf(-c, float(mirrored(x_start + before)) - x_offset, float(mirrored(x_start + n)) - x_offset);
          out.y = fmaf(-c, float(mirrored(y_start + before)) - y_offset, float(mirrored(y_start + n)) - y_offset);
          out.x *= p.window[n], out.y *= p.window[n] * lift;
        }
        places[q] = out;
      }
#pragma unroll
      for (int q = 0; q < S::kRadix; ++q) a[q] = places[q];
    }
  }
}

template <class Value>
__device__ __forceinline__ Value rounded(float x);
template <>
__device__ __forceinline__ float rounded<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half rounded<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 rounded<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Packs consecutive values into 16 bytes of the result.
__device__ __forceinline__ uint4 packed(const float* x, float) {
  return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}
__device__ __forceinline__ unsigned bits_of(__half2 x) { return reinterpret_cast<const unsigned&>(x); }
__device__ __forceinline__ unsigned bits_of(__nv_bfloat162 x) { return reinterpret_cast<const unsigned&>(x); }
__device__ __forceinline__ uint4 packed(const float* x, __half) {
  return make_uint4(bits_of(__floats2half2_rn(x[0], x[1])), bits_of(__floats2half2_rn(x[2], x[3])),
                    bits_of(__floats2half2_rn(x[4], x[5])), bits_of(__floats2half2_rn(x[6], x[7])));
}
__device__ __forceinline__ uint4 packed(const float* x, __nv_bfloat16) {
  return make_uint4(bits_of(__floats2bfloat162_rn(x[0], x[1])), bits_of(__floats2bfloat162_rn(x[2], x[3])),
                    bits_of(__floats2bfloat162_rn(x[4], x[5])), bits_of(__floats2bfloat162_rn(x[6], x[7])));
}

// Stores `Frames` frames of bands mel, mel + bands, mel + 2 bands ..., from `from` to `out`.
template <int Frames, class Value>
__device__ __forceinline__ void store_bands(const LogMel& p, int mel, int bands, const float* from, int64_t at) {
  const int64_t skipped = (p.patches - 1) * int64_t(p.patch_mels) * p.patch_frames;
#pragma unroll 1
  for (; mel < p.n_mels; mel += bands, from += bands * kStageStride) {
    Value* const to = static_cast<Value*>(p.out) + at + int64_t(mel) * p.patch_frames +
                      (mel * p.patch_mels_inverse >> 16) * skipped;
    if constexpr (Frames > 1) __stcg(reinterpret_cast<uint4*>(to), packed(from, Value()));  // a plain store is split
    else *to = rounded<Value>(*from);
  }
}
// Stores the chunk that begins at frame `first`, in patch order, with 16-byte stores if the patch width allows it.
template <int Block>
__device__ __forceinline__ void store_chunk(const LogMel& p, int64_t clip, int first, const float* stage) {
  const int most = p.dtype == Out::kFloat ? 4 : 8;
  const int frames = p.patch_frames % most == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0 ? most : 1;
  const int place = threadIdx.x * frames, frame = first + place % kChunk, patch = frame / p.patch_frames;
  if (patch >= p.patches) return;
  const int64_t at = ((clip * p.patch_rows * p.patches + patch) * p.patch_mels - patch) * p.patch_frames + frame;
  const int mel = place / kChunk, bands = Block * frames / kChunk;
  const float* const from = stage + mel * kStageStride + place % kChunk;
  if (p.dtype == Out::kFloat) {
    if (frames > 1) store_bands<4, float>(p, mel, bands, from, at);
    else store_bands<1, float>(p, mel, bands, from, at);
  } else if (p.dtype == Out::kHalf) {
    if (frames > 1) store_bands<8, __half>(p, mel, bands, from, at);
    else store_bands<1, __half>(p, mel, bands, from, at);
  } else {
    if (frames > 1) store_bands<8, __nv_bfloat16>(p, mel, bands, from, at);
    else store_bands<1, __nv_bfloat16>(p, mel, bands, from, at);
  }
}
__device__ __forceinline__ int ordered(float x) {  // maps floats to integers in the same order
  const int bits = __float_as_int(x);
  return bits >= 0 ? bits : bits ^ 0x7fffffff;
}

// Grid: batch * ceil(frames written / kChunk).
template <int Points, class Sample>
__global__ void __launch_bounds__(Shape<Points>::kBlock, Shape<Points>::kResident) log_mel_fwd_kernel(const LogMel p) {
  using S = Shape<Points>;
  constexpr int N = S::N, T = S::kThreads, R = S::kRadix;
  AJEPA_DYNAMIC_SHARED(float4, shared);
  __shared__ int scratch[S::kBlock > 32 ? S::kBlock / 32 : 1][6];
  const int group = threadIdx.x / T, t = threadIdx.x % T;
  float4* partials = shared + group * p.n_segments;  // per segment: falling and rising sums of both frames
  float2* z = reinterpret_cast<float2*>(shared + S::kTogether * p.n_segments) + group * S::kValues;
  float* stage = reinterpret_cast<float*>(reinterpret_cast<float2*>(shared + S::kTogether * p.n_segments) +
                                          S::kTogether * S::kValues);

  __shared__ Chunk chunk;
  __shared__ float gains[S::kTogether][2];  // for both frames of a pair
  if (threadIdx.x == 0) {
    const int chunks = (p.patches * p.patch_frames + kChunk - 1) / kChunk;
    chunk.clip = blockIdx.x / chunks, chunk.first = int(blockIdx.x % chunks) * kChunk;
    chunk.length = int(p.length(chunk.clip)), chunk.valid = min(p.frames(chunk.length) - chunk.first, kChunk);
    chunk.mean = p.stats ? p.stats[2 * int64_t(chunk.clip)] : 0.0f;
    chunk.gain = p.stats ? p.stats[2 * int64_t(chunk.clip) + 1] : p.scale;
  }
  __syncthreads();

  for (int round = 0; round < S::kRounds && 2 * S::kTogether * round < chunk.valid; ++round) {
    const int pair = round * S::kTogether + group;
    float2 a[R];
    load_frames<S, Sample>(p, chunk, 2 * pair, t, a, gains[group], scratch, z + (R + 1) * t);
    transform<S>(a, z, t, reinterpret_cast<const float4*>(p.twiddles));

    // X = (Z[k] + conj Z[N - k]) / 2, Y = (Z[k] - conj Z[N - k]) / 2i. The same thread reads and writes a pair of bins.
    const auto split = [&](float2* at, float2 v) {
      const float2 u = *at, x = make_float2(u.x + v.x, u.y - v.y), y = make_float2(u.y + v.y, v.x - u.x);
      *at = make_float2(x.x * x.x + x.y * x.y, y.x * y.x + y.y * y.y);
    };
    if constexpr (S::kPowerOfTwo && T % R == 0) {
      float2 *const up = z + S::padded(t), *const down = z + S::padded(N - t);
#pragma unroll
      for (int j = 0; j < N / 2 / T; ++j) split(up + S::padded(j * T), j || t ? down[-S::padded(j * T)] : z[0]);
      if (t == 0) split(z + S::padded(N / 2), z[S::padded(N / 2)]);
    } else {
      for (int k = t; k <= N / 2; k += T) split(z + S::padded(k), z[S::padded(k ? N - k : 0)]);
    }
    if (p.power == 1) {
#pragma unroll 1
      for (int k = t; k <= N / 2; k += T) {
        float2& power = z[S::padded(k)];
        power = make_float2(sqrtf(power.x), sqrtf(power.y));
      }
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
    const float gain_x = gains[group][0], gain_y = gains[group][1], log_scale = p.log_scale * 0.69314718055994531f;
    for (int m = t; m < p.n_mels; m += T) {
      float x = 0, y = 0;
      const int begin = p.offsets[m], middle = p.offsets[m + 1], end = p.offsets[m + 2];
#pragma unroll 1
      for (int s = begin; s < middle; ++s) x += partials[s].z, y += partials[s].w;
#pragma unroll 1
      for (int s = middle; s < end; ++s) x += partials[s].x, y += partials[s].y;
      x *= gain_x, y *= gain_y;  // NaN stays NaN in both frames of the pair
      if (p.take_log) {
        x = __log2f(x < p.floor ? p.floor : x) * log_scale + p.log_shift;
        y = __log2f(y < p.floor ? p.floor : y) * log_scale + p.log_shift;
      }
      stage[m * kStageStride + 2 * pair] = x, stage[m * kStageStride + 2 * pair + 1] = y;
    }
    __syncthreads();
  }

  if (chunk.valid < kChunk) {  // rows of zeros after the clip's last frame
#pragma unroll 1
    for (int i = threadIdx.x; i < p.n_mels * kChunk; i += S::kBlock)
      if (i % kChunk >= chunk.valid) stage[i / kChunk * kStageStride + i % kChunk] = p.log_shift;
    __syncthreads();
  }
  store_chunk<S::kBlock>(p, chunk.clip, chunk.first, stage);
  if (p.peaks && chunk.valid > 0) {
    float peak = -INFINITY;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.n_mels * kChunk; i += S::kBlock)
      if (i % kChunk < chunk.valid) peak = fmaxf(peak, stage[i / kChunk * kStageStride + i % kChunk]);
    atomicMax(reinterpret_cast<int*>(p.peaks) + chunk.clip, ordered(peak));
  }
}

constexpr int kStatsBlock = 1024;

// Computes the mean to subtract and the gain of each clip. Grid: batch.
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
  for (int half = 0; half < 2; ++half) {  // first over lanes, then over warps
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
    if (float(static_cast<const Value*>(p.out)[at]) < cutoff) static_cast<Value*>(p.out)[at] = rounded<Value>(cutoff);
  }
}

}  // namespace ajepa
