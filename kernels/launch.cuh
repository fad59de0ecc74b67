// Kernels and what a launch gives them. kernels/emulator has the same functions for a machine without a GPU.
#pragma once
#include <cuda_runtime.h>

#include "kernels/buffer.hpp"

namespace kv {

/// The shared memory that a launch gives each of its blocks, beside what kernels declare; at a multiple of 256 bytes, or
/// 1024.
template <int alignment = 256>
__device__ char* launch_memory() {
  static_assert(alignment == 256 || alignment == 1024);
  extern __shared__ __align__(256) char memory[];
  extern __shared__ __align__(1024) char swizzled[];
  return alignment == 256 ? memory : swizzled;
}

namespace detail {

template <bool together, class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  KV_CUDA_TRY(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative, cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(static_cast<unsigned>(threads)), config.dynamicSmemBytes = shared_bytes;
  config.stream = stream, config.attrs = &cooperative, config.numAttrs = together ? 1 : 0;
  KV_CUDA_TRY(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace detail

/// Throws CudaError.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  detail::launch<false>(kernel, grid, threads, shared_bytes, stream, arguments...);
}

/// The same of blocks that wait for each other: all must be resident at once.
template <class... Parameters, class... Arguments>
void launch_together(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared_bytes,
                     cudaStream_t stream, const Arguments&... arguments) {
  detail::launch<true>(kernel, grid, threads, shared_bytes, stream, arguments...);
}

/// How many blocks are resident on the present device at once. Throws CudaError.
template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, std::size_t shared_bytes) {
  int each = 0, device = 0, multiprocessors = 0;
  KV_CUDA_TRY(cudaGetDevice(&device));
  KV_CUDA_TRY(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  KV_CUDA_TRY(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  KV_CUDA_TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes));
  return each * multiprocessors;
}

/// True when the present device runs a kernel's sm_90a code: only that has barriers in static shared memory, builds for
/// other architectures are empty.
template <class... Parameters>
bool is_built(void (*hopper_kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  KV_CUDA_TRY(cudaFuncGetAttributes(&attributes, hopper_kernel));
  return attributes.sharedSizeBytes > 0;
}

}  // namespace kv
