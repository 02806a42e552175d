// A matrix product with GELU, or with GELU's gradient, as its epilogue. Matrices are row-major.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace ajepa {

enum class Gelu : int { kForward = 0, kForwardKeep = 1, kBackward = 2 };

// z = x weight^T + bias; forward: result = gelu(z), by the tanh, and z is kept where asked for.
// Backward, of x = d result of the next layer: result = (x weight) gelu'(z), bias = its sum over rows.
struct GeluProduct {
  const void* x;       // [rows, in]
  const void* weight;  // forward [out, in], backward [in, out]
  void* bias;          // [out]
  void* z;             // [rows, out]; null for kForward
  void* result;        // [rows, out]
  void* workspace;
  size_t workspace_bytes;
  int64_t rows, in, out;
  int device;
  Gelu kind;
  bool is_half;  // float16; else bfloat16
};

bool has_gelu_product();  // is cuBLASLt there?
std::string gelu_product(const GeluProduct& p, void* stream);  // "" or what went wrong

}  // namespace ajepa
