// Runs unmodified CUDA kernel source on the CPU, with one fiber per CUDA thread and one block after another. A fiber
// runs until it reaches a barrier or a warp operation. A warp runs until its threads reach a barrier of the block, so
// data that another warp has yet to write are missing. All threads of a warp must reach the same warp operations, and
// all threads of a block the same barriers; launch() aborts if they do not. The header is deliberately small: it covers only what the kernels of csrc/ use.
#pragma once
#define AJEPA_CUDA_ON_HOST
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define AJEPA_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(cuda_on_host::dynamic_shared.get())

struct float2 {
  float x, y;
};
struct int2 {
  int x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_host {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done, waits;  // waits: for the block, not only for its warp
  int barriers;
  dim3 thread;
};
constexpr size_t kStack = 1 << 16;
inline ucontext_t scheduler;
inline Fiber* current;
inline std::function<void()> body;
inline dim3 block_index, block_size, grid_size;
inline std::vector<uint64_t> lanes;
struct Free {
  void operator()(void* x) const { std::free(x); }
};
inline std::unique_ptr<void, Free> dynamic_shared;

inline void enter() {
  body();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}
inline void barrier(bool of_block) {
  ++current->barriers, current->waits = of_block;
  swapcontext(&current->context, &scheduler);
}

template <class F>
void launch(dim3 grid, unsigned threads, size_t shared, F kernel) {
  static std::vector<Fiber> fibers;
  if (fibers.size() < threads) fibers.resize(threads);
  body = kernel, block_size = threads, grid_size = grid, lanes.assign(threads, 0);
  const size_t bytes = (shared + 63) / 64 * 64 + 64;
  dynamic_shared.reset(std::aligned_alloc(64, bytes));
  for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
    for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) {
      std::memset(dynamic_shared.get(), 0xff, bytes);  // NaN, so that a read before the first write shows
      for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        if (!fiber.stack) fiber.stack.reset(new char[kStack]);
        fiber.done = fiber.waits = false, fiber.barriers = 0, fiber.thread = dim3(i, 0, 0);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStack;
        makecontext(&fiber.context, enter, 0);
      }
      for (bool running = true; running;) {
        running = false;
        for (unsigned first = 0; first < threads; first += 32) {  // warp after warp
          const Fiber& leader = fibers[first];
          do {
            for (unsigned i = first; i < std::min(first + 32, threads); ++i) {
              current = &fibers[i];
              if (!current->done) swapcontext(&scheduler, &current->context);
              if (current->done != leader.done || current->barriers != leader.barriers || current->waits != leader.waits)
                std::abort();
            }
          } while (!leader.done && !leader.waits);
          running |= !leader.done;
          if (leader.done != fibers[0].done) std::abort();
        }
      }
    }
}

template <class T>
uint64_t word(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t w = 0;
  std::memcpy(&w, &value, sizeof(T));
  return w;
}
template <class T>
T value(uint64_t w) {
  T v;
  std::memcpy(&v, &w, sizeof(T));
  return v;
}
template <class T, class F>
T reduce(T mine, F merge) {  // reduces over the warp
  const unsigned me = current->thread.x, first = me / 32 * 32, last = std::min(first + 32, block_size.x);
  lanes[me] = word(mine);
  barrier(false);
  T all = value<T>(lanes[first]);
  for (unsigned i = first + 1; i < last; ++i) all = merge(all, value<T>(lanes[i]));
  barrier(false);
  return all;
}

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::current->thread)
#define blockIdx cuda_on_host::block_index
#define blockDim cuda_on_host::block_size
#define gridDim cuda_on_host::grid_size

inline void __syncthreads() { cuda_on_host::barrier(true); }
inline void __syncwarp() { cuda_on_host::barrier(false); }
template <class T>
T __shfl_xor_sync(unsigned, T mine, int mask) {
  using namespace cuda_on_host;
  const unsigned me = current->thread.x, other = me ^ unsigned(mask);
  lanes[me] = word(mine);
  barrier(false);
  const T theirs = other < block_size.x ? value<T>(lanes[other]) : mine;
  barrier(false);
  return theirs;
}
inline int __reduce_add_sync(unsigned, int x) { return cuda_on_host::reduce(x, [](int a, int b) { return a + b; }); }
inline int __reduce_min_sync(unsigned, int x) { return cuda_on_host::reduce(x, [](int a, int b) { return std::min(a, b); }); }
inline int __reduce_max_sync(unsigned, int x) { return cuda_on_host::reduce(x, [](int a, int b) { return std::max(a, b); }); }
inline int atomicMax(int* at, int x) {
  const int old = *at;
  *at = std::max(old, x);
  return old;
}

using std::max;
using std::min;
inline int __float_as_int(float x) { return cuda_on_host::value<int>(cuda_on_host::word(x)); }
inline float __int_as_float(int x) { return cuda_on_host::value<float>(cuda_on_host::word(x)); }
inline unsigned __float_as_uint(float x) { return unsigned(__float_as_int(x)); }
template <class T>
void __stcg(T* at, T x) {
  *at = x;
}
inline float __log2f(float x) { return std::log2(x); }
inline void sincospif(float x, float* s, float* c) {
  *s = float(std::sin(M_PI * double(x))), *c = float(std::cos(M_PI * double(x)));
}

struct __half {
  _Float16 x;
  operator float() const { return float(x); }
};
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
struct __nv_bfloat16 {
  unsigned short x;
  operator float() const { return __int_as_float(int(unsigned(x) << 16)); }
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = unsigned(__float_as_int(x));
  return {(unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
