// residual + x weight^T + bias, with the residual and the result in float32.
#include "products.cuh"

namespace ajepa::hopper {

struct LinearResidual {
  using Source = float;
  using Result = float;
  static constexpr bool kWeightKN = false;
  using Fusion = Map<cutlass::plus, Result, Biased, hopper::Source<float>>;
  static typename Fusion::Arguments arguments(const Call& call) { return {biased(call), {}, {}}; }
};

}  // namespace ajepa::hopper

AJEPA_PRODUCT(ajepa::hopper::LinearResidual)
