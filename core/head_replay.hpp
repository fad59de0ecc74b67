// One KV head going through a trace: its cache, its policy's state, and the steps of design section 4.
#pragma once
#include <array>
#include <chrono>
#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "core/attention.hpp"
#include "core/cache.hpp"
#include "core/fold.hpp"
#include "core/future_mass.hpp"
#include "core/policy.hpp"
#include "core/query_statistics.hpp"
#include "core/replay.hpp"
#include "core/select.hpp"
#include "core/session.hpp"

namespace kv {

/// What all heads of a layer share during one replay. Everything is borrowed.
struct LayerReplay {
  const TraceHeader& trace;
  const PreparedLayer& layer;
  const PolicyEntry& entry;
  const BoundPolicy& policy;
  const ReplaySettings& settings;
  const FullAttention* full;        // null in timed passes: nothing is measured
  const std::vector<float>* norms;  // [kv_heads][tokens] output_norms, for policies that ask
  ReplayResult* result;             // where measurements go
  float* deltas;                    // [measured][query_heads * value_dim] o' - o, for W_o; may be null
  int index;                        // of the layer in the trace
  int budget;                       // of each of its heads, until an adaptive allocation
};

/// What happened to slots.
struct Counters {
  std::int64_t evictions = 0, merges = 0, lost_in_folds = 0, lost_by_clip = 0, weights_outside = 0, unbalanced = 0;
  int compressions = 0;
  std::vector<float> notes;  // Fold::note of every merge
};

/// Nanoseconds of each phase.
using PhaseTimes = std::array<double, timed_phases>;

class HeadReplay {
 public:
  HeadReplay(const LayerReplay& layer, int kv_head);

  /// Shows the policy the attention of a block that is still to come over the present cache. Nothing is appended.
  void probe(const BlockRange& block);

  /// Appends the block's tokens, attends, measures and lets the policy observe.
  void take(const BlockRange& block, int step);

  /// True when compression is due in this phase and there is something to do: the cache is over budget.
  bool due(const BlockRange& block) const;

  /// The policy's scores of the present slots or links, in token order.
  Candidates score(const BlockRange& block);

  /// Brings the cache to the kept slots (kept[i] and candidates in token order), folding or dropping the others. One
  /// round of a compression.
  void compress(const Candidates& candidates, const std::vector<std::uint8_t>& kept);

  /// Ends a compression.
  void count_compression() { ++counters_.compressions, sight_ = {}; }

  /// Writes the final cache into the result: positions and multiplicities, by position.
  void finish();

  std::vector<int> kept_tokens() const;  // ascending
  const Traits& traits() const { return traits_; }
  int budget() const { return budget_; }
  bool over_budget() const { return traits_.needs_budget() && cache_.size() > budget_; }
  void set_budget(int budget) { budget_ = budget, program_->set_budget(budget); }
  const Counters& counters() const { return counters_; }
  std::size_t workspace_bytes() const;

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
  /// Whose queries look at the cache, and what for.
  struct Look {
    std::vector<int> tokens = {};
    TimedPhase phase = TimedPhase::attend;
    int older = -1;  // slots before a block whose every query is in `tokens`: they need no masks; -1 = unsure
    int newest_key = std::numeric_limits<int>::max();  // they see nothing newer
    bool output = false, observe = false, window = false, gradient = false, mass = false;
  };
  struct Attended {
    std::vector<float> output;  // [rows][group][value_dim]
    std::vector<double> lse;    // [rows][group]
  };

  Moment moment() const { return {now_, phase_, counters_.compressions, block_}; }
  void enter(const BlockRange& block) { phase_ = block.phase, block_ = block.index, block_first_ = block.first; }
  void append_rows(const BlockRange& block);
  /// Whether what the policy sees in this phase can still matter: without compression in decode it stops watching
  /// there.
  bool watches(Phase phase) const;
  std::vector<int> places() const;  // [slots] where a slot's key is rotated to, unless positions are absolute
  std::vector<float> queries(const std::vector<int>& tokens) const;
  AttentionKeys attention_keys();  // also fills bias_ and slot_rotated_
  Attended attend(const Look& look);
  Observation gather(int rows);  // sums_ as hooks read them, in observed_
  void add_statistics(const BlockRange& block);

  void add_gradient(const AttentionTile& tile, const Look& look, const std::vector<float>& q);
  void rotate_gradient_back();

  void measure(const std::vector<int>& rows, const std::vector<int>& measured, const Attended& attended);
  void measure_mass(const AttentionTile& tile, const std::vector<int>& tokens);
  std::vector<int> lost_tokens() const;
  void full_probabilities(const std::vector<int>& tokens, int query_token, int query_head, double full_lse,
                          std::vector<double>& p) const;

  void look_ahead();  // fills sight_ with what policies know of queries to come
  void find_targets(const std::vector<std::uint8_t>& kept);
  void find_nearest();
  std::vector<int> victims(const Candidates& candidates) const;
  void check_plan(const Fold& plan, int victim) const;
  bool can_join(const Fold& plan) const;
  void add_to(FoldSums& sums, const Fold& plan, int victim);
  void fold(const std::vector<int>& going);
  void count_as_if_merged(const std::vector<int>& going);
  void clip(int slot);
  void drop(std::vector<int> slots);

  const LayerReplay& layer_;
  const ModelInfo& model_;
  int kv_head_, group_, budget_;
  Traits traits_;
  Cache cache_;
  std::unique_ptr<HeadProgram> program_;
  Attention attention_;
  Counters counters_;
  int now_ = -1, block_ = 0, block_first_ = 0;  // newest token taken; the block under way
  Phase phase_ = Phase::prompt;
  Sight sight_;                       // what hooks may see in the compression under way
  std::vector<std::uint8_t> stays_;   // [slots] of the compression under way
  std::vector<int> target_;           // [slots] the same
  std::vector<float> similarity_;     // [slots] the same
  std::vector<double> sums_;          // [group][slots] of the latest observation
  std::vector<float> observed_;       // [slots][group] the same for hooks
  std::vector<float> bias_;           // [slots] added to logits
  std::vector<float> gradient_;       // [slots][key_dim] of the latest probe
  std::vector<float> slot_rotated_;   // [slots][key_dim] keys rotated to their place
  std::vector<int> slot_rotated_at_;  // [slots] the place they are rotated to, -1 = stale
  std::optional<QueryStatistics> statistics_;
  std::optional<FutureMass> future_;
  std::vector<float> future_of_slot_;
  std::size_t fold_bytes_ = 0;  // most that one round's sums took
  PhaseTimes times_{};
};

}  // namespace kv
