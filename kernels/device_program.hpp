// A policy's kernels behind one virtual call: what policies/*.cpp become when nvcc compiles them, found by name.
#pragma once
#include <cuda_runtime.h>

#include <functional>
#include <memory>
#include <span>
#include <string>

#include "core/policy.hpp"
#include "kernels/unit.hpp"

namespace kv {

/// One policy type with the parameters of several points, on the current device.
class DeviceProgram {
 public:
  virtual ~DeviceProgram() = default;

  /// Bytes of the policy's own data per slot, per slot of a compression, and per head; 0 where it has none.
  virtual std::size_t slot_bytes() const = 0;
  virtual std::size_t scratch_bytes() const = 0;
  virtual std::size_t head_bytes() const = 0;

  /// Whether its statistic of a row or of a window's row is not simply the probability.
  virtual bool weighs(bool window) const = 0;

  /// Fills every task's sums by that statistic.
  virtual void column_sums(const AttentionShape& shape, const AttentionTask* tasks, int tasks_count, int rows,
                           int slots, bool window, cudaStream_t stream) const = 0;

  /// Bytes of shared memory that steps over `slots` slots have a use for beside a row's.
  virtual std::size_t record_bytes(const Traits& traits, const PlaySettings& settings, int group, int key_dim,
                                   int slots) const = 0;

  /// A block of threads for every unit; under `together` as many as are resident at once, whole layers at a time.
  virtual void launch(const Launch& launch, int layer_heads, std::size_t shared_bytes, cudaStream_t stream) const = 0;
};

/// For points of policy `name`. Throws ConfigError for a policy that was not compiled for the device, CudaError.
std::unique_ptr<DeviceProgram> make_device_program(const std::string& name, std::span<const BoundPolicy* const> points);

using MakeDeviceProgram = std::function<std::unique_ptr<DeviceProgram>(std::span<const BoundPolicy* const>)>;

/// Called by KV_REGISTER in device code.
bool register_device_program(const char* name, MakeDeviceProgram make);

}  // namespace kv
