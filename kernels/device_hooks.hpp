// A policy's hooks on the GPU, one head at a time: what parity tests compare with the CPU's.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "core/policy.hpp"

namespace kv {

/// One head's cache and what its hooks are told; host memory.
struct HookInputs {
  std::vector<std::pair<std::string, Value>> parameters;  // that differ from the policy's defaults
  HeadInfo head;
  Moment moment;
  std::vector<float> keys, values;                    // [slots][key_dim], [slots][value_dim]
  std::vector<int> token, multiplicity, order, rank;  // [slots]
  std::vector<float> sums;                            // [slots][group] the observation
  int rows = 1;                                       // queries it sums
  std::vector<std::uint8_t> kept;                     // [slots]
  std::vector<int> target;                            // [slots] of victims
  std::vector<float> similarity, future_mass;         // [slots]
  std::vector<float> key_gradient;                    // [slots][key_dim]
  std::vector<float> query_mean, query_covariance;    // [group][key_dim], [group][key_dim][key_dim]
  std::vector<float> output_norm;                     // [tokens]
  int slots() const { return static_cast<int>(token.size()); }
};

/// What the hooks answered.
struct HookOutputs {
  std::vector<float> score;      // [slots]
  std::vector<float> bias;       // [slots] log_bias, 0 without one
  std::vector<Fold> folds;       // [slots] of slots that are not kept
  std::vector<FoldTarget> sums;  // [slots] what on_target makes of one victim that weighs 1/4 of its target
  std::vector<float> weights;    // [slots] key_weight of channel 0, 0 without one
};

/// Appends all slots, observes, probes, scores, selects and plans merges with policy `name`, on the current device. Throws
/// CudaError, ConfigError for an unknown name.
HookOutputs run_hooks_on_device(const std::string& name, const HookInputs& inputs);

/// True when a device can run what was compiled.
bool has_device();

/// Called by KV_REGISTER in device code.
bool register_device_hooks(const char* name, std::function<HookOutputs(const HookInputs&)> run);

}  // namespace kv
