// How long work takes on the device.
#pragma once
#include <cuda_runtime.h>

#include <vector>

#include "kernels/buffer.hpp"

namespace kv {

/// Microseconds of `repeats` passes by events, after two that do not count.
template <class Work>
std::vector<double> event_times(int repeats, Work work) {
  cudaEvent_t begin = nullptr, end = nullptr;
  KV_CUDA_TRY(cudaEventCreate(&begin));
  KV_CUDA_TRY(cudaEventCreate(&end));
  std::vector<double> us;
  for (int repeat = 0; repeat < repeats + 2; ++repeat) {
    KV_CUDA_TRY(cudaEventRecord(begin));
    work();
    KV_CUDA_TRY(cudaEventRecord(end));
    KV_CUDA_TRY(cudaEventSynchronize(end));
    float ms = 0;
    KV_CUDA_TRY(cudaEventElapsedTime(&ms, begin, end));
    if (repeat > 1) us.push_back(static_cast<double>(ms) * 1e3);
  }
  cudaEventDestroy(begin), cudaEventDestroy(end);
  return us;
}

}  // namespace kv
