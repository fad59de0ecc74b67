#include "kernels/clocks.hpp"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include <utility>

namespace kv {
namespace {

using Device = void*;  // an nvmlDevice_t

/// A function of NVML, or null. The library comes with the driver, its header with neither: it is loaded at run time and
/// stays.
template <class Function>
Function* find(const char* name) {
  static void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW);
  return library ? reinterpret_cast<Function*>(dlsym(library, name)) : nullptr;
}

constexpr int sm_clock = 1;  // NVML_CLOCK_SM
constexpr std::pair<unsigned long long, const char*> reasons[] = {
    {0x2, "applications clocks setting"}, {0x4, "software power cap"},
    {0x8, "hardware slowdown"},           {0x10, "sync boost"},
    {0x20, "software thermal limit"},     {0x40, "hardware thermal limit"},
    {0x80, "hardware power brake"},       {0x100, "display clock setting"}};  // 0x1 is an idle GPU

}  // namespace

DeviceClocks device_clocks() {
  const auto init = find<int()>("nvmlInit_v2");
  const auto find_device = find<int(const char*, Device*)>("nvmlDeviceGetHandleByPciBusId_v2");
  const auto clock = find<int(Device, int, unsigned*)>("nvmlDeviceGetClockInfo");
  const auto throttle = find<int(Device, unsigned long long*)>("nvmlDeviceGetCurrentClocksThrottleReasons");
  int current = 0;
  char bus[32] = {};
  Device device = nullptr;
  unsigned mhz = 0;
  if (!init || !find_device || !clock || cudaGetDevice(&current) != cudaSuccess ||
      cudaDeviceGetPCIBusId(bus, sizeof bus, current) != cudaSuccess || init() != 0 || find_device(bus, &device) != 0 ||
      clock(device, sm_clock, &mhz) != 0)
    return {};
  DeviceClocks clocks{static_cast<int>(mhz), ""};
  unsigned long long bits = 0;
  if (!throttle || throttle(device, &bits) != 0) return clocks;
  for (const auto& [bit, name] : reasons)
    if (bits & bit) clocks.throttled += fmt::format("{}{}", clocks.throttled.empty() ? "" : ", ", name);
  return clocks;
}

}  // namespace kv
