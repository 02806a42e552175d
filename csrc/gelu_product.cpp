// Matrix products with a GELU epilogue, by cuBLASLt. This file includes no torch header: ops.cpp checks the arguments,
// allocates memory and finds the stream.
#include "gelu_product.h"

#include <array>
#include <map>
#include <mutex>

#include "cublaslt.h"

namespace ajepa {
namespace {

namespace lt = cublaslt;

struct Failed {
  const char* what;
  int status;
};
void need(int status, const char* what) {
  if (status != lt::kSuccess) throw Failed{what, status};
}

template <int (*lt::Library::*destroy)(void*)>
struct Owned {  // owns an object of cuBLASLt
  void* it = nullptr;
  Owned() = default;
  Owned(const Owned&) = delete;
  ~Owned() {
    if (it) (lt::library().*destroy)(it);
  }
};
using Desc = Owned<&lt::Library::desc_destroy>;
using Layout = Owned<&lt::Library::layout_destroy>;
using Preference = Owned<&lt::Library::preference_destroy>;

void* handle_of(int device) {  // `device` must be the current device
  static std::map<int, void*> handles;  // never destroyed
  void*& handle = handles[device];
  if (!handle) need(lt::library().create(&handle), "cublasLtCreate");
  return handle;
}

template <class T>
void set(void* desc, int attribute, T value) {
  need(lt::library().desc_set(desc, attribute, &value, sizeof value), "cublasLtMatmulDescSetAttribute");
}

// cuBLASLt's matrices are column-major, so it sees each of our matrices as its transpose and computes result^T =
// weight x^T. Its epilogue adds one bias value per row, which is one per column of our result.
void run(const GeluProduct& p, void* stream) {
  static std::mutex mutex;
  static std::map<std::array<int64_t, 6>, lt::Heuristic> chosen;  // the heuristic takes longer than a launch
  const std::lock_guard<std::mutex> lock(mutex);
  const auto& lib = lt::library();
  void* const handle = handle_of(p.device);
  const bool backward = p.kind == Gelu::kBackward;
  const int type = p.is_half ? lt::kHalf : lt::kBFloat16;

  Desc desc;
  need(lib.desc_create(&desc.it, lt::kComputeFloat, lt::kFloat), "cublasLtMatmulDescCreate");
  set(desc.it, lt::kDescTransposeA, int32_t(backward ? lt::kNoTranspose : lt::kTranspose));
  set(desc.it, lt::kDescTransposeB, int32_t(lt::kNoTranspose));
  set(desc.it, lt::kDescEpilogue, uint32_t(backward                        ? lt::kEpilogueDGeluBGrad
                                           : p.kind == Gelu::kForwardKeep ? lt::kEpilogueGeluAuxBias
                                                                          : lt::kEpilogueGeluBias));
  set(desc.it, lt::kDescBias, p.bias);
  if (p.kind != Gelu::kForward) set(desc.it, lt::kDescAux, p.z), set(desc.it, lt::kDescAuxLd, p.out);

  Layout weight, x, result;
  const auto shape = [&](Layout& layout, int64_t rows, int64_t columns) {
    need(lib.layout_create(&layout.it, type, uint64_t(rows), uint64_t(columns), rows), "cublasLtMatrixLayoutCreate");
  };
  backward ? shape(weight, p.out, p.in) : shape(weight, p.in, p.out);
  shape(x, p.in, p.rows), shape(result, p.out, p.rows);

  auto [at, is_new] = chosen.try_emplace({p.device, int64_t(p.kind), type, p.rows, p.in, p.out});
  if (is_new) {
    Preference preference;
    need(lib.preference_create(&preference.it), "cublasLtMatmulPreferenceCreate");
    const auto prefer = [&](int attribute, auto value) {
      need(lib.preference_set(preference.it, attribute, &value, sizeof value), "cublasLtMatmulPreferenceSetAttribute");
    };
    int found = 0;
    try {
      prefer(lt::kPrefWorkspace, uint64_t(p.workspace_bytes));
      for (const int operand : lt::kPrefAlignment) prefer(operand, uint32_t(16));
      need(lib.heuristic(handle, desc.it, weight.it, x.it, result.it, result.it, preference.it, 1, &at->second, &found),
           "cublasLtMatmulAlgoGetHeuristic");
      if (!found) throw Failed{"cublasLtMatmulAlgoGetHeuristic found no algorithm", at->second.state};
    } catch (...) {
      chosen.erase(at);
      throw;
    }
  }
  const float one = 1, zero = 0;
  const lt::Heuristic algorithm = at->second;
  if (chosen.size() > 4096) chosen.clear();  // ragged batches have many row counts
  need(lib.matmul(handle, desc.it, &one, p.weight, weight.it, p.x, x.it, &zero, p.result, result.it, p.result, result.it,
                  &algorithm.algorithm, p.workspace, p.workspace_bytes, stream),
       "cublasLtMatmul");
}

}  // namespace

bool has_gelu_product() { return cublaslt::library().complete; }

std::string gelu_product(const GeluProduct& p, void* stream) {
  try {
    run(p, stream);
  } catch (const Failed& failed) {
    return std::string(failed.what) + " (status " + std::to_string(failed.status) + ")";
  }
  return "";
}

}  // namespace ajepa
