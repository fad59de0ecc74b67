// What one device does of a replay.
#pragma once
#include <vector>

#include "kernels/layer_feed.hpp"

namespace kv {

/// A point and its index among the caller's.
struct DealtPoint {
  std::size_t index;
  DevicePoint point;
};

/// Replays the points on the current device and puts what becomes of each into the outbox. Returns the seconds in which
/// points were under way, timed passes aside. Throws CudaError, TraceError: then some points have no outcome yet.
double replay_on_current_device(SharedSession& session, const std::vector<DealtPoint>& points,
                                const DeviceOptions& options, Outbox& outbox);

}  // namespace kv
