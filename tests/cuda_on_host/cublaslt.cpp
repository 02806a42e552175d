// The part of cuBLASLt's interface that csrc/cublaslt.h declares, computed on the host as the descriptors ask:
// column-major matrices, D = op(A) op(B), and the three GELU epilogues. It refuses the arguments that the real library
// documents as invalid.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cublaslt.h"

using namespace ajepa::cublaslt;

namespace {

struct Desc {
  int32_t trans_a = 0, trans_b = 0;
  uint32_t epilogue = 1;
  void *bias = nullptr, *aux = nullptr;
  int64_t aux_ld = 0;
};
struct Layout {
  int type;
  int64_t rows, columns, ld;
};
struct Preference {
  uint64_t workspace = 0;
  uint32_t alignment[4] = {256, 256, 256, 256};
};
constexpr int kInvalid = 7, kNotSupported = 15;

float read(const void* at, int64_t i, int type) {
  if (type == kHalf) return float(static_cast<const _Float16*>(at)[i]);
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(at)[i]) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
void write(void* at, int64_t i, int type, double x) {
  if (type == kHalf) {
    static_cast<_Float16*>(at)[i] = _Float16(float(x));
    return;
  }
  const float rounded = float(x);
  uint32_t bits;
  std::memcpy(&bits, &rounded, 4);
  static_cast<uint16_t*>(at)[i] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
double gelu(double z) { return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z))); }
double gelu_slope(double z) {
  const double t = std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z));
  return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * z * z);
}
bool fits(const Desc& d, const Layout& a, const Layout& b, const Layout& out) {
  const int64_t m = d.trans_a ? a.columns : a.rows, k = d.trans_a ? a.rows : a.columns;
  const bool aux = d.epilogue == kEpilogueGeluAuxBias || d.epilogue == kEpilogueDGeluBGrad;
  return !d.trans_b && m == out.rows && k == b.rows && b.columns == out.columns && d.bias &&
         (!aux || (d.aux && d.aux_ld % 8 == 0 && d.aux_ld >= m));
}
int set(void* to, size_t have, const void* value, size_t size) {
  if (size != have) return kInvalid;
  std::memcpy(to, value, size);
  return kSuccess;
}

}  // namespace

extern "C" {
int cublasLtCreate(void** handle) { return *handle = new int(1), kSuccess; }
int cublasLtMatmulDescCreate(void** desc, int compute, int scale) {
  if (compute != kComputeFloat || scale != kFloat) return kNotSupported;
  return *desc = new Desc, kSuccess;
}
int cublasLtMatmulDescDestroy(void* desc) { return delete static_cast<Desc*>(desc), kSuccess; }
int cublasLtMatmulDescSetAttribute(void* desc, int attribute, const void* value, size_t size) {
  Desc& d = *static_cast<Desc*>(desc);
  switch (attribute) {
    case kDescTransposeA: return set(&d.trans_a, sizeof d.trans_a, value, size);
    case kDescTransposeB: return set(&d.trans_b, sizeof d.trans_b, value, size);
    case kDescEpilogue: return set(&d.epilogue, sizeof d.epilogue, value, size);
    case kDescBias: return set(&d.bias, sizeof d.bias, value, size);
    case kDescAux: return set(&d.aux, sizeof d.aux, value, size);
    case kDescAuxLd: return set(&d.aux_ld, sizeof d.aux_ld, value, size);
    default: return kInvalid;
  }
}
int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t ld) {
  if ((type != kHalf && type != kBFloat16) || ld < int64_t(rows)) return kInvalid;
  return *layout = new Layout{type, int64_t(rows), int64_t(columns), ld}, kSuccess;
}
int cublasLtMatrixLayoutDestroy(void* layout) { return delete static_cast<Layout*>(layout), kSuccess; }
int cublasLtMatmulPreferenceCreate(void** preference) { return *preference = new Preference, kSuccess; }
int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t size) {
  Preference& p = *static_cast<Preference*>(preference);
  if (attribute == kPrefWorkspace) return set(&p.workspace, sizeof p.workspace, value, size);
  for (int i = 0; i < 4; ++i)
    if (attribute == kPrefAlignment[i]) return set(&p.alignment[i], sizeof(uint32_t), value, size);
  return kInvalid;
}
int cublasLtMatmulPreferenceDestroy(void* preference) { return delete static_cast<Preference*>(preference), kSuccess; }
int cublasLtMatmulAlgoGetHeuristic(void*, void* desc, void* a, void* b, void*, void* d, void* preference, int,
                                   Heuristic* results, int* found) {
  const Preference& p = *static_cast<Preference*>(preference);
  *found = 0;
  for (const uint32_t alignment : p.alignment)
    if (alignment != 16) return kInvalid;
  if (!fits(*static_cast<Desc*>(desc), *static_cast<Layout*>(a), *static_cast<Layout*>(b), *static_cast<Layout*>(d)))
    return kNotSupported;
  *results = Heuristic{};
  results->algorithm.data[0] = 42, results->workspace = p.workspace, *found = 1;
  return kSuccess;
}
int cublasLtMatmul(void*, void* desc, const void* alpha, const void* a, void* a_layout, const void* b, void* b_layout,
                   const void* beta, const void*, void*, void* out, void* out_layout, const Algorithm* algorithm,
                   void*, size_t, void*) {
  const Desc& d = *static_cast<Desc*>(desc);
  const Layout &la = *static_cast<Layout*>(a_layout), &lb = *static_cast<Layout*>(b_layout),
               &lo = *static_cast<Layout*>(out_layout);
  if (algorithm->data[0] != 42 || *static_cast<const float*>(alpha) != 1 || *static_cast<const float*>(beta) != 0 ||
      !fits(d, la, lb, lo))
    return kInvalid;
  std::vector<double> sums(size_t(lo.rows), 0.0);
  for (int64_t column = 0; column < lo.columns; ++column)
    for (int64_t row = 0; row < lo.rows; ++row) {
      double x = 0;
      for (int64_t k = 0; k < lb.rows; ++k)
        x += double(read(a, d.trans_a ? k + row * la.ld : row + k * la.ld, la.type)) * read(b, k + column * lb.ld, lb.type);
      const int64_t at = row + column * lo.ld, aux = row + column * d.aux_ld;
      switch (d.epilogue) {
        case kEpilogueGeluAuxBias:
        case kEpilogueGeluBias:
          x += read(d.bias, row, lo.type);
          if (d.epilogue == kEpilogueGeluAuxBias) write(d.aux, aux, lo.type, x);
          x = gelu(x);
          break;
        case kEpilogueDGeluBGrad:
          x *= gelu_slope(read(d.aux, aux, lo.type));
          sums[size_t(row)] += x;
          break;
        default: return kNotSupported;
      }
      write(out, at, lo.type, x);
    }
  if (d.epilogue == kEpilogueDGeluBGrad)
    for (int64_t row = 0; row < lo.rows; ++row) write(d.bias, row, lo.type, sums[size_t(row)]);
  return kSuccess;
}
}
