// What the engine knows of a policy: its description, its settings, and its hooks behind one virtual call per head and
// step. Policy authors see policies/policy.hpp instead; the adapter there implements these classes for every policy.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
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

/// What is scored: slots (higher = keep), or links between a slot and its right neighbour (lower = join first).
enum class Select { slots, links };

/// How picked links become merges. disjoint: links that share no slot, in rounds until the budget holds. faithful: the
/// lowest links at once, each plan alone, so that a slot whose left neighbour goes as well is lost (as released code
/// does). fold: the lowest links at once, every run of them becomes one slot.
enum class Picks { disjoint, faithful, fold };

/// The attention of an incoming prompt block over the present cache, seen by on_probe before the block is appended; the
/// cache is then compressed before the append, in the prompt only. due: when a compression is; always: at every block.
enum class Probe { none, due, always };

/// Finds each victim's most similar kept key: head.target(victim), head.similarity(victim).
enum class Nearest { none, cosine, dot };

/// Key gradients of the probed block: from the trace's `e`, or from a stand-in for it (the probe's own outputs).
enum class KeyGradient { none, recorded, surrogate };

/// Statistics of the queries so far (tokens from `first` on), rotated to the next `horizon` positions; 0 = not asked
/// for.
struct FutureQueries {
  int first = 0, horizon = 0;
};

/// What a policy asks of the engine. May depend on the policy's parameters.
struct Traits {
  bool compresses = true;       // false: keeps everything whatever the budget (full)
  Scope scope = Scope::head;    // layer: scores are summed over the layer's KV heads and all heads keep the same tokens
  int observation_window = 0;   // > 0: at each compression head.seen() holds the attention of the last so many queries
  bool window_once = false;     // the window is seen at prompt compressions and at the first of all only
  bool window_past = false;     // the window's queries look at the slots before the window only
  bool observes = true;         // false: these parameters need no on_attention
  bool observes_prompt = true;  // false: on_attention is not called for prompt rows
  bool keeps_state = true;      // false: with these parameters no Slot outlives a compression, and none costs bytes
  bool key_probe = false;       // head.vector() and slot.probe = key . vector
  bool merges = true;           // false: a parameter turned on_merge off, so that nothing is ever folded
  bool one_at_a_time = false;   // merges: victims go one by one, each plan sees the folds before it
  Select select = Select::slots;
  Picks picks = Picks::disjoint;
  float every_link_below = -INFINITY;  // finite: no budget; every link that scores lower joins, once a prompt block
  Probe probe = Probe::none;
  Nearest nearest = Nearest::none;
  int clip = 0;                                  // multiplicities are cut to this; 0 = never
  int interval = 1;                              // in decode, a compression every so many tokens
  bool value_vector = false;                     // head.value_vector(), float[value_dim] of the policy's own
  KeyGradient key_gradient = KeyGradient::none;  // head.key_gradient(slot), known from the probe on
  FutureQueries future_queries = {};             // head.query_mean(g), head.query_covariance(g), while scoring
  bool future_mass = false;                      // head.future_mass(slot): peeks at queries to come
  bool output_norm = false;                      // head.output_norm(slot); needs `wo`

  constexpr bool needs_budget() const { return compresses && every_link_below == -INFINITY; }
};

/// What stays the same for one KV head over a run.
struct HeadInfo {
  int layer = 0;  // index in the model
  int kv_head = 0, group = 1, key_dim = 0, value_dim = 0;
  int budget = 0, prompt_tokens = 0;
  std::uint64_t seed = 0;
  float scale = 1;  // of the model's logits: scale * q.k
  int window = 0;   // of the layer's sliding window; 0 = full attention
};

/// What changes from block to block.
struct Moment {
  int now = -1;  // newest token in the cache
  Phase phase = Phase::prompt;
  int compressions = 0;  // finished before this one
  int block = 0;         // index of the block under way; while probing, of the incoming one
};

/// Where a victim's key and value go. Weights are raw: the engine makes them convex, unless on_target says otherwise.
///   row[target] = (own * row[target] + sum over victims of weight * row[victim]) / divisor,  divisor = own + sum
struct Fold {
  int target = -1;                   // slot; -1 = the victim is dropped
  float key = 0, value = 0;          // weights of the victim's key and value; 0 leaves the target's as it is
  float own_key = 1, own_value = 1;  // weights of the target's; its first victim states them
  float extra = 0;                   // summed over a target's victims, for on_target
  int spread = 1;                    // so many consecutive kept slots, `target` the first, each receive the victim
  float note = NAN;                  // a number worth a quantile in the row, named by the policy's `fold_note`
};

