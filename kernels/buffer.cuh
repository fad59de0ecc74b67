// Device memory and calls that fail loudly.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <string>
#include <vector>

#include "core/error.hpp"

namespace kv {

/// Throws CudaError naming the call and its place.
inline void cuda_try(cudaError_t status, const char* call, const char* file, int line) {
  if (status != cudaSuccess)
    throw CudaError(std::string(file) + ":" + std::to_string(line) + ": " + call + ": " + cudaGetErrorString(status));
}
#define KV_CUDA_TRY(call) ::kv::cuda_try(call, #call, __FILE__, __LINE__)

/// An array in device memory.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t count) : count_(count) {
    KV_CUDA_TRY(cudaMalloc(&data_, std::max<std::size_t>(1, count) * sizeof(T)));
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    KV_CUDA_TRY(cudaMemcpy(data_, host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }
  std::vector<T> to_host() const {
    std::vector<T> host(count_);
    KV_CUDA_TRY(cudaMemcpy(host.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  T* data_ = nullptr;
  std::size_t count_;
};

}  // namespace kv
