// gelu(x weight^T + bias) in float8, from operands in float8 with one scale a tensor. It also notes the largest
// magnitude of the result, from which the caller makes the scale of a later step.
#include "products.cuh"

namespace ajepa::hopper {

// Takes the accumulators and the bias, and passes on the values that the epilogue rounds to float8. That conversion
// clamps, and keeps NaN.
template <class Desc>
struct GeluQuantized : Visitor {
  static constexpr int kSubM = cute::size(cute::shape(cute::get<0>(typename Desc::EpilogueTile{})));
  static_assert(kSubM == 64, "FragmentPlace holds for subtiles of 64 rows");

  struct Arguments {
    const float *x_scale, *weight_scale, *result_scale;
    float* largest;
  };
  struct Params {
    Arguments args;
    int m;
  };
  template <class Problem>
  static constexpr Params to_underlying_arguments(const Problem& problem, const Arguments& args, void*) {
    return {args, int(cute::get<0>(problem))};
  }
  CUTLASS_HOST_DEVICE GeluQuantized() {}
  CUTLASS_HOST_DEVICE GeluQuantized(const Params& params, const SharedStorage&) : params(params) {}

  struct Callbacks : fusion::EmptyConsumerStoreCallbacks {
    float scale, inverse;
    int* largest;
    int rows;  // of the matrix from the tile's first row on; others hold gelu(bias), which must not count
    int thread;
    int seen = 0;  // the bits of numbers >= 0 have the order of the numbers, and NaN is above them

    CUTLASS_DEVICE Callbacks(float scale, float inverse, int* largest, int rows, int thread)
        : scale(scale), inverse(inverse), largest(largest), rows(rows), thread(thread) {}

    template <class Accumulator, int Size>
    CUTLASS_DEVICE auto visit(const cutlass::Array<Accumulator, Size>&, int, int sub_m, int,
                              const cutlass::Array<float, Size>& product, const cutlass::Array<float, Size>& bias) {
      cutlass::Array<float, Size> result;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Size; ++i) {
        const float y = gelu(fmaf(product[i], scale, bias[i])).value;
        const int bits = __float_as_int(y) & 0x7fffffff;
        if (sub_m * kSubM + FragmentPlace::row(thread, i) < rows) seen = max(seen, bits);
        result[i] = y * inverse;
      }
      return result;
    }

    CUTLASS_DEVICE void end() {
      if (!largest) return;
      const int all = __reduce_max_sync(0xffffffffu, seen);
      if (thread % 32 == 0 && all > *largest) atomicMax(largest, all);  // almost all warps can omit it
    }
  };

  template <bool ReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::ConsumerStoreArgs<Args...>& args) {
    const auto& p = params.args;
    const int rows = params.m - int(cute::get<0>(args.tile_coord_mnkl)) * int(cute::size<0>(TileMNK{}));
    return Callbacks(*p.x_scale * *p.weight_scale, 1.0f / *p.result_scale, reinterpret_cast<int*>(p.largest), rows,
                     args.thread_idx);
  }

  Params params;
};

struct LinearGeluFp8 {
  using Operand = cutlass::float_e4m3_t;
  using Source = void;
  using Result = cutlass::float_e4m3_t;
  static constexpr bool kWeightKN = false;
  using Fusion = fusion::Sm90EVT<GeluQuantized<Descriptor<Source, Result>>, Product, Bias>;
  static typename Fusion::Arguments arguments(const Call& call) {
    return {{}, {static_cast<const bf16*>(call.bias), bf16(0), {}},
            {call.x_scale, call.weight_scale, call.result_scale, call.largest}};
  }
};

}  // namespace ajepa::hopper

AJEPA_PRODUCT(ajepa::hopper::LinearGeluFp8)
