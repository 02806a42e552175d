// Computes the fused products on the host as the libraries of csrc/hopper do on a GPU: the same arguments, the same
// arithmetic of GELU, and the same column sums, by one block of 128 threads a tile. Tests call it through ctypes.
#include "cuda_on_host.h"

#include "hopper/call.h"
#include "hopper/column_sum.h"
#include "hopper/gelu.h"

using namespace ajepa::hopper;

static constexpr int kTile = 128, kSubM = 64, kSubN = 32, kFragment = kSubM * kSubN / 128;

static float load(const void* from, int64_t at) {
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(from)[at]) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
static void store(void* to, int64_t at, float x) {  // rounds to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  static_cast<uint16_t*>(to)[at] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float load_e4m3(const void* from, int64_t at) {
  const int bits = static_cast<const uint8_t*>(from)[at], exponent = bits >> 3 & 15, fraction = bits & 7;
  if ((bits & 127) == 127) return NAN;
  const float x = exponent ? std::ldexp(float(8 + fraction), exponent - 10) : std::ldexp(float(fraction), -9);
  return bits & 128 ? -x : x;
}
static void store_e4m3(void* to, int64_t at, float x) {  // the nearest number; clamps, and keeps NaN
  int best = 0;
  for (int bits = 1; bits < 127; ++bits) {
    const float distance = std::fabs(std::fabs(x) - load_e4m3(&bits, 0)), least = std::fabs(std::fabs(x) - load_e4m3(&best, 0));
    if (distance < least || (distance == least && bits % 2 == 0)) best = bits;
  }
  static_cast<uint8_t*>(to)[at] = uint8_t(x != x ? 127 : std::signbit(x) ? best | 128 : best);
}

enum Kind { kGelu, kGeluKeep, kGeluSlope, kDGelu, kDSlope, kResidual };

static float product(const Call& p, bool weight_kn, int row, int column) {
  float sum = 0;
  for (int k = 0; k < p.k; ++k)
    sum += load(p.x, int64_t(row) * p.k + k) *
           load(p.weight, weight_kn ? int64_t(k) * p.n + column : int64_t(column) * p.k + k);
  return sum;
}

static float element(const Call& p, Kind kind, int row, int column) {  // also writes `result` and `kept`
  if (row >= p.m || column >= p.n) return 0;                           // what the TMA fills in
  const int64_t at = int64_t(row) * p.n + column;
  const float acc = product(p, kind == kDGelu || kind == kDSlope, row, column);
  if (kind == kDGelu || kind == kDSlope) {
    const float source = load(p.source, at), dz = acc * (kind == kDGelu ? gelu(source).slope : source);
    store(p.result, at, dz);
    return dz;
  }
  const float z = acc + load(p.bias, column);
  if (kind == kResidual) return static_cast<float*>(p.result)[at] = z + static_cast<const float*>(p.source)[at];
  if (kind != kGelu) store(p.kept, at, kind == kGeluKeep ? z : gelu(z).slope);
  store(p.result, at, gelu(z).value);
  return z;
}

template <Kind kind>
static const char* run(const Call* call, int, void*) {
  const Call p = *call;
  // One tile more in each direction than the matrix has, as CUTLASS visits where it rounds up to whole clusters.
  const dim3 tiles(unsigned((p.n + kTile - 1) / kTile + 1), unsigned((p.m + kTile - 1) / kTile + 1));
  cuda_on_host::launch(tiles, 128, 0, [p] {
    const int thread = int(threadIdx.x), row = int(blockIdx.y) * kTile, column = int(blockIdx.x) * kTile;
    const int columns = row < p.m ? p.n - column : 0;
    float* const partial = p.partial ? p.partial + (int64_t(blockIdx.y) * 4 + thread / 32) * p.n + column : nullptr;
    ColumnSums<kSubN> sums;
    for (int n = 0; n < kTile; n += kSubN)
      for (int m = 0; m < kTile; m += kSubM) {
        float fragment[kFragment];
        for (int e = 0; e < kFragment; ++e)
          fragment[e] =
              element(p, kind, row + m + FragmentPlace::row(thread, e), column + n + FragmentPlace::column(thread, e));
        sums.add(fragment, m == 0);
        if (partial && m + kSubM == kTile) sums.write(partial + n, columns - n, thread % 32);
      }
  });
  return nullptr;
}

static const char* run_fp8(const Call* call, int, void*) {
  const Call& p = *call;
  for (int row = 0; row < p.m; ++row)
    for (int column = 0; column < p.n; ++column) {
      float sum = 0;
      for (int k = 0; k < p.k; ++k)
        sum += load_e4m3(p.x, int64_t(row) * p.k + k) * load_e4m3(p.weight, int64_t(column) * p.k + k);
      const float y = gelu(sum * (*p.x_scale * *p.weight_scale) + load(p.bias, column)).value;
      if (p.largest) *p.largest = std::max(*p.largest, std::fabs(y));
      store_e4m3(p.result, int64_t(row) * p.n + column, y * (1.0f / *p.result_scale));
    }
  return nullptr;
}

extern "C" {
const char* linear_gelu(const Call* p, int s, void* t) { return run<kGelu>(p, s, t); }
const char* linear_gelu_keep(const Call* p, int s, void* t) { return run<kGeluKeep>(p, s, t); }
const char* linear_gelu_slope(const Call* p, int s, void* t) { return run<kGeluSlope>(p, s, t); }
const char* linear_dgelu(const Call* p, int s, void* t) { return run<kDGelu>(p, s, t); }
const char* linear_dslope(const Call* p, int s, void* t) { return run<kDSlope>(p, s, t); }
const char* linear_residual(const Call* p, int s, void* t) { return run<kResidual>(p, s, t); }
const char* linear_gelu_fp8(const Call* p, int s, void* t) { return run_fp8(p, s, t); }
void gelu_all(const float* x, float* value, float* slope, int count) {
  for (int i = 0; i < count; ++i) value[i] = gelu(x[i]).value, slope[i] = gelu(x[i]).slope;
}
}
