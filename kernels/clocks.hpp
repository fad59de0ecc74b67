// The current device's clocks and what throttles them, through NVML.
#pragma once
#include "kernels/bench.hpp"

namespace kv {

/// Unknown where the driver's management library is not there, or does not say.
DeviceClocks device_clocks();

}  // namespace kv
