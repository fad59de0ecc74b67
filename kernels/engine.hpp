// The CUDA engine as the rest of the program sees it: many points of one trace at once. No CUDA words: a build without
// CUDA has the same functions and no devices.
#pragma once
#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/replay.hpp"

namespace kv {

/// A GPU that this process can use.
struct DeviceInfo {
  std::string name;
  std::size_t memory = 0;  // bytes
  int multiprocessors = 0;
};

/// All usable devices; empty without one, or in a build without CUDA.
std::vector<DeviceInfo> devices();

/// Why devices() is empty, in one line: "this kvreplay was built without CUDA", or what the driver says.
std::string why_no_device();

/// One point; everything is borrowed.
struct DevicePoint {
  const PolicyEntry* entry = nullptr;
  const BoundPolicy* policy = nullptr;
  const ReplaySettings* settings = nullptr;
};

/// What became of it: a result as replay() gives it, or the error that it ended with.
struct DeviceOutcome {
  ReplayResult result;
  std::exception_ptr error;
  /// noise_floor() of its measured queries by the device's full attention; null for an error, or without recorded outputs.
  std::shared_ptr<const ReplayResult> floor;
  double seconds = 0;  // its share of the time that the points which ran together took
};

struct DeviceOptions {
  std::size_t memory = 0;  // bytes of each device's memory to stay below; 0 = nine tenths of what is free
};

/// Replays points of one trace on all devices. `finished(i, outcome)` is called once for every point, in any order,
/// from the calling thread, as soon as it is known; when it returns false the points that are not under way are left out.
/// A failing point does not disturb the others; one that does not fit beside one layer fails with a CudaError. Returns the
/// seconds in which a device had points under way (timed passes aside), mean over devices. Throws CudaError when no device
/// works at all.
double replay_on_device(Session& session, std::span<const DevicePoint> points, const DeviceOptions& options,
                        const std::function<bool(std::size_t, DeviceOutcome)>& finished);

}  // namespace kv
