// gelu(z) and z itself, for z = x weight^T + bias.
#include "products.cuh"

namespace ajepa::hopper {

struct LinearGeluKeep {
  using Source = void;
  using Result = bf16;
  static constexpr bool kWeightKN = false;
  using Desc = Descriptor<Source, Result>;
  using Fusion = Map<GeluValue, Result, fusion::Sm90EVT<Kept<Desc>, Biased>>;
  static typename Fusion::Arguments arguments(const Call& call) { return {{biased(call), kept<Desc>(call)}, {}}; }
};

}  // namespace ajepa::hopper

AJEPA_PRODUCT(ajepa::hopper::LinearGeluKeep)
