// How large a value is once W_o has mapped it to the model's output (CriticalKV, Feng et al. 2025, arXiv:2502.03805).
#pragma once
#include <vector>

#include "core/session.hpp"

namespace kv {

/// [kv_heads][tokens] mean over the group's query heads h of |W_o^(h) v|_1. The layer has `wo`.
std::vector<float> output_norms(const TraceHeader& trace, const PreparedLayer& layer);

}  // namespace kv
