// The row of `kvreplay bench` that is a whole sweep.
#pragma once
#include "kernels/bench.hpp"

namespace kv {

inline constexpr const char* sweep_work = "sweep of 100 points, 8k tokens, 32 layers";

/// Ten policies at ten budgets on a trace of an 8B model's shape, from the file to the last result; one pass. Throws
/// InternalError when a result is not right.
BenchRow time_sweep();

}  // namespace kv
