#include "kernels/buffer.hpp"

#include <fmt/core.h>

namespace kv {

void out_of_device_memory(std::size_t bytes) {
  cudaGetLastError();  // the failure is told; what comes next must not meet it again
  throw CudaError(
      fmt::format("{:.1f} MiB of device memory were asked for and are not free: lower the budget or replay.block, end "
                  "what else uses "
                  "the GPU, or give more with --device-memory",
                  static_cast<double>(bytes) / 1048576));
}

std::exception_ptr over_device_memory(std::size_t bytes, std::size_t most) {
  return std::make_exception_ptr(CudaError(
      fmt::format("one layer of the trace and this point take {:.1f} MiB of device memory, and {:.1f} MiB may "
                  "be used: lower the budget or replay.block, or give more with --device-memory",
                  static_cast<double>(bytes) / 1048576, static_cast<double>(most) / 1048576)));
}

}  // namespace kv
