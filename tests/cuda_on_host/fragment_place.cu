// Proves on the host that CUTLASS deals the values of an epilogue subtile to threads as FragmentPlace of
// csrc/hopper/column_sum.h says. It prints the number of values that lie elsewhere. No kernel is compiled.
#include <cstdio>

#include "products.cuh"

using namespace cute;
using namespace ajepa::hopper;

template <class T, bool WeightKN>
struct Plain {  // a product without an epilogue
  using Operand = T;
  using Source = std::conditional_t<WeightKN, T, void>;
  using Result = T;
  static constexpr bool kWeightKN = WeightKN;
  using Fusion = Map<cutlass::epilogue::thread::Identity, Result, ajepa::hopper::Product>;
};

template <class P>
void count() {
  using Parts = Kernel<P>;
  using Element = typename P::Result;
  using EpilogueTile = typename Descriptor<typename P::Source, Element>::EpilogueTile;
  constexpr int kSubM = size<0>(EpilogueTile{}), kSubN = size<1>(EpilogueTile{});
  const auto copy_c = make_tiled_copy_C_atom(typename Parts::Epilogue::CopyAtomC{}, typename Parts::Mainloop::TiledMma{});
  const auto store = make_tiled_copy_S(Copy_Atom<typename Parts::Epilogue::CopyOpR2S, Element>{}, copy_c);
  const Tensor tile = make_identity_tensor(take<0, 2>(TileMNK{}));
  int values = 0, elsewhere = 0;
  for (int thread = 0; thread < 128; ++thread) {
    const Tensor mine = cutlass::epilogue::fusion::sm90_partition_for_epilogue<true>(tile, EpilogueTile{}, store, thread);
    for (int n = 0; n < size<4>(mine); ++n)
      for (int m = 0; m < size<3>(mine); ++m) {
        const Tensor fragment = mine(_, _, _, m, n);
        for (int e = 0; e < size(fragment); ++e, ++values) {
          const int row = m * kSubM + FragmentPlace::row(thread, e), column = n * kSubN + FragmentPlace::column(thread, e);
          elsewhere += get<0>(fragment(e)) != row || get<1>(fragment(e)) != column;
        }
      }
  }
  std::printf("%d of %d values lie elsewhere\n", elsewhere, values);
}

int main() {
  count<Plain<bf16, true>>();                   // as linear_dgelu
  count<Plain<cutlass::float_e4m3_t, false>>();  // as linear_gelu_fp8
}
