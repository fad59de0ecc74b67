// kernels/launch.cuh by a machine without a GPU.
#pragma once
#include <cuda_runtime.h>

#include <tuple>

#include "kernels/buffer.hpp"

namespace kv {

template <int alignment = 256>
char* launch_memory() {
  return emulator::launch_memory();
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> all(arguments...);
  emulator::run({grid.x, grid.y, grid.z}, threads, shared_bytes, false, [&] { std::apply(kernel, all); });
}

template <class... Parameters, class... Arguments>
void launch_together(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared_bytes, cudaStream_t,
                     const Arguments&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> all(arguments...);
  emulator::run({grid.x, grid.y, grid.z}, threads, shared_bytes, true, [&] { std::apply(kernel, all); });
}

template <class... Parameters>
int resident_blocks(void (*)(Parameters...), int, std::size_t) {
  int multiprocessors = 0;
  KV_CUDA_TRY(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  return 2 * multiprocessors;
}

template <class... Parameters>
bool is_built(void (*)(Parameters...)) {
  return true;
}

}  // namespace kv
