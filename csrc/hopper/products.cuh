// Matrix products for Hopper whose epilogues do what would otherwise be passes over their results. CUTLASS supplies the
// warp-specialised ping-pong kernel: while one warp group multiplies, the other runs its epilogue.
//
// Each of the .cu files describes one product P and ends with AJEPA_PRODUCT(P): its source and result types, its
// weight's layout, its epilogue as a tree of visitors, and the visitors' arguments. Each becomes a library of its own,
// which kernels/ajepa_kernels/_hopper.py loads: such a kernel takes one to two minutes and 3.5 GB to compile.
#pragma once
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "call.h"
#include "column_sum.h"
#include "gelu.h"

namespace ajepa::hopper {

using bf16 = cutlass::bfloat16_t;
using TileMNK = cute::Shape<cute::_128, cute::_128, cute::_64>;  // visitors use M and N alone
using ClusterMNK = cute::Shape<cute::_2, cute::_1, cute::_1>;
using Row = cutlass::layout::RowMajor;
using Scheduled = cutlass::epilogue::TmaWarpSpecialized;
namespace collective = cutlass::epilogue::collective;
namespace fusion = cutlass::epilogue::fusion;
constexpr auto kNearest = cutlass::FloatRoundStyle::round_to_nearest;

// --- visitors ---

template <class Source, class Result>
using Descriptor =
    collective::detail::EpilogueDescriptor<TileMNK, collective::EpilogueTileAuto, Source, Result, Scheduled>;
template <template <class> class Function, class Result, class... Inputs>
using Map = fusion::Sm90EVT<fusion::Sm90Compute<Function, Result, float, kNearest>, Inputs...>;
using Product = fusion::Sm90AccFetch;
template <class T>
using Source = fusion::Sm90SrcFetch<T>;
using Bias = fusion::Sm90RowBroadcast<0, TileMNK, bf16, float, cute::Stride<cute::_0, cute::_1, cute::_0>, 8, false>;
using Biased = Map<cutlass::plus, float, Product, Bias>;

inline typename Biased::Arguments biased(const Call& call) {
  return {{}, {static_cast<const bf16*>(call.bias), bf16(0), {}}, {}};
}

template <class Desc>
using KeptDesc = collective::detail::AuxStoreDescriptor<Desc, Row, bf16>;
// Writes its input to `kept`, and passes it on.
template <class Desc>
using Kept = fusion::Sm90AuxStore<KeptDesc<Desc>::Stages, typename Desc::EpilogueTile, bf16, kNearest,
                                  typename KeptDesc<Desc>::Stride, typename KeptDesc<Desc>::SmemLayoutAtom,
                                  typename KeptDesc<Desc>::CopyOpR2S, 8, false>;

template <class Desc>
typename Kept<Desc>::Arguments kept(const Call& call) {
  return {static_cast<bf16*>(call.kept),
          cutlass::make_cute_packed_stride(typename KeptDesc<Desc>::Stride{}, cute::make_shape(call.m, call.n, 1))};
}

// Takes z, writes gelu'(z) to `kept`, and passes gelu(z) on. Both come from one evaluation of the polynomial.
template <class Desc>
struct GeluKeepingSlope : Kept<Desc> {
  using Base = Kept<Desc>;
  using Base::Base;

  template <class BaseCallbacks>
  struct Callbacks : BaseCallbacks {
    CUTLASS_DEVICE explicit Callbacks(BaseCallbacks&& base) : BaseCallbacks(cute::move(base)) {}
    template <class Accumulator, class Input, int Size>
    CUTLASS_DEVICE auto visit(const cutlass::Array<Accumulator, Size>& product, int sub_v, int sub_m, int sub_n,
                              const cutlass::Array<Input, Size>& z) {
      cutlass::Array<float, Size> value, slope;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Size; ++i) {
        const Gelu both = gelu(z[i]);
        value[i] = both.value;
        slope[i] = both.slope;
      }
      BaseCallbacks::visit(product, sub_v, sub_m, sub_n, slope);
      return value;
    }
  };

  template <bool ReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::ConsumerStoreArgs<Args...>& args) {
    auto base = Base::template get_consumer_store_callbacks<ReferenceSource>(args);
    return Callbacks<decltype(base)>(cute::move(base));
  }
};

// What CUTLASS asks of a visitor that needs neither shared memory nor a workspace.
struct Visitor {
  struct SharedStorage {};
  template <class Problem, class Arguments>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }
  template <class Problem, class Arguments>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }
  template <class Problem, class Arguments>
  static cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(const fusion::ProducerLoadArgs<Args...>&) {
    return fusion::EmptyProducerLoadCallbacks{};
  }
};

// Passes its input on, and writes its column sums to `partial`.
template <class Desc>
struct ColumnSum : Visitor {
  static constexpr int kTileM = cute::size<0>(TileMNK{}), kTileN = cute::size<1>(TileMNK{});
  static constexpr int kSubM = cute::size(cute::shape(cute::get<0>(typename Desc::EpilogueTile{})));
  static constexpr int kSubN = cute::size(cute::shape(cute::get<1>(typename Desc::EpilogueTile{})));
  static_assert(kSubM == 64, "FragmentPlace holds for subtiles of 64 rows");

  struct Arguments {
    float* partial;
  };
  struct Params {
    float* partial;
    int m, n;
  };
  template <class Problem>
  static constexpr Params to_underlying_arguments(const Problem& problem, const Arguments& args, void*) {
    return {args.partial, int(cute::get<0>(problem)), int(cute::get<1>(problem))};
  }
  CUTLASS_HOST_DEVICE ColumnSum() {}
  CUTLASS_HOST_DEVICE ColumnSum(const Params& params, const SharedStorage&) : params(params) {}

