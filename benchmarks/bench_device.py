"""Record the versions and clocks of the device, and measure the ceilings that all floors are computed from."""

import nvidia_smi
import torch
from records import DEVICE, ceilings

CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu", "driver_version")


def test_device(request):
    """Measure the rates of a large copy and of large matrix products, and read the clocks under such products."""
    facts: dict = {"ceilings": ceilings()}
    if DEVICE == "cuda":
        a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(700):
            a @ a
        facts["clocks"] = nvidia_smi.query(*CLOCKS)  # the queued products are still running
        torch.cuda.synchronize()
        properties = torch.cuda.get_device_properties(0)
        facts["memory_bytes"], facts["multiprocessors"] = properties.total_memory, properties.multi_processor_count
    request.node.user_properties.append(("facts", facts))
    assert facts["ceilings"]["copy_gb_per_s"] > 0
    print(", ".join(f"{name} {value:,.4g}" for name, value in facts["ceilings"].items()), facts.get("clocks", ""))
