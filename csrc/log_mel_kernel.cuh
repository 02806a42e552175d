// Log-mel on the GPU: one kernel computes patches from PCM. A waveform norm and top_db need one more tiny kernel each.
// A block computes kChunk frames of one clip. A real frame of N samples is a complex transform of N / 2 points, whose
// real parts are the even samples. A thread holds 16 points and passes have radix 16; 200 points are 20 x 10, 320 are
// 20 x 4 x 4 and 600 are 25 x 24, with 20 or 25 points a thread. The passes exchange values through shared memory
// (Stockham, natural order). All arithmetic is fp32, because tf32 or fp16 would cause an error of a nat in quiet bins.
// Nothing here needs nvcc: the tests run this file on a CPU, with one fiber per CUDA thread.
#pragma once
#include <type_traits>

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

template <int Points>  // samples of a frame, padded by zeros
struct Shape {
  static constexpr int N = Points / 2;  // points of the transform
  static constexpr bool kPowerOfTwo = (N & (N - 1)) == 0;
  static constexpr int kRadix = kPowerOfTwo ? 16 : N == 600 ? 25 : 20;  // of the first pass, whose inputs a thread holds
  static constexpr int kLanes = N / kRadix;                             // threads of a frame that hold them
  static constexpr int kThreads = kPowerOfTwo ? kLanes : N == 600 ? 32 : 16;  // all threads of a frame
  static constexpr int kPair = 2 * kThreads;                  // threads of two frames, whose powers lie side by side
  // With 25 points a thread needs 96 registers (ptxas spills at 80 for sm_100), which 640 threads of a multiprocessor have.
  static constexpr int kMost = N == 600 ? 128 : 256;  // threads of a block, unless a pair has more
  static constexpr int kTogether = kPair >= kMost ? 1 : kMost / kPair < kChunk / 2 ? kMost / kPair : kChunk / 2;  // pairs
  static constexpr int kBlock = kPair * kTogether;
  static constexpr int kResident = (kPowerOfTwo ? 1024 : N == 600 ? 640 : 768) / kBlock;  // blocks of a multiprocessor
  static constexpr int kWide = passes(N, kRadix);                    // passes of radix kRadix,
  static constexpr int kMiddle = N == 320 ? 4 : 1;                   // then one of radix kMiddle
  static constexpr int kLast = rest(N, kRadix) / kMiddle;            // and one of radix kLast
  static constexpr int kFinal = kLast > 1 ? kLast : kRadix;          // radix of the pass that ends the transform
  static constexpr int kEach = kRadix / kFinal;                      // its butterflies of a thread
  static constexpr int kHeld = kEach * kFinal, kEnders = N / kHeld;  // bins of a thread at the end, and threads with bins
  static constexpr int kPad = kRadix % 2 == 0;  // values are padded against bank conflicts where the radix is even
  static constexpr int kValues = N + (kPad ? N / kRadix : 3);  // of a frame in shared memory
  static constexpr int kPowers = N + 2;           // where the powers of a pair begin among its values
  static constexpr int kRoots = twiddle_rows(Points) - N / 4;  // where those of `split` begin among the twiddles
  static constexpr bool kInWarp = kPair <= 32;    // a warp owns its pairs, and no other warp needs to wait for it
  static_assert((kPowerOfTwo || N == 200 || N == 320 || N == 600) && N + 3 <= kValues && kHeld % 2 == 0);

  static __device__ __forceinline__ constexpr int padded(int i) { return kPad ? i + int(unsigned(i) / kRadix) : i; }
  static __device__ __forceinline__ bool holds(int t) { return kLanes == kThreads || t < kLanes; }
  static __device__ __forceinline__ bool ends(int t) { return kEnders == kThreads || t < kEnders; }
  static __device__ __forceinline__ void sync() {  // the threads of a pair
    if constexpr (kInWarp) __syncwarp();
    else __syncthreads();
  }
};

// The number of this thread. It is read anew at each call: registers are too few to keep it and what follows from it.
__device__ __forceinline__ int thread_number() {
#ifdef __CUDA_ARCH__
  int number;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
  return number;
#else
  return threadIdx.x;
#endif
}

// No memory access moves across this, which bounds the number of loads in flight and so of registers.
__device__ __forceinline__ void keep_order() {
#ifdef __CUDA_ARCH__
  asm volatile("" ::: "memory");
#endif
}

