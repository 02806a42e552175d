// gelu(z) and gelu'(z), for z = x weight^T + bias. Backward's epilogue is then a single product.
#include "products.cuh"

namespace ajepa::hopper {

struct LinearGeluSlope {
  using Source = void;
  using Result = bf16;
  static constexpr bool kWeightKN = false;
  using Desc = Descriptor<Source, Result>;
  using Fusion = Map<cutlass::epilogue::thread::Identity, Result, fusion::Sm90EVT<GeluKeepingSlope<Desc>, Biased>>;
  static typename Fusion::Arguments arguments(const Call& call) { return {{biased(call), kept<Desc>(call)}, {}}; }
};

}  // namespace ajepa::hopper

AJEPA_PRODUCT(ajepa::hopper::LinearGeluSlope)
