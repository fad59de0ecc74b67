// What an output folder still lacks of a plan.
#pragma once
#include <set>
#include <string>
#include <vector>

#include "experiments/plan.hpp"
#include "experiments/results.hpp"
#include "experiments/runner.hpp"

namespace kv {

enum class Action { run, done, failed, skip, skipped };  // skip: a row is to be written; skipped: it is there

/// What is to do for `point` when the output folder holds `rows`.
Action action_of(const Point& point, const RowStates& rows, const RunOptions& options);

/// Prints the number of points, a table of what tells them apart with what is to do, and the memory each trace needs.
void print_plan(const Plan& plan, const RowStates& rows, const RunOptions& options);

}  // namespace kv
