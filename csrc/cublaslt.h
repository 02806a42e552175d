// The part of cuBLASLt's C interface that gelu_product.cpp calls, resolved in the library that torch has loaded. It is
// declared here because CPU builds of torch and most CUDA toolkits do not contain the header. The numbers are those of
// cuBLASLt 12 and 13; tests/kernels/test_gelu_mlp.py compares them with the header if it finds one.
#pragma once
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifndef AJEPA_CUBLASLT  // tests substitute a library that computes on the host
#define AJEPA_CUBLASLT "libcublasLt.so.13", "libcublasLt.so.12"
#endif

namespace ajepa::cublaslt {

constexpr int kSuccess = 0, kNoTranspose = 0, kTranspose = 1, kComputeFloat = 68;
constexpr int kFloat = 0, kHalf = 2, kBFloat16 = 14;
constexpr int kDescTransposeA = 3, kDescTransposeB = 4, kDescEpilogue = 7, kDescBias = 8, kDescAux = 11, kDescAuxLd = 12;
constexpr int kEpilogueGeluBias = 36, kEpilogueGeluAuxBias = 164, kEpilogueDGeluBGrad = 208;
constexpr int kPrefWorkspace = 1, kPrefAlignment[4] = {5, 6, 7, 8};  // for A, B, C, D

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

struct Library {
  int (*create)(void** handle);
  int (*desc_create)(void** desc, int compute, int scale);
  int (*desc_set)(void* desc, int attribute, const void* value, size_t size);
  int (*desc_destroy)(void* desc);
  int (*layout_create)(void** layout, int type, uint64_t rows, uint64_t columns, int64_t ld);
  int (*layout_destroy)(void* layout);
  int (*preference_create)(void** preference);
  int (*preference_set)(void* preference, int attribute, const void* value, size_t size);
  int (*preference_destroy)(void* preference);
  int (*heuristic)(void* handle, void* desc, void* a, void* b, void* c, void* d, void* preference, int wanted,
                   Heuristic* results, int* found);
  int (*matmul)(void* handle, void* desc, const void* alpha, const void* a, void* a_layout, const void* b, void* b_layout,
                const void* beta, const void* c, void* c_layout, void* d, void* d_layout, const Algorithm* algorithm,
                void* workspace, size_t workspace_bytes, void* stream);
  bool complete;
};

inline const Library& library() {
  static const Library found = [] {
    Library l{};
    void* handle = nullptr;
    for (const int mode : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY})  // prefer the library that torch has loaded
      for (const char* name : {AJEPA_CUBLASLT})
        if (!handle) handle = dlopen(name, mode);
    if (!handle) return l;
    bool complete = true;
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
      complete = complete && function;
    };
    find(l.create, "cublasLtCreate");
    find(l.desc_create, "cublasLtMatmulDescCreate");
    find(l.desc_set, "cublasLtMatmulDescSetAttribute");
    find(l.desc_destroy, "cublasLtMatmulDescDestroy");
    find(l.layout_create, "cublasLtMatrixLayoutCreate");
    find(l.layout_destroy, "cublasLtMatrixLayoutDestroy");
    find(l.preference_create, "cublasLtMatmulPreferenceCreate");
    find(l.preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(l.preference_destroy, "cublasLtMatmulPreferenceDestroy");
    find(l.heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(l.matmul, "cublasLtMatmul");
    l.complete = complete;
    return l;
  }();
  return found;
}

}  // namespace ajepa::cublaslt