inline int64_t shared_bytes(const LogMel& p, int together, int values) {
  return int64_t(together) * 2 * values * 8 + int64_t(p.n_mels) * kStageStride * 4;
}

__device__ __forceinline__ float2 add(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ __forceinline__ float2 sub(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
__device__ __forceinline__ float2 times_minus_i(float2 a) { return make_float2(a.y, -a.x); }
__device__ __forceinline__ float2 mul(float2 a, float2 b) {
  return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x);
}
template <int R>
__device__ __forceinline__ float2 root(int i) {  // exp(-2 pi i / R)^i, a constant if i is known at compile time
  if constexpr (R == 20) {
    constexpr float kCos[20] = {1.0f,  0.95105651629515357f,  0.80901699437494742f,  0.58778525229247313f,  0.30901699437494742f,
                                0.0f,  -0.30901699437494742f, -0.58778525229247313f, -0.80901699437494742f, -0.95105651629515357f,
                                -1.0f, -0.95105651629515357f, -0.80901699437494742f, -0.58778525229247313f, -0.30901699437494742f,
                                0.0f,  0.30901699437494742f,  0.58778525229247313f,  0.80901699437494742f,  0.95105651629515357f};
    return make_float2(kCos[i % 20], kCos[(i + 5) % 20]);
  } else if constexpr (R == 24) {
    constexpr float kCos[24] = {1.0f,  0.96592582628906829f,  0.86602540378443865f,  0.70710678118654752f,  0.5f,  0.25881904510252076f,
                                0.0f,  -0.25881904510252076f, -0.5f, -0.70710678118654752f, -0.86602540378443865f, -0.96592582628906829f,
                                -1.0f, -0.96592582628906829f, -0.86602540378443865f, -0.70710678118654752f, -0.5f, -0.25881904510252076f,
                                0.0f,  0.25881904510252076f,  0.5f,  0.70710678118654752f,  0.86602540378443865f,  0.96592582628906829f};
    return make_float2(kCos[i % 24], kCos[(i + 6) % 24]);
  } else if constexpr (R == 25) {  // up to 4 x 4, as no product of two indices is larger
    constexpr float kCos[17] = {1.0f, 0.96858316112863108f, 0.87630668004386358f, 0.72896862742141155f, 0.53582679497899655f,
                                0.30901699437494745f, 0.06279051952931353f, -0.1873813145857246f, -0.42577929156507272f, -0.63742398974868975f,
                                -0.80901699437494734f, -0.92977648588825135f, -0.99211470131447776f, -0.99211470131447788f, -0.92977648588825146f,
                                -0.80901699437494778f, -0.63742398974868952f};
    constexpr float kSin[17] = {0.0f, 0.24868988716485479f, 0.48175367410171532f, 0.68454710592868862f, 0.84432792550201508f,
                                0.95105651629515353f, 0.99802672842827156f, 0.98228725072868872f, 0.90482705246601947f, 0.77051324277578925f,
                                0.58778525229247325f, 0.36812455268467814f, 0.12533323356430454f, -0.12533323356430429f, -0.36812455268467792f,
                                -0.58778525229247269f, -0.77051324277578936f};
    return make_float2(kCos[i], -kSin[i]);
  } else {
    static_assert(R == 16);
    constexpr float kCos[16] = {1.0f,  0.92387953251128674f,  0.70710678118654752f,  0.38268343236508977f,
                                0.0f,  -0.38268343236508977f, -0.70710678118654752f, -0.92387953251128674f,
                                -1.0f, -0.92387953251128674f, -0.70710678118654752f, -0.38268343236508977f,
                                0.0f,  0.38268343236508977f,  0.70710678118654752f,  0.92387953251128674f};
    return make_float2(kCos[i & 15], kCos[(i + 4) & 15]);
  }
}

template <int R>
__device__ __forceinline__ float2 rotate(float2 a, int i) {
  return 4 * i == R ? times_minus_i(a) : mul(a, root<R>(i));
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
__device__ __forceinline__ void dft<3>(float2* a) {
  constexpr float s = 0.86602540378443865f;
  const float2 p = add(a[1], a[2]), d = times_minus_i(sub(a[1], a[2]));
  const float2 r = make_float2(a[0].x - 0.5f * p.x, a[0].y - 0.5f * p.y);
  a[0] = add(a[0], p), a[1] = make_float2(r.x + s * d.x, r.y + s * d.y), a[2] = make_float2(r.x - s * d.x, r.y - s * d.y);
}
template <>
__device__ __forceinline__ void dft<4>(float2* a) {
  const float2 s = add(a[0], a[2]), d = sub(a[0], a[2]), t = add(a[1], a[3]), e = times_minus_i(sub(a[1], a[3]));
  a[0] = add(s, t), a[1] = add(d, e), a[2] = sub(s, t), a[3] = sub(d, e);
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
__device__ __forceinline__ void dft4_of_three(float2* a) {  // a[3] is zero
  const float2 s = add(a[0], a[2]), d = sub(a[0], a[2]), t = a[1], e = times_minus_i(a[1]);
  a[0] = add(s, t), a[1] = add(d, e), a[2] = sub(s, t), a[3] = sub(d, e);
}
template <int A, int B, int Count = A * B>  // only the first Count values may differ from zero
__device__ __forceinline__ void dft_of_two_factors(float2* a) {
  constexpr int Roots = 20 % (A * B) == 0 ? 20 : 16 % (A * B) == 0 ? 16 : A * B;
  float2 column[A][B];
#pragma unroll
  for (int i = 0; i < A; ++i) {
#pragma unroll
    for (int j = 0; j < B; ++j) column[i][j] = a[i + A * j];
    if (B == 4 && i + A * 3 >= Count) dft4_of_three(column[i]);
    else dft<B>(column[i]);
  }
#pragma unroll
  for (int q = 0; q < B; ++q) {
    float2 row[A];
#pragma unroll
    for (int i = 0; i < A; ++i)
      row[i] = i && q ? rotate<Roots>(column[i][q], i * q * (Roots / (A * B))) : column[i][q];
    dft<A>(row);
#pragma unroll
    for (int i = 0; i < A; ++i) a[q + B * i] = row[i];
  }
}
template <>
__device__ __forceinline__ void dft<8>(float2* a) { dft_of_two_factors<2, 4>(a); }
template <>
__device__ __forceinline__ void dft<10>(float2* a) { dft_of_two_factors<2, 5>(a); }
template <>
__device__ __forceinline__ void dft<16>(float2* a) { dft_of_two_factors<4, 4>(a); }
template <>
__device__ __forceinline__ void dft<20>(float2* a) { dft_of_two_factors<4, 5>(a); }
template <>
__device__ __forceinline__ void dft<24>(float2* a) { dft_of_two_factors<3, 8>(a); }
template <>
__device__ __forceinline__ void dft<25>(float2* a) { dft_of_two_factors<5, 5>(a); }

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
      a[q] = mul(a[q], high), a[q + 1] = mul(a[q + 1], mul(high, w));
      if (q + 2 < R) a[q + 2] = mul(a[q + 2], mul(high, w2)), a[q + 3] = mul(a[q + 3], mul(high, w3));
      high = mul(high, w4);
    }
  }
}

