// One KV head going through a trace: its cache, its policy's state, and the steps of design section 4.
#pragma once
#include <array>
#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "core/attention.hpp"
#include "core/cache.hpp"
#include "core/policy.hpp"
#include "core/replay.hpp"
#include "core/select.hpp"
#include "core/session.hpp"

namespace kv {

/// Tokens [first, last) that are appended together.
struct BlockRange {
  int first, last;
  Phase phase;
};

/// The blocks of a trace: the prompt in pieces of `block`, each decode token alone.
std::vector<BlockRange> blocks_of(const TraceHeader& trace, Block block);

/// What all heads of a layer share during one replay. Everything is borrowed.
struct LayerReplay {
  const TraceHeader& trace;
  const PreparedLayer& layer;
  const PolicyEntry& entry;
  const BoundPolicy& policy;
  const ReplaySettings& settings;
  const FullAttention* full;  // null in timed passes: nothing is measured
  ReplayResult* result;       // where measurements go
  float* deltas;              // [measured][query_heads * value_dim] o' - o, for W_o; may be null
  int index;                  // of the layer in the trace
};

/// What happened to slots.
struct Counters {
  std::int64_t evictions = 0, merges = 0, lost_in_folds = 0;
  int compressions = 0;
};

/// Nanoseconds of each phase.
using PhaseTimes = std::array<double, timed_phases>;

class HeadReplay {
 public:
  HeadReplay(const LayerReplay& layer, int kv_head);

  /// Appends the block's tokens, attends, measures and lets the policy observe.
  void take(const BlockRange& block, int step);

  /// True when the cache is over budget and compression is due in this phase.
  bool due(const BlockRange& block) const;

  /// The policy's scores of the present slots, in token order.
  Candidates score(const BlockRange& block);

  /// Brings the cache to the kept slots (kept[i] and candidates in token order), folding or dropping the others.
  void compress(const BlockRange& block, const Candidates& candidates, const std::vector<std::uint8_t>& kept);

  /// Writes the final cache into the result: positions and multiplicities, by position.
  void finish();

  std::vector<int> kept_tokens() const;  // ascending
  int budget() const { return layer_.settings.budget; }
  const Counters& counters() const { return counters_; }

  /// Runs `work` and adds its duration to `phase`.
  template <class Work>
  void timed(TimedPhase phase, Work work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    times_[static_cast<std::size_t>(phase)] +=
        std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
  }
  PhaseTimes take_times() { return std::exchange(times_, {}); }  // since the last call

 private:
  struct Attended {
    std::vector<float> output;  // [rows][group][value_dim]
    std::vector<double> lse;    // [rows][group]
  };

  Moment moment(const BlockRange& block) const { return {block.last - 1, block.phase, counters_.compressions}; }
  std::vector<float> queries(const std::vector<int>& tokens) const;
  AttentionKeys attention_keys();
  Attended attend(const std::vector<int>& tokens, int older, bool in_order, bool want_output, bool observe,
                  TimedPhase phase);
  Observation gather(int rows);
  void measure(const std::vector<int>& tokens, const std::vector<int>& measured, const Attended& attended);
  std::vector<int> lost_tokens() const;
  double full_mass(const std::vector<int>& tokens, int query_token, int query_head, double full_lse) const;
  std::vector<int> victims(const Candidates& candidates, const std::vector<std::uint8_t>& kept) const;
  void check_plan(const Fold& plan, int victim) const;
  void fold(const BlockRange& block, const std::vector<int>& going);
  void drop(const BlockRange& block, std::vector<int> slots);
  const LayerReplay& layer_;
  const ModelInfo& model_;
  int kv_head_, group_;
  Traits traits_;
  Cache cache_;
  std::unique_ptr<HeadProgram> program_;
  Attention attention_;
  Counters counters_;
  std::vector<std::uint8_t> stays_;   // [slots] of the compression under way
  std::vector<double> sums_;          // [group][slots] of the latest observation
  std::vector<float> observed_;       // [slots][group] the same for hooks
  std::vector<float> slot_rotated_;   // [slots][key_dim] keys rotated by place in the cache
  std::vector<int> slot_rotated_at_;  // [slots] the place they are rotated to, -1 = stale
  PhaseTimes times_{};
};

}  // namespace kv
