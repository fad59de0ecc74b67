#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

#include "kernels/emulator/cuda_runtime.h"
#include "kernels/tile_map.hpp"

namespace {

constexpr std::size_t device_bytes = std::size_t{8} << 30, fence_bytes = 256;
constexpr int unset = 0xff, fence = 0xa7, multiprocessors = 4;

struct Memory {
  std::mutex mutex;
  std::map<char*, std::size_t> taken;
  std::size_t bytes = 0, most = 0;
};
Memory& memory() {
  static Memory all;
  return all;
}

bool is_whole(const char* at) {
  for (std::size_t i = 0; i < fence_bytes; ++i)
    if (static_cast<unsigned char>(at[i]) != fence) return false;
  return true;
}

}  // namespace

std::size_t kv::emulator::most_device_bytes() {
  const std::lock_guard lock(memory().mutex);
  return std::exchange(memory().most, memory().bytes);
}

struct EmulatedEvent {
  std::chrono::steady_clock::time_point time;
};

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "out of memory"; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::snprintf(properties->name, sizeof properties->name, "emulator");
  properties->totalGlobalMem = device_bytes, properties->multiProcessorCount = multiprocessors;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 1 << 20;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 << 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 << 10;
      break;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int) {
  std::snprintf(id, static_cast<std::size_t>(length), "none");
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaCtxResetPersistingL2Cache() { return cudaSuccess; }

cudaError_t cudaMalloc(void** to, std::size_t bytes) {
  Memory& all = memory();
  const std::lock_guard lock(all.mutex);
  if (all.bytes + bytes > device_bytes) return cudaErrorMemoryAllocation;
  char* const at = static_cast<char*>(operator new (bytes + 2 * fence_bytes, std::align_val_t{fence_bytes}));
  std::memset(at, fence, fence_bytes), std::memset(at + fence_bytes + bytes, fence, fence_bytes);
  std::memset(at + fence_bytes, unset, bytes);
  all.taken.emplace(at + fence_bytes, bytes), all.bytes += bytes;
  all.most = std::max(all.most, all.bytes);
  *to = at + fence_bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* freed) {
  if (freed == nullptr) return cudaSuccess;
  Memory& all = memory();
  const std::lock_guard lock(all.mutex);
  const auto found = all.taken.find(static_cast<char*>(freed));
  if (found == all.taken.end() || !is_whole(found->first - fence_bytes) || !is_whole(found->first + found->second)) {
    std::fprintf(stderr, "emulator: something was written around an array of device memory, or it was freed twice\n");
    std::abort();
  }
  operator delete (found->first - fence_bytes, std::align_val_t{fence_bytes});
  all.bytes -= found->second, all.taken.erase(found);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** to, std::size_t bytes) { return *to = std::malloc(bytes), cudaSuccess; }
cudaError_t cudaFreeHost(void* freed) { return std::free(freed), cudaSuccess; }
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  const std::lock_guard lock(memory().mutex);
  *free = device_bytes - memory().bytes, *total = device_bytes;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemset(void* at, int byte, std::size_t bytes) { return std::memset(at, byte, bytes), cudaSuccess; }
cudaError_t cudaMemset2D(void* memory, std::size_t pitch, int byte, std::size_t width, std::size_t height) {
  for (std::size_t i = 0; i < height; ++i) std::memset(static_cast<char*>(memory) + i * pitch, byte, width);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* at, int byte, std::size_t bytes, cudaStream_t) { return cudaMemset(at, byte, bytes); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = new EmulatedEvent{}, cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  *ms = std::chrono::duration<float, std::milli>(end->time - begin->time).count();
  return cudaSuccess;
}

namespace kv {

std::uint16_t emulator::element_of_box(const TileMap& map, int channel, int row, int unit) {
  if (unit < 0 || static_cast<std::size_t>(unit) >= map.units)
    throw std::logic_error("emulator: a box of a unit that is not there");
  if (row >= map.rows || channel >= map.dim) return 0;
  const std::size_t at =
      static_cast<std::size_t>(row) * static_cast<std::size_t>(map.dim) + static_cast<std::size_t>(channel);
  std::uint16_t element;
  std::memcpy(&element, map.first + static_cast<std::size_t>(unit) * map.unit_bytes + at * 2, 2);
  return element;
}

TileMap make_tile_map(const void* first, int dim, int rows, std::size_t unit_bytes, std::size_t units, int tile) {
  return {{static_cast<const char*>(first), dim, rows, unit_bytes, units, tile}};
}

}  // namespace kv
