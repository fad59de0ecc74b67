// Streams and events that end with their scope.
#pragma once
#include <cuda_runtime.h>

#include "kernels/buffer.hpp"

namespace kv {

/// A stream that waits for no other. Throws CudaError.
struct Stream {
  Stream() { KV_CUDA_TRY(cudaStreamCreateWithFlags(&id, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(id); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t id = nullptr;
};

/// A moment of a stream. Throws CudaError.
struct Event {
  Event() { KV_CUDA_TRY(cudaEventCreate(&id)); }
  ~Event() { cudaEventDestroy(id); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) { KV_CUDA_TRY(cudaEventRecord(id, stream)); }
  /// Seconds from `earlier` to this one, both of which have happened.
  double since(const Event& earlier) const {
    float ms = 0;
    KV_CUDA_TRY(cudaEventElapsedTime(&ms, earlier.id, id));
    return static_cast<double>(ms) * 1e-3;
  }
  cudaEvent_t id = nullptr;
};

}  // namespace kv
