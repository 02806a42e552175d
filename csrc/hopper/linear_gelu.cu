// gelu(x weight^T + bias), for an MLP without a gradient.
#include "products.cuh"

namespace ajepa::hopper {

struct LinearGelu {
  using Source = void;
  using Result = bf16;
  static constexpr bool kWeightKN = false;
  using Fusion = Map<GeluValue, Result, Biased>;
  static typename Fusion::Arguments arguments(const Call& call) { return {biased(call), {}}; }
};

}  // namespace ajepa::hopper

AJEPA_PRODUCT(ajepa::hopper::LinearGelu)