// The transform of a frame after its first pass, whose results `a` holds. `a` receives the spectrum at bins t + j kEnders, in the
// order of `bin_of`. Offsets are split so that one register plus immediate values address all values of a thread.
// `twiddles` holds w and w^4 for the threads of each pass, one pass after the other. When this returns, the threads of
// the pair have read all values, so their memory is free.
template <class S>
__device__ __forceinline__ void transform(float2 (&a)[S::kRadix], float2* z, int t, const float4* twiddles) {
  constexpr int R = S::kRadix, T = S::kLanes;
  float2* const mine = z + S::padded(t);
  if (S::holds(t)) {
#pragma unroll
    for (int q = 0; q < R; ++q) z[(R + S::kPad) * t + q] = a[q];
  }
  S::sync();
#pragma unroll
  for (int pass = 1, L = R; pass < S::kWide; ++pass, L *= R) {
    const int k = t & (L - 1);
    float4 w = make_float4(1, 0, 1, 0);
    if (S::holds(t)) {
      w = twiddles[k];
#pragma unroll
      for (int q = 0; q < R; ++q) a[q] = mine[S::padded(q * T)];
    }
    twiddles += L;
    S::sync();
    if (S::holds(t)) {
      twist<R>(a, make_float2(w.x, w.y), make_float2(w.z, w.w));
      dft<R>(a);
    }
    if (L * R == S::N) return;
    if (S::holds(t)) {
      float2* const to = z + (R + 1) * (t - k) + S::padded(k);
#pragma unroll
      for (int q = 0; q < R; ++q) to[S::padded(q * L)] = a[q];
    }
    S::sync();
  }
  if constexpr (S::kMiddle > 1) {  // kLanes is no multiple of kRadix here, so that each butterfly finds its own places
    constexpr int M = S::kMiddle, L = R, apart = S::padded(S::N / M), to_apart = S::padded(L);
    if (S::holds(t)) {
#pragma unroll
      for (int i = 0; i < R / M; ++i) {
        const float2* const from = z + S::padded(t + i * T);
#pragma unroll
        for (int q = 0; q < M; ++q) a[i * M + q] = from[q * apart];
      }
    }
    S::sync();
    if (S::holds(t)) {
#pragma unroll
      for (int i = 0; i < R / M; ++i) {
        const int k = (t + i * T) % L;
        const float4 w = twiddles[k];
        twist<M>(a + i * M, make_float2(w.x, w.y), make_float2(w.z, w.w));
        dft<M>(a + i * M);
        float2* const to = z + (t + i * T) / L * M * to_apart + k;
#pragma unroll
        for (int q = 0; q < M; ++q) to[q * to_apart] = a[i * M + q];
      }
    }
    S::sync();
    twiddles += L;
  }
  if constexpr (S::kLast > 1) {
    constexpr int Last = S::kLast, each = S::kEach, T = S::kEnders, L = S::N / Last;
    if (S::ends(t)) {
#pragma unroll
      for (int i = 0; i < each; ++i) {
        const float2* const from = S::kMiddle > 1 ? z + S::padded(t + i * T) : mine + S::padded(i * T);
#pragma unroll
        for (int q = 0; q < Last; ++q) a[i * Last + q] = from[S::padded(q * L)];
      }
    }
    S::sync();
    const float4 first = twiddles[S::ends(t) ? t : 0];  // loaded here to keep registers free
    const float2 w = make_float2(first.x, first.y), w4 = make_float2(first.z, first.w);
#pragma unroll
    for (int i = 0; i < each; ++i) {
      twist<Last>(a + i * Last, i ? rotate<R>(w, i) : w, i ? rotate<R>(w4, 4 * i) : w4);
      dft<Last>(a + i * Last);
    }
  }
}
// Where `transform` leaves bin t + j kEnders.
template <class S>
__device__ __forceinline__ constexpr int bin_of(int j) {
  return j % S::kEach * S::kFinal + j / S::kEach;
}

