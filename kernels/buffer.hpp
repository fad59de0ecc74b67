// Device memory and calls that fail loudly.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "core/error.hpp"

namespace kv {

/// Throws CudaError naming the call and its place.
inline void cuda_try(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // told now: the next call must not meet it again
  throw CudaError(std::string(file) + ":" + std::to_string(line) + ": " + call + ": " + cudaGetErrorString(status));
}
#define KV_CUDA_TRY(call) ::kv::cuda_try(call, #call, __FILE__, __LINE__)

/// Throws CudaError: says how much was asked for and what to change.
[[noreturn]] void out_of_device_memory(std::size_t bytes);

/// The CudaError of a point that needs `bytes` where only `most` may be used; says what to change.
std::exception_ptr over_device_memory(std::size_t bytes, std::size_t most);

/// Copies and waits until it is there: cudaMemcpy from pageable memory returns before that, and other streams do not wait.
inline void to_device(void* to, const void* from, std::size_t bytes) {
  KV_CUDA_TRY(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
  KV_CUDA_TRY(cudaStreamSynchronize(nullptr));
}

/// An array in device memory. Throws CudaError; one for want of memory says how much was asked for and what to change.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t count) : count_(count) {
    const std::size_t bytes = std::max<std::size_t>(1, count) * sizeof(T);
    const cudaError_t status = cudaMalloc(&data_, bytes);
    if (status == cudaErrorMemoryAllocation) out_of_device_memory(bytes);
    cuda_try(status, "cudaMalloc", __FILE__, __LINE__);
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    to_device(data_, host.data(), count_ * sizeof(T));
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }

  T* data() const { return data_; }
  std::size_t size() const { return count_; }
  std::vector<T> to_host() const {
    std::vector<T> host(count_);
    KV_CUDA_TRY(cudaMemcpy(host.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  T* data_ = nullptr;
  std::size_t count_ = 0;
};

}  // namespace kv
