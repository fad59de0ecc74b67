// engine.hpp and bench.hpp in a build without CUDA: no devices.
#include "core/error.hpp"
#include "kernels/bench.hpp"
#include "kernels/engine.hpp"

namespace kv {

std::vector<DeviceInfo> devices() { return {}; }

std::string why_no_device() { return "this kvreplay was built without CUDA (cmake -DKV_CUDA=ON needs nvcc)"; }

double replay_on_device(Session&, std::span<const DevicePoint>, const DeviceOptions&,
                        const std::function<bool(std::size_t, DeviceOutcome)>&) {
  throw CudaError(why_no_device());
}

BenchDevice bench_device(BenchRun&, const BenchPeers&) { throw CudaError("bench: no GPU: " + why_no_device()); }

}  // namespace kv