// Computes the powers of a frame's bins from the transform z of its samples, x of the even and y of the odd ones:
// 2 X[k] = E - i w^k O and 2 conj X[N - k] = E + i w^k O, where E = Z[k] + conj Z[N - k], O = Z[k] - conj Z[N - k] and
// w = exp(-i pi / N). A thread has the bins Z[k] below N / 2 in registers and gets Z[N - k] from another thread.
template <class S>
__device__ __forceinline__ void split(const LogMel& p, const float2 (&a)[S::kRadix], float2* values, const float2* roots) {
  constexpr int N = S::N, R = S::kHeld, T = S::kEnders;
  const int number = thread_number(), f = number / S::kThreads % 2, t = number % S::kThreads;
  float2* const pair = values + number / S::kPair * 2 * S::kValues;
  float2* const upper = pair + f * (N / 2 + 1);  // Z[N / 2] to Z[N] = Z[0]
  float* const powers = reinterpret_cast<float*>(pair + S::kPowers) + f;
  if (S::ends(t)) {
#pragma unroll
    for (int j = R / 2; j < R; ++j) upper[t + (j - R / 2) * T] = a[bin_of<S>(j)];
    if (t == 0) upper[N / 2] = a[0];
  }
  S::sync();
  if (S::ends(t)) {
    const float2* const mirrored = upper + N / 2 - t;
    float *const up = powers + 2 * t, *const down = powers + 2 * (N - t);
#pragma unroll
    for (int j = 0; j < R / 2; ++j) {
      const float2 u = a[bin_of<S>(j)], v = mirrored[-j * T], w = roots[t + j * T];
      const float2 e = make_float2(u.x + v.x, u.y - v.y), o = times_minus_i(mul(make_float2(u.x - v.x, u.y + v.y), w));
      const float2 x = add(e, o), y = sub(e, o);
      up[2 * j * T] = x.x * x.x + x.y * x.y, down[-2 * j * T] = y.x * y.x + y.y * y.y;
    }
    if (t < 3) powers[2 * (N + 1 + t)] = 0;  // `add_bands` reads four bins at once
    if (t == 0) {
      const float2 u = a[bin_of<S>(R / 2)];
      powers[N] = 4 * (u.x * u.x + u.y * u.y);
    }
    if (p.power == 1) {
#pragma unroll 1
      for (int j = 0; j <= R / 2; ++j) {
        if (j == R / 2 && t) break;
        float &x = up[2 * j * T], &y = down[-2 * j * T];
        x = sqrtf(x);
        if (j < R / 2) y = sqrtf(y);
      }
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
__device__ __forceinline__ float held(float x) { return x; }
__device__ __forceinline__ int held(int x) {  // hides from the compiler that x was widened
#ifdef __CUDA_ARCH__
  asm("" : "+r"(x));
#endif
  return x;
}
// Adds up `sum` over the threads of a frame. Every thread receives the result.
template <class S, class T>
__device__ __forceinline__ T sum_of_threads(T sum, T* scratch) {
  constexpr int width = S::kThreads < 32 ? S::kThreads : 32, warps = S::kThreads / width;
  if constexpr (width == 32 && std::is_same<T, int>::value) {
    sum = __reduce_add_sync(kAllLanes, sum);
  } else {
#pragma unroll
    for (int m = width / 2; m > 0; m >>= 1) sum += __shfl_xor_sync(kAllLanes, sum, m);
  }
  if constexpr (warps > 1) {
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) scratch[warp] = sum;
    __syncthreads();
    const T* const from = scratch + warp / warps * warps;
    sum = from[0];
#pragma unroll
    for (int i = 1; i < warps; ++i) sum += from[i];
  }
  return sum;
}
__device__ __forceinline__ float mean_of(float sum, int count, float) { return sum / float(count); }
__device__ __forceinline__ float mean_of(int sum, int count, float inverse) {  // exact for a constant frame
  const float whole = rintf(float(sum) * inverse);                             // a sum may need 29 bits
  return whole + float(sum - int(whole) * count) * inverse;
}

struct Chunk {  // the frames of a block; in shared memory, to save registers
  int clip, length, first, valid;  // `first`: first frame; `valid`: frames of the chunk that the clip reaches
  float mean, unit;                // `unit`: factor of the powers (or magnitudes), which are those of twice the spectrum
  float log_scale, inverse;        // of log2; 1 / win_length
  int column;                      // of the first frame in its patch
  int64_t out;                     // where the clip's patches begin
};

// Loads the samples 2 (t + q kLanes) and the next ones of a frame that lies within its clip, for q < Count, and zeros
// outside the window. `from` points at the first one. A thread has samples up to `left` after it, but at least those of
// q < Full.
template <class S, int Count, int Full, class Sample>
__device__ __forceinline__ typename Total<Sample>::type load_samples(const Sample* from, int left, float2 (&a)[S::kRadix]) {
  using Sum = typename Total<Sample>::type;
  Sum sum = 0;
#pragma unroll
  for (int q = 0; q < Count; ++q) {
    const int n = 2 * q * S::kLanes;
    const Sum x = q < Full || n < left ? held(Sum(from[n])) : Sum(0);  // else I2F.S16, at a quarter of the rate
    const Sum y = q < Full || n + 1 < left ? held(Sum(from[n + 1])) : Sum(0);
    sum += x + y;
    a[q] = make_float2(float(x), float(y));
  }
#pragma unroll
  for (int q = Count; q < S::kRadix; ++q) a[q] = make_float2(0, 0);
  return sum;
}
// Subtracts `offset`, applies the pre-emphasis, multiplies by the window and begins the transform.
template <class S, int Count, int Full, class Sample>
__device__ __forceinline__ void weigh_samples(const Sample* from, int left, bool is_first, float c, float offset,
                                              const float* window, float2 (&a)[S::kRadix]) {
  using Sum = typename Total<Sample>::type;
  if (c != 0) {
    const Sample* const before = from - (is_first ? 0 : 1);  // the first sample has none before it and uses itself
#pragma unroll
    for (int q = 0; q < Count; ++q) {
      const int n = 2 * q * S::kLanes;
      const float last = q < Full || n < left ? float(held(Sum(q ? from[n - 1] : *before))) : 0.0f;
      const float x = a[q].x - offset;
      a[q] = make_float2(fmaf(-c, last - offset, x), fmaf(-c, x, a[q].y - offset));
    }
  } else {
#pragma unroll
    for (int q = 0; q < Count; ++q) a[q] = make_float2(a[q].x - offset, a[q].y - offset);
  }
  keep_order();
#pragma unroll
  for (int q = 0; q < Count; ++q) {
    const int n = 2 * q * S::kLanes;
    const float2 w = q < Full ? *reinterpret_cast<const float2*>(window + n)
                              : make_float2(n < left ? window[n] : 0.0f, n + 1 < left ? window[n + 1] : 0.0f);
    a[q] = make_float2(a[q].x * w.x, a[q].y * w.y);
  }
  if constexpr (Count == 13) dft_of_two_factors<4, 4, Count>(a);
  else dft<S::kRadix>(a);
}

template <int V>
struct Constant {
  static constexpr int value = V;
};
// Calls work(Count, Full) with the constants of this window length. A window of 25 ms that is padded to a power of two
// is often 25/32 of it.
template <class S, class Work>
__device__ __forceinline__ void with_window(int win_length, Work work) {
  constexpr int R = S::kRadix, Short = S::kPowerOfTwo ? 13 : R;
  const int count = (win_length + 2 * S::kLanes - 1) / (2 * S::kLanes);
  if (count == R) work(Constant<R>(), Constant<R - 1>());
  else if (count == Short) work(Constant<Short>(), Constant<Short - 1>());
  else work(Constant<R>(), Constant<0>());
}

// Loads a frame of the clip into `a`: (sample - offset), pre-emphasised, windowed, and transformed over q.
template <class S, class Sample>
__device__ __forceinline__ void load_frame(const LogMel& p, const Chunk& chunk, int first, float2 (&a)[S::kRadix],
                                           typename Total<Sample>::type* scratch, float2* values) {
  using Sum = typename Total<Sample>::type;
  const int number = thread_number(), frame = first + number / S::kThreads, thread = number % S::kThreads;
  const int start = (chunk.first + min(frame, chunk.valid - 1)) * p.hop_length + p.first_sample, length = chunk.length;
  const Sample* const clip = static_cast<const Sample*>(p.pcm) + chunk.clip * p.samples;
  // No barrier may be inside these branches, because the frames of one block may take different ones.
  const bool inside = start >= 0 && start + p.win_length <= length;
  const int t = min(thread, S::kLanes - 1), left = p.win_length - 2 * t;  // idle threads follow the last one
  const Sample* const from = clip + start + 2 * t;
  const auto sample = [&](int i) {
    const int at = p.place(i, length);
    return at < 0 ? Sample(chunk.mean) : clip[at];  // a zero once the mean is subtracted
  };

  Sum sum = 0;
  if (inside) {
    with_window<S>(p.win_length, [&](auto count, auto full) {
      sum = load_samples<S, decltype(count)::value, decltype(full)::value>(from, left, a);
    });
    if (!S::holds(thread)) sum = 0;
  } else {
#pragma unroll 1
    for (int n = thread; n < p.win_length; n += S::kThreads) sum += sample(start + n);
  }
  float offset = chunk.mean;
  if (p.remove_dc) offset = mean_of(sum_of_threads<S>(sum, scratch), p.win_length, chunk.inverse);

  const float c = p.preemphasis;
  if (inside) {
    with_window<S>(p.win_length, [&](auto count, auto full) {
      weigh_samples<S, decltype(count)::value, decltype(full)::value>(from, left, t == 0, c, offset, p.window + 2 * t, a);
    });
  } else {  // rare, so a loop; it uses the shared memory that this thread writes next
    const auto weighed = [&](int n) {
      if (n >= p.win_length) return 0.0f;
      const float x = float(sample(start + n)) - offset, last = float(sample(start + max(n - 1, 0))) - offset;
      return fmaf(-c, last, x) * p.window[n];
    };
    float2* const places = values + number / S::kThreads * S::kValues + (S::kRadix + S::kPad) * thread;
    if (S::holds(thread)) {
#pragma unroll 1
      for (int q = 0; q < 2 * S::kRadix; ++q)
        reinterpret_cast<float*>(places)[q] = weighed(2 * (t + q / 2 * S::kLanes) + q % 2);
#pragma unroll
      for (int q = 0; q < S::kRadix; ++q) a[q] = places[q];
      dft<S::kRadix>(a);
    }
  }
}

// Adds up the bands of the frames of a round from the powers of their bins. Large transforms have two neighbouring
// lanes for each band, one for its rising and one for its falling side, and these hold all frames. In small ones, a
// thread computes both sides for half of the frames.
template <class S>
__device__ __forceinline__ void add_bands(const LogMel& p, const float2* powers, const Chunk& chunk, int first, float* stage) {
  constexpr bool kBySides = S::kTogether <= 2;
  constexpr int kPairs = kBySides ? S::kTogether : S::kTogether / 2;
  const float unit = chunk.unit, log_scale = chunk.log_scale;
  const auto finished = [&](float x) {
    x *= unit;
    return p.take_log ? __log2f(x < p.floor ? p.floor : x) * log_scale + p.log_shift : x;
  };
#pragma unroll 1
  for (int begin = 0; begin < 2 * p.n_mels; begin += S::kBlock) {
    const int item = begin + threadIdx.x;
    const int part = kBySides ? item % 2 : item >= p.n_mels, mel = kBySides ? item / 2 : item - part * p.n_mels;
    const bool counts = item < 2 * p.n_mels;
    const float2* const pairs = powers + (kBySides ? 0 : part * kPairs * 2 * S::kValues);
    float2 sum[kPairs];
#pragma unroll
    for (int g = 0; g < kPairs; ++g) sum[g] = make_float2(0, 0);
    const auto add_side = [&](int side) {                                            // 0: rising, 1: falling
      const int2 interval = reinterpret_cast<const int2*>(p.intervals)[mel + side];  // first bin, number of bins
      const float2* at = pairs + interval.x;
      unsigned place = 2 * mel + 1 + side;
#pragma unroll 1
      for (int bins = interval.y; bins > 0; bins -= 4, place += 2 * p.n_intervals, at += 4) {
        const float4 four = reinterpret_cast<const float4*>(p.weights)[place];
        const float w[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // the weights of absent bins are zeros, and the powers after the last bin too
          if (!kBySides && i && i >= bins) break;
#pragma unroll
          for (int g = 0; g < kPairs; ++g) {
            const float2 power = at[i + g * 2 * S::kValues];
            sum[g].x += w[i] * power.x, sum[g].y += w[i] * power.y;
          }
        }
      }
    };
    if (counts) {
      add_side(kBySides ? part : 0);
      if constexpr (!kBySides) add_side(1);
    }
    float* const to = stage + mel * kStageStride + first;
    if constexpr (kBySides) {  // each lane finishes one frame of a pair
#pragma unroll
      for (int g = 0; g < kPairs; ++g) {
        const float other = __shfl_xor_sync(kAllLanes, part ? sum[g].x : sum[g].y, 1);
        if (counts) to[2 * g + part] = finished((part ? sum[g].y : sum[g].x) + other);
      }
    } else if (counts) {
#pragma unroll
      for (int g = 0; g < kPairs; ++g) {
        float* const two = to + 2 * (part * kPairs + g);
        two[0] = finished(sum[g].x), two[1] = finished(sum[g].y);
      }
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
  const int64_t skipped = (p.patches - 1) * p.patch_frames * int64_t(p.patch_mels);
#pragma unroll 1
  for (; mel < p.n_mels; mel += bands, from += bands * kStageStride) {
    Value* const to = static_cast<Value*>(p.out) + at + int64_t(mel) * p.patch_frames +
                      (mel * p.patch_mels_inverse >> 16) * skipped;
    if constexpr (Frames > 1) __stcg(reinterpret_cast<uint4*>(to), packed(from, Value()));  // a plain store is split
    else *to = rounded<Value>(*from);
  }
}
// Stores the chunk in patch order, with 16-byte stores if the patch width allows it.
template <int Block>
__device__ __forceinline__ void store_chunk(const LogMel& p, const Chunk& chunk, const float* stage) {
  const int most = p.dtype == Out::kFloat ? 4 : 8;
  const int frames = (p.patch_frames & (most - 1)) == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0 ? most : 1;
  const int place = threadIdx.x * frames, column = chunk.column + place % kChunk;  // column of the chunk's first patch
  const int begin = column < p.patch_frames ? 0 : column / p.patch_frames * p.patch_frames;  // first column of its patch
  const int frame = chunk.first + place % kChunk, patch_begin = chunk.first - chunk.column + begin;
  if (frame >= p.patches * p.patch_frames) return;
  const int64_t at = chunk.out + int64_t(patch_begin) * (p.patch_mels - 1) + frame;
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
  AJEPA_DYNAMIC_SHARED(float2, shared);
  __shared__ typename Total<Sample>::type scratch[(S::kBlock + 31) / 32];
  float* const stage = reinterpret_cast<float*>(shared + S::kTogether * 2 * S::kValues);
  const float4* const twiddles = reinterpret_cast<const float4*>(p.twiddles);

  __shared__ Chunk chunk;
  if (threadIdx.x == 0) {
    const int chunks = (p.patches * p.patch_frames + kChunk - 1) / kChunk;
    chunk.clip = blockIdx.x / chunks, chunk.first = int(blockIdx.x % chunks) * kChunk;
    chunk.length = int(p.length(chunk.clip)), chunk.valid = min(p.frames(chunk.length) - chunk.first, kChunk);
    chunk.mean = p.stats ? p.stats[2 * int64_t(chunk.clip)] : 0.0f;
    const float half = 0.5f * p.factor * (p.stats ? p.stats[2 * int64_t(chunk.clip) + 1] : p.scale);
    chunk.unit = p.power == 2 ? half * half : half, chunk.log_scale = p.log_scale * 0.69314718055994531f;
    chunk.column = chunk.first % p.patch_frames;
    chunk.out = int64_t(chunk.clip) * p.patch_rows * p.patch_mels * p.patches * p.patch_frames;
    chunk.inverse = 1.0f / float(p.win_length);
  }
  __syncthreads();

#pragma unroll 1
  for (int first = 0; first < kChunk && first < chunk.valid; first += 2 * S::kTogether) {
    float2 a[S::kRadix];
    load_frame<S, Sample>(p, chunk, first, a, scratch, shared);
    const int frame = thread_number() / S::kThreads, t = thread_number() % S::kThreads;
    transform<S>(a, shared + frame * S::kValues, t, twiddles);
    split<S>(p, a, shared, reinterpret_cast<const float2*>(twiddles + S::kRoots));
    __syncthreads();
    add_bands<S>(p, shared + S::kPowers, chunk, first, stage);
    __syncthreads();
  }

  if (chunk.valid < kChunk) {  // frames that no sample reaches: silence, or beyond the last frame
    const int all = p.all_frames(chunk.length) - chunk.first;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.n_mels * kChunk; i += S::kBlock)
      if (i % kChunk >= chunk.valid) stage[i / kChunk * kStageStride + i % kChunk] = i % kChunk < all ? p.silence : p.pad;
    __syncthreads();
  }
  store_chunk<S::kBlock>(p, chunk, stage);
  if (p.peaks && chunk.valid > 0) {
    float peak = p.n_samples ? p.silence : -INFINITY;  // no frame is below silence
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
  const int frames = p.all_frames(p.length(clip));
  const int key = reinterpret_cast<const int*>(p.peaks)[clip];
  const float cutoff = __int_as_float(key >= 0 ? key : key ^ 0x7fffffff) - p.top;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < int64_t(p.n_mels) * frames; i += gridDim.x * blockDim.x) {
    const int64_t at = p.out_index(clip, int(i / frames), int(i % frames));
    if (float(static_cast<const Value*>(p.out)[at]) < cutoff) static_cast<Value*>(p.out)[at] = rounded<Value>(cutoff);
  }
}

}  // namespace ajepa
