// dz = (dy weight) gelu'(z) and its column sums, where weight [k, n] is the next layer's and z is the source.
#include "products.cuh"

namespace ajepa::hopper {

struct LinearDGelu {
  using Source = bf16;
  using Result = bf16;
  static constexpr bool kWeightKN = true;
  using DZ = Map<TimesSlope, float, Product, hopper::Source<bf16>>;
  using Sum = ColumnSum<Descriptor<Source, Result>>;
  using Fusion = Map<cutlass::epilogue::thread::Identity, Result, fusion::Sm90EVT<Sum, DZ>>;
  static typename Fusion::Arguments arguments(const Call& call) { return {{{{}, {}, {}}, {call.partial}}, {}}; }
};

}  // namespace ajepa::hopper

AJEPA_PRODUCT(ajepa::hopper::LinearDGelu)
