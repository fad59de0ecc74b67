// engine.hpp and bench.hpp in a build without CUDA: no devices.
#include "core/error.hpp"
#include "kernels/bench.hpp"
#include "kernels/engine.hpp"

namespace kv {

std::vector<DeviceInfo> devices() { return {}; }

std::string why_no_device() { return "this kvreplay was built without CUDA (cmake -DKV_CUDA=ON needs nvcc)"; }

void replay_on_device(Session&, std::span<const DevicePoint>, const DeviceOptions&,
                      const std::function<bool(std::size_t, DeviceOutcome)>&) {
  throw CudaError(why_no_device());
}

BenchResult bench_device(const std::string&, const BenchPeers&, const std::function<void(const BenchRow&)>&) {
  throw CudaError("bench: " + why_no_device());
}

}  // namespace kv
