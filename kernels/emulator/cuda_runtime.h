// The part of CUDA that kernels/ uses, for a machine without a GPU: keywords and built-in functions for device code that the
// C++ compiler compiles, and the runtime's calls, which take effect at once.
#pragma once
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "kernels/emulator/machine.hpp"

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__  // empty: libraries write __attribute__((__noinline__))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

#define threadIdx (::kv::emulator::here->index)
#define blockIdx (::kv::emulator::block_index())
#define blockDim (::kv::emulator::block_size())
#define gridDim (::kv::emulator::grid_size())

// ---- Vectors --------------------------------------------------------------------------------------------------------

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned width = 1, unsigned height = 1, unsigned depth = 1) : x(width), y(height), z(depth) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- Built-in functions -----------------------------------------------------------------------------------------------

using std::isfinite;
using std::isnan;
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline long long clock64() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T atomicAdd(T* p, T x) {
  return std::atomic_ref(*p).fetch_add(x);
}
template <class T>
T atomicCAS(T* p, T expected, T x) {
  std::atomic_ref(*p).compare_exchange_strong(expected, x);
  return expected;
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

inline void __syncthreads() { kv::emulator::meet_block(false); }
inline int __syncthreads_or(int x) { return kv::emulator::meet_block(x != 0); }
inline void __syncwarp() { kv::emulator::meet_warp("__syncwarp", 0); }

/// Full warps only.
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return kv::emulator::meet_warp("__shfl_sync", x).template of<T>(lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int bits) {
  const int lane = kv::emulator::here->lane;
  return kv::emulator::meet_warp("__shfl_xor_sync", x).template of<T>(lane ^ bits);
}
template <class T>
T __shfl_down_sync(unsigned, T x, unsigned step) {
  const int lane = kv::emulator::here->lane, from = lane + static_cast<int>(step);
  return kv::emulator::meet_warp("__shfl_down_sync", x).template of<T>(from < 32 ? from : lane);
}
template <class T>
T __shfl_up_sync(unsigned, T x, unsigned step) {
  const int lane = kv::emulator::here->lane, from = lane - static_cast<int>(step);
  return kv::emulator::meet_warp("__shfl_up_sync", x).template of<T>(from >= 0 ? from : lane);
}
inline unsigned __ballot_sync(unsigned, int x) {
  const kv::emulator::Meeting& all = kv::emulator::meet_warp("__ballot_sync", x);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= (all.of<int>(lane) != 0 ? 1u : 0u) << lane;
  return bits;
}
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) { return __ballot_sync(mask, x) == ~0u; }
inline unsigned __reduce_min_sync(unsigned, unsigned x) {
  const kv::emulator::Meeting& all = kv::emulator::meet_warp("__reduce_min_sync", x);
  unsigned least = x;
  for (int lane = 0; lane < 32; ++lane) least = min(least, all.of<unsigned>(lane));
  return least;
}

// ---- The runtime ------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrL2CacheSize,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
struct cudaDeviceProp {
  char name[256];
  std::size_t totalGlobalMem;
  int multiProcessorCount;
};
using cudaStream_t = struct EmulatedStream*;
using cudaEvent_t = struct EmulatedEvent*;
constexpr unsigned cudaStreamNonBlocking = 1;

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaCtxResetPersistingL2Cache();

/// Set to a NaN, and words before and behind are looked at when it is freed.
cudaError_t cudaMalloc(void** memory, std::size_t bytes);
template <class T>
cudaError_t cudaMalloc(T** memory, std::size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(memory), bytes);
}
cudaError_t cudaFree(void* memory);
cudaError_t cudaMallocHost(void** memory, std::size_t bytes);
template <class T>
cudaError_t cudaMallocHost(T** memory, std::size_t bytes) {
  return cudaMallocHost(reinterpret_cast<void**>(memory), bytes);
}
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total);
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemset(void* memory, int byte, std::size_t bytes);
cudaError_t cudaMemset2D(void* memory, std::size_t pitch, int byte, std::size_t width, std::size_t height);
cudaError_t cudaMemsetAsync(void* memory, int byte, std::size_t bytes, cudaStream_t stream);

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end);
