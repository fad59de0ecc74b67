// What the engine knows of a policy: its description, its settings, and its hooks behind one virtual call per head and
// step. Policy authors see policies/policy.hpp instead; the adapter there implements these classes for every policy.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/cache.hpp"
#include "core/fields.hpp"
#include "core/spec.hpp"

namespace kv {

/// What a policy is; shown by `kvreplay policies`, in README's table and in figures.
struct PolicyDoc {
  const char* name;     // in YAML and results
  const char* title;    // in figures
  const char* paper;    // authors, year, arXiv id
  const char* summary;  // one line: what stays, what goes
};

/// What a policy asks of the engine. May depend on the policy's parameters.
struct Traits {
  bool compresses = true;       // false: keeps everything whatever the budget (full)
  Scope scope = Scope::head;    // layer: scores are summed over the layer's KV heads and all heads keep the same tokens
  int observation_window = 0;   // > 0: at each compression head.seen() holds the attention of the last so many queries
  bool window_once = false;     // the window is seen at prompt compressions and at the first of all only
  bool observes_prompt = true;  // false: on_attention is not called for prompt rows
  bool key_probe = false;       // head.vector() and slot.probe = key . vector
  bool merges = true;           // false: a parameter turned on_merge off, so that nothing is ever folded
  bool one_at_a_time = false;   // merges: victims go one by one, each plan sees the folds before it
};

/// What stays the same for one KV head over a run.
struct HeadInfo {
  int layer = 0;  // index in the model
  int kv_head = 0, group = 1, key_dim = 0, value_dim = 0;
  int budget = 0, prompt_tokens = 0;
  std::uint64_t seed = 0;
};

/// What changes from block to block.
struct Moment {
  int now = -1;  // newest token in the cache
  Phase phase = Phase::prompt;
  int compressions = 0;  // finished before this one
};

/// Where a victim's key and value go. Weights are raw: the engine makes them convex.
///   row[target] = (own * row[target] + sum over victims of weight * row[victim]) / (own + sum of weights)
struct Fold {
  int target = -1;                   // slot; -1 = the victim is dropped
  float key = 0, value = 0;          // weights of the victim's key and value; 0 leaves the target's as it is
  float own_key = 1, own_value = 1;  // weights of the target's; its first victim states them
};

/// Sums over query rows of weigh(probability), per slot and query head of the group.
struct Observation {
  const float* sums = nullptr;  // [slots][group], indexed by slot
  int rows = 0, group = 1;
};

/// A policy's hooks bound to one head's cache. All indices are slots (places in the cache), never positions.
class HeadProgram {
 public:
  virtual ~HeadProgram() = default;

  /// Slots [first, cache.size()) were just appended, oldest first.
  virtual void append(const Cache& cache, const Moment& moment, int first) = 0;

  /// Adds weigh(probability, logit, rows_after) of one query row to sums[slot], for slots [0, n).
  virtual void weigh(const float* probability, const float* logit, int n, int rows_after, double* sums) const = 0;

  /// on_attention for every slot.
  virtual void observe(const Cache& cache, const Moment& moment, const Observation& seen) = 0;

  /// Fills score[slot] (higher = keep); `seen` is empty without an observation window.
  virtual void score(const Cache& cache, const Moment& moment, const Observation& seen, std::span<float> score) = 0;

  /// The plan for one victim; kept[slot] says who stays. Without merging: a Fold with target -1.
  virtual Fold merge(const Cache& cache, const Moment& moment, std::span<const std::uint8_t> kept, int victim) = 0;

  /// State of `from` joins its target; called after the rows were folded.
  virtual void fold(const Fold& plan, int from) = 0;

  /// `slot` is about to go (its rows and state are still there).
  virtual void evict(const Cache& cache, const Moment& moment, int slot) = 0;

  /// Slot `from` now lives at `to`; then only `size` slots remain.
  virtual void move(int from, int to) = 0;
  virtual void resize(int size) = 0;
};

/// A policy with its parameters.
class BoundPolicy {
 public:
  virtual ~BoundPolicy() = default;
  virtual std::vector<Field> fields() = 0;  // bound to this object's parameters
  virtual Traits traits() const = 0;
  virtual std::unique_ptr<HeadProgram> bind(const HeadInfo& head) const = 0;
};

/// One entry of the catalogue.
struct PolicyEntry {
  PolicyDoc doc;
  Published published;
  bool merges = false, observes = false;  // has on_merge, on_attention
  std::size_t slot_state_bytes = 0, head_state_bytes = 0;
  std::string file;
  std::function<std::unique_ptr<BoundPolicy>()> make;  // with default parameters
};

/// All registered policies, by name.
const std::vector<PolicyEntry>& policies();

/// Throws ConfigError with the nearest name.
const PolicyEntry& find_policy(const std::string& name);

/// Throws InternalError: a hook reads what its policy did not ask for.
[[noreturn]] void hook_lacks(const char* what);

/// Called by KV_REGISTER before main.
bool register_policy(PolicyEntry entry);

}  // namespace kv
