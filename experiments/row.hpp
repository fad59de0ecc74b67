// What a row of runs.jsonl says: a point, and what its replay measured, as one flat object with dotted keys.
#pragma once
#include <optional>
#include <string>

#include "core/metrics.hpp"
#include "core/replay.hpp"
#include "experiments/point.hpp"
#include "experiments/results.hpp"

namespace kv {

/// How far replayed full attention is from the model's own output.
struct NoiseFloor {
  std::optional<double> nmse, rel_l2_mean;
};

/// How the run went, beside what it measured.
struct RunCost {
  double seconds = 0;
  int threads = 1;
  std::string device;  // name of the GPU; "" on the CPU
};

/// The part that every row has: run, status, error, trace and all settings.
Row make_row(const Point& point, const TraceHeader& header, const std::string& status, const std::string& error);

/// Makes it the row of a failed run; what was measured stays in it. `code` is the exit code of the failure.
void set_failed(Row& row, const std::string& error, int code);

/// Adds everything measured.
void add_result(Row& row, const Point& point, const TraceHeader& header, const ReplayResult& result,
                const Metrics& metrics, const NoiseFloor& floor);

/// Adds what the run took; a failed one's row says it too.
void add_cost(Row& row, const RunCost& cost);

/// Slots and bytes held over the measured steps (blocks with a measured token), all layers and heads together.
struct Held {
  double cache_mean = 0, metadata_mean = 0;     // bytes
  std::size_t cache_peak = 0, cache_final = 0;  // bytes
  std::size_t full = 0;                         // bytes of a full cache of all tokens
  double full_mean = 0;                         // bytes of the full cache over the same measured steps
  double slots_mean = 0;                        // per layer and head
  int slots_min = 0, slots_peak = 0;            // of any layer and head
  std::optional<double> slots_decode_mean;      // over all decode steps
};
Held held_of(const ReplayResult& result, const TraceHeader& header, const SlotBytes& bytes);

}  // namespace kv
