// A matrix product with GELU, or with GELU's gradient, as its epilogue. Matrices are row-major.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace ajepa {

enum class Gelu : int { kForward = 0, kForwardKeep = 1, kBackward = 2 };

// Forward: z = x weight^T + bias and result = gelu(z) in its tanh form; kForwardKeep also writes z.
// Backward: x is the gradient of the next layer's output, result = (x weight) gelu'(z), and bias is its sum over rows.
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
  bool is_half;  // float16, else bfloat16
};

bool has_gelu_product();  // whether cuBLASLt was found
std::string gelu_product(const GeluProduct& p, void* stream);  // returns "" or an error message

}  // namespace ajepa
