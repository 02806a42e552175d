// Proves on the host that CUTLASS deals the values of an epilogue subtile to threads as FragmentPlace of
// csrc/hopper/column_sum.h says. It prints the number of values that lie elsewhere. No kernel is compiled.
#include <cstdio>

#include "products.cuh"

using namespace cute;
using namespace ajepa::hopper;

struct Transposed {  // the product of linear_dgelu, without its epilogue
  using Source = bf16;
  using Result = bf16;
  static constexpr bool kWeightKN = true;
  using Fusion = Map<cutlass::epilogue::thread::Identity, Result, ajepa::hopper::Product>;
};

int main() {
  using Kernels = Kernel<Transposed>;
  using EpilogueTile = typename Descriptor<bf16, bf16>::EpilogueTile;
  constexpr int kSubM = size<0>(EpilogueTile{}), kSubN = size<1>(EpilogueTile{});
  const auto copy_c = make_tiled_copy_C_atom(typename Kernels::Epilogue::CopyAtomC{}, typename Kernels::Mainloop::TiledMma{});
  const auto store = make_tiled_copy_S(Copy_Atom<typename Kernels::Epilogue::CopyOpR2S, bf16>{}, copy_c);
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