  // Rows beyond M add nothing: the TMA fills the operands and the source there with zeros, so their values are 0.
  struct Callbacks : fusion::EmptyConsumerStoreCallbacks {
    ColumnSums<kSubN> sums;
    float* row;   // of this warp, at the tile's first column
    int columns;  // of the matrix from there on; none if the tile lies beyond the last row
    int lane;

    CUTLASS_DEVICE Callbacks(float* row, int columns, int lane) : row(row), columns(columns), lane(lane) {}
    template <class Accumulator, class Input, int Size>
    CUTLASS_DEVICE auto visit(const cutlass::Array<Accumulator, Size>&, int, int sub_m, int sub_n,
                              const cutlass::Array<Input, Size>& in) {
      static_assert(Size == kSubM * kSubN / 128, "a fragment is a thread's part of the whole subtile");
      sums.add(in, sub_m == 0);
      if (sub_m == kTileM / kSubM - 1) sums.write(row + sub_n * kSubN, columns - sub_n * kSubN, lane);
      return in;
    }
  };

  // The scheduler also visits tiles wholly beyond the matrix, where it rounds their number up to whole clusters.
  template <bool ReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::ConsumerStoreArgs<Args...>& args) {
    auto [m, n, k, l] = args.tile_coord_mnkl;
    const int columns = int(m) * kTileM < params.m ? params.n - int(n) * kTileN : 0;
    return Callbacks(params.partial + (int64_t(m) * 4 + args.thread_idx / 32) * params.n + int64_t(n) * kTileN, columns,
                     args.thread_idx % 32);
  }

  Params params;
};

template <class T>
struct GeluValue;
template <int Size>
struct GeluValue<cutlass::Array<float, Size>> {
  CUTLASS_HOST_DEVICE auto operator()(const cutlass::Array<float, Size>& z) const {
    cutlass::Array<float, Size> y;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Size; ++i) y[i] = gelu(z[i]).value;
    return y;
  }
};

template <class T>
struct TimesSlope;  // dh gelu'(z)
template <int Size>
struct TimesSlope<cutlass::Array<float, Size>> {
  using Values = cutlass::Array<float, Size>;
  CUTLASS_HOST_DEVICE auto operator()(const Values& dh, const Values& z) const {
    Values dz;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Size; ++i) dz[i] = dh[i] * gelu(z[i]).slope;
    return dz;
  }
};

// --- the kernel ---

template <class P, class = void>
struct OperandOf {
  using Type = bf16;
};
template <class P>
struct OperandOf<P, std::void_t<typename P::Operand>> {
  using Type = typename P::Operand;
};

template <class P>
struct Kernel {
  using Operand = typename OperandOf<P>::Type;
  using Tile = cute::Shape<cute::_128, cute::_128, cute::Int<128 / sizeof(Operand)>>;
  using Schedule = std::conditional_t<sizeof(Operand) == 1, cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum,
                                      cutlass::gemm::KernelTmaWarpSpecializedPingpong>;
  using Source = typename P::Source;
  using Result = typename P::Result;
  using Weight = std::conditional_t<P::kWeightKN, cutlass::layout::RowMajor, cutlass::layout::ColumnMajor>;
  static constexpr int kAlign = 16 / int(sizeof(Operand));  // elements of 16 bytes
  static constexpr int kAlignResult = 16 / int(sizeof(Result));
  using Epilogue = typename collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, ClusterMNK, collective::EpilogueTileAuto, float, float,
      Source, Row, kAlignResult, Result, Row, kAlignResult, Scheduled, typename P::Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Operand, Row, kAlign, Operand, Weight, kAlign, float, Tile,
      ClusterMNK, cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>>;

  // Returns null or an error message. Nothing is allocated and nothing waits, so a CUDA graph can capture the call.
  static const char* launch(const Call& call, int multiprocessors, cudaStream_t stream) {
    const auto stride = [](auto kind, int rows, int columns) {
      return cutlass::make_cute_packed_stride(kind, cute::make_shape(rows, columns, 1));
    };
    typename Gemm::Arguments args{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {call.m, call.n, call.k, 1},
        {static_cast<const Operand*>(call.x), stride(typename Mainloop::StrideA{}, call.m, call.k),
         static_cast<const Operand*>(call.weight), stride(typename Mainloop::StrideB{}, call.n, call.k)},
        {P::arguments(call), static_cast<const typename Epilogue::ElementC*>(call.source),
         stride(typename Epilogue::StrideC{}, call.m, call.n), static_cast<Result*>(call.result),
         stride(typename Epilogue::StrideD{}, call.m, call.n)}};
    args.hw_info.sm_count = multiprocessors;
    // A swizzle would round the number of tiles up in both directions, at width 768 from 6 to 8, and an added tile costs
    // as much as any other. Tiles are taken along the narrow side, so the weights stay in the L2 cache without it.
    args.scheduler.max_swizzle_size = 1;
    if (Gemm::get_workspace_size(args) > 0) return "the kernel needs a workspace";
    Gemm gemm;
    auto status = gemm.can_implement(args);
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(args, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
  }
};

}  // namespace ajepa::hopper

#define AJEPA_PRODUCT(P)                                                                                          \
  extern "C" __attribute__((visibility("default"))) const char* ajepa_product(const ajepa::hopper::Call* call,   \
                                                                              int processors, cudaStream_t on) { \
    return ajepa::hopper::Kernel<P>::launch(*call, processors, on);                                               \
  }
