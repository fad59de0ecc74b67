// The replay of one point: a trace's recorded queries, keys and values through one policy at one budget (design section
// 4).
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/budget.hpp"
#include "core/policy.hpp"
#include "core/session.hpp"
#include "core/spec.hpp"

namespace kv {

/// A point with every setting resolved.
struct ReplaySettings {
  int budget = 0;  // slots per KV head after a compression
  Block block;
  Compress compress = Compress::always;
  Positions positions = Positions::absolute;
  Precision precision = Precision::exact;  // the CPU engine knows only this one
  std::vector<int> measured;               // tokens whose queries are compared with full attention, ascending
  Protect protect;
  Allocation allocation;
  std::uint64_t seed = 0;
  bool mass = false;       // also mass_tv, at the cost of full attention for every measured query
  int timing_repeats = 0;  // timed passes after the checked one; 0 = no us.* figures
};

/// The phases that are timed (design section 8).
enum class TimedPhase { append, attend, observe, score, select, compact };
inline constexpr int timed_phases = 6;
inline constexpr const char* timed_phase_names[timed_phases] = {"append", "attend", "observe",
                                                                "score",  "select", "compact"};

/// Everything one replay measured. M = measured queries, in `measured` order; layers in recorded order.
struct ReplayResult {
  int layers = 0, query_heads = 0, kv_heads = 0;
  std::vector<int> measured;                    // [M] tokens
  std::vector<double> error2, output2, cosine;  // [layer][query head][M]: |o' - o|^2, |o|^2, 1 - cos(o', o)
  std::vector<double> lost_mass;                // [layer][query head][M]
  std::vector<double> mass_tv;                  // the same: how far attention mass moved; empty unless asked for
  // [layer][M] |W_o (o' - o)|^2, |W_o o|^2: NaN in layers without wo, empty without any.
  std::vector<double> wo_error2, wo_output2;
  std::vector<int> step_token;                                // [step] newest token of each block
  std::vector<int> slots;                                     // [layer][KV head][step] slots that the block attended to
  std::vector<int> final_slots;                               // [layer][KV head] slots after the last compression
  std::vector<std::vector<std::int64_t>> final_position;      // [layer * KV heads + head][slot] token indices
  std::vector<std::vector<std::int64_t>> final_multiplicity;  // the same: tokens that the slot stands for
  std::int64_t evictions = 0, merges = 0, compressions = 0;
  std::int64_t lost_in_folds = 0, lost_by_clip = 0;  // tokens whose target went as well; counts cut off by a clip
  std::int64_t weights_outside = 0;                  // merges that wrote a key with a weight outside [0, 1]
  std::int64_t unbalanced = 0;                       // merges whose value weights do not add up to 1
  std::vector<float> fold_notes;                     // Fold::note of every merge that states one
  bool leaks = false;                                // measured queries that the policy had seen
  std::size_t workspace_bytes = 0;                   // working memory of the unit (head or layer) that took most
  // [phase][decode step] microseconds summed over layers and heads, median over repeats; empty when not timed.
  std::vector<std::vector<double>> us;
  std::vector<double> prompt_us;  // [phase] of all prompt blocks together
  double timing_noise = 0;  // relative: (max - min) / median over repeats of the decode total; NaN under 2 repeats
};

/// Tokens [first, last) that are appended together; the index counts blocks.
struct BlockRange {
  int first, last;
  Phase phase;
  int index;
};

/// The blocks of a trace: the prompt in pieces of `block`, each decode token alone.
std::vector<BlockRange> blocks_of(const TraceHeader& trace, Block block);

/// The bytes of one slot under `policy`: the rule of design section 6.
SlotBytes slot_bytes(const TraceHeader& trace, const PolicyEntry& policy, const Traits& traits, Positions positions);

/// Those of `tokens` whose query every layer recorded: what can be measured.
std::vector<int> recorded_queries(const TraceHeader& trace, const std::vector<int>& tokens);

/// Slots per KV head of each layer, as the allocation spreads the budget.
std::vector<int> budgets_of(const TraceHeader& trace, const Traits& traits, const ReplaySettings& settings);

/// A result of the right shapes in which nothing is measured yet: NaN everywhere.
ReplayResult empty_result(const TraceHeader& trace, const ReplaySettings& settings);

/// Whether a query is measured after its policy saw it: an oracle's always are, a probed block's are.
bool sees_measured_queries_early(const TraceHeader& trace, const Traits& traits, const ReplaySettings& settings);

/// Fills in what timed passes took: us[phase][step][repeat] of decode steps, prompt[phase][repeat].
void add_times(ReplayResult& result, const std::vector<std::vector<std::vector<double>>>& us,
               const std::vector<std::vector<double>>& prompt);

/// Throws ConfigError when the trace lacks what the policy or the settings need (queries, unrotated keys), naming the
/// dataset; cheap, so that all points are checked before the first one runs.
void check_point(const TraceHeader& trace, const PolicyEntry& entry, const BoundPolicy& policy,
                 const ReplaySettings& settings);

/// Replays one point on the CPU. Deterministic for any number of threads. Throws ConfigError as check_point does,
/// InternalError naming layer, head and slot when a policy scores NaN.
ReplayResult replay(Session& session, const PolicyEntry& entry, const BoundPolicy& policy,
                    const ReplaySettings& settings);

/// Replayed full attention against the model's own recorded output, in ReplayResult's error fields: the noise floor of
/// the trace. Throws TraceError when the trace has no `o`.
ReplayResult noise_floor(Session& session, const std::vector<int>& measured);

}  // namespace kv