/// A Fold of values alone, into one slot: a policy whose on_merge returns this says at compile time that keys stay as they are.
struct ValueFold {
  int target = -1;  // as Fold's
  float value = 0, own_value = 1;
  float note = NAN;
  constexpr operator Fold() const {
    Fold plan;
    plan.target = target, plan.value = value, plan.own_value = own_value, plan.note = note;
    return plan;
  }
};

/// All that joins one target, before it is written.
struct FoldTarget {
  int victims = 0;
  int multiplicity = 0;                      // tokens of the target and all its victims, before any clip
  float own_key = 1, own_value = 1;          // weights of the target's rows
  float key = 0, value = 0;                  // sums of the victims' weights
  float extra = 0;                           // sum of the victims' Fold::extra
  float key_divisor = 1, value_divisor = 1;  // own + sum of weights; on_target may change them and the own weights
};

/// Sums over query rows of weigh(probability), per slot and query head of the group.
struct Observation {
  const float* sums = nullptr;  // [slots][group], indexed by slot; with a head_stride [group][head_stride]
  int rows = 0, group = 1, head_stride = 0;
};

/// What the engine knows of a head at a moment and its policy asked for; null where it did not, or not now.
struct Sight {
  Observation seen;                   // of the latest rows: the block's, the window's or the probe's
  std::uint8_t* kept = nullptr;       // [slots] who stays
  int* target = nullptr;              // [slots] of victims: the left end of their link or run, or the most similar slot
  const float* similarity = nullptr;  // [slots] of victims, with Nearest
  const float* key_gradient = nullptr;      // [slots][key_dim]
  const float* query_mean = nullptr;        // [group][key_dim]
  const float* query_covariance = nullptr;  // [group][key_dim][key_dim]
  const float* future_mass = nullptr;       // [slots]
  const float* output_norm = nullptr;       // [tokens]
};

/// A policy's hooks bound to one head's cache. All indices are slots (places in the cache), never positions.
class HeadProgram {
 public:
  virtual ~HeadProgram() = default;

  /// Slots [first, cache.size()) were just appended, oldest first.
  virtual void append(const Cache& cache, const Moment& moment, int first) = 0;

  /// A head's budget changed (adaptive allocation).
  virtual void set_budget(int budget) = 0;

  /// Adds weigh(probability, logit, rows_after) of one query row to sums[slot], for slots [0, n); of a window's row:
  /// weigh_window.
  virtual void weigh(const float* probability, const float* logit, int n, int rows_after, bool window,
                     double* sums) const = 0;

  /// on_attention for every slot.
  virtual void observe(const Cache& cache, const Moment& moment, const Sight& sight) = 0;

  /// on_probe: sight.seen is the incoming block's attention over the present slots.
  virtual void probe(const Cache& cache, const Moment& moment, const Sight& sight) = 0;

  /// Fills bias[slot], what is added to each logit: 0 without a log_bias.
  virtual void log_bias(const Cache& cache, const Moment& moment, std::span<float> bias) = 0;

  /// Fills score[slot]; sight.seen is empty without an observation window or a probe.
  virtual void score(const Cache& cache, const Moment& moment, const Sight& sight, std::span<float> score) = 0;

  /// Whether a kept slot may receive victims (Nearest).
  virtual bool receives(const Cache& cache, const Moment& moment, int slot) = 0;

  /// on_selected: who stays is known, nothing has moved.
  virtual void selected(const Cache& cache, const Moment& moment, const Sight& sight) = 0;

  /// The plan for one victim. Without merging: a Fold with target -1.
  virtual Fold merge(const Cache& cache, const Moment& moment, const Sight& sight, int victim) = 0;

  /// on_target: may change own weights and divisors.
  virtual void target(const Cache& cache, const Moment& moment, const Sight& sight, int slot, FoldTarget& sum) = 0;

  /// Fills weight[channel], the slot's weight in each channel of a folded key: 0 without a key_weight.
  virtual void key_weights(const Cache& cache, const Moment& moment, const Sight& sight, int slot,
                           std::span<float> weight) = 0;

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
  virtual std::vector<Field> fields() = 0;                                // bound to this object's parameters
  virtual std::vector<std::pair<std::string, Value>> values() const = 0;  // of all parameters, by name
  virtual Traits traits() const = 0;
  virtual std::unique_ptr<HeadProgram> bind(const HeadInfo& head) const = 0;
};

/// One entry of the catalogue.
struct PolicyEntry {
  PolicyDoc doc;
  Published published;
  bool merges = false, observes = false;         // has on_merge, on_attention
  bool biases = false, weighs_channels = false;  // has log_bias, key_weight
  const char* fold_note = nullptr;               // what Fold::note is called in rows; null = no such thing
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
