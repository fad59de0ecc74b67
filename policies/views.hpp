// What hooks see: one slot, one row, one head. Plain pointers behind accessors, so that the same hook source runs in
// the CPU engine and inlined in kernels.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "core/dtype.hpp"
#include "core/policy.hpp"

#if defined(__CUDACC__)
#define KV_HD __host__ __device__
#else
#define KV_HD
#endif

namespace kv {

/// Exponential and logarithm by way of double: rounded once, so that both engines give the same bits.
KV_HD inline float exp(float x) { return static_cast<float>(std::exp(static_cast<double>(x))); }
KV_HD inline float log(float x) { return static_cast<float>(std::log(static_cast<double>(x))); }

/// Scores above every other: such slots stay whatever the rest. When more are protected than fit, the lowest sinks stay
/// (all but one slot of the budget), then the newest protected slots.
inline constexpr float sink = INFINITY;
inline constexpr float protect = 3.402823466e38f;

/// Per query head of the group: the sum over query rows of weigh(probability), by default attention mass.
class Observed {
 public:
  /// Head g's sum is sums[g * step].
  KV_HD Observed(const float* sums, int rows, int group, int step = 1)
      : sums_(sums), rows_(rows), group_(group), step_(step) {}
  Observed() = default;  // nothing
  KV_HD const float* sums() const { return sums_; }
  KV_HD float operator[](int g) const { return sums_[static_cast<long>(g) * step_]; }
  KV_HD int group() const { return group_; }
  KV_HD int rows() const { return rows_; }  // how many query rows were summed
  KV_HD float mean() const {
    float sum = 0;
    for (int g = 0; g < group_; ++g) sum += (*this)[g];
    return sum / static_cast<float>(group_);
  }
  KV_HD float max() const {
    float best = (*this)[0];
    for (int g = 1; g < group_; ++g) best = (*this)[g] > best ? (*this)[g] : best;
    return best;
  }

 private:
  const float* sums_ = nullptr;
  int rows_ = 0, group_ = 0, step_ = 1;
};

// A hook that reads what its policy did not ask for is told so (on the CPU; kernels are compiled for the same policy).
#if defined(__CUDA_ARCH__)
#define KV_NEEDS(pointer, what) ((void)0)
#else
#define KV_NEEDS(pointer, what) ((pointer) != nullptr ? (void)0 : ::kv::hook_lacks(what))
#endif

/// One slot, in a slot hook: its own data only, so hooks cannot race. Seen is an Observed, or what an engine has in its place.
template <class State, class Seen = Observed>
struct SlotView {
  State& state;  // the policy's Slot
  const HeadInfo& head;
  int token;         // index in the sequence (never a RoPE position)
  int now;           // token index of the newest slot
  int multiplicity;  // tokens it stands for
  float probe;       // key . head.vector(), with the trait key_probe
  Seen seen_{};
  KV_HD int age() const { return now - token; }               // 0 = just appended
  KV_HD bool recent(int n) const { return now - token < n; }  // among the newest n
  KV_HD int budget() const { return head.budget; }
  /// The attention of the last queries, with the trait observation_window; in `score`.
  KV_HD const Seen& seen() const {
    KV_NEEDS(seen_.sums(), "slot.seen() needs the trait observation_window, and is known while scoring only");
    return seen_;
  }
  /// What makes a slot count as all its tokens in the softmax: the bias of log_bias.
  KV_HD float log_multiplicity() const { return multiplicity > 1 ? kv::log(static_cast<float>(multiplicity)) : 0.f; }
};

/// f(first, count, channels first .. first + 7 of every row).
template <class F, class... Rows>
KV_HD void call_with_eight(F& f, int first, int count, Rows... rows) {
  struct Eight {
    float x[8];
  };
  const auto load = [first](auto row) {
    Eight eight;
    row.eight(first, eight.x);
    return eight;
  };
  const auto call = [&](const auto&... eights) { f(first, count, eights.x...); };
  call(load(rows)...);
}

/// One key or value in float32. Engines that store rows otherwise have a row type of their own with these members.
struct Row {
  const float* data;
  int dim;
  KV_HD float operator[](int c) const { return data[c]; }
  /// Channels first .. first + 7; 0 beyond the last.
  KV_HD void eight(int first, float (&x)[8]) const {
    for (int k = 0; k < 8; ++k) x[k] = first + k < dim ? data[first + k] : 0.f;
  }
  /// f(first, count, channels of this row, of the others) for all channels in order, eight at a time, of which the last may
  /// have fewer than count = 8: faster than one by one where a single thread reads whole rows. Rows are of one dim.
  template <class F, class... Others>
  KV_HD void each_eight(F f, Others... others) const {
    for (int first = 0; first < dim; first += 8)
      call_with_eight(f, first, dim - first < 8 ? dim - first : 8, *this, others...);
  }
  /// Row `index` of `rows`, which an engine stores as it likes.
  using Rows = const void*;
  KV_HD static Row at(Rows rows, Dtype, long index, int dim) {
    return {static_cast<const float*>(rows) + index * dim, dim};
  }
};

/// One KV head: its slots 0 .. size()-1 in no particular order, linked in token order. RowOf is what a key or value is.
template <class State, class HeadState, class Scratch, class RowOf = Row>
struct HeadView {
  const HeadInfo* info_ = nullptr;
  Moment moment_;
  int size_ = 0;
  typename RowOf::Rows keys_{}, values_{};
  Dtype elements_ = Dtype::float32;  // of keys and values
  const int *token_ = nullptr, *multiplicity_ = nullptr, *order_ = nullptr, *rank_ = nullptr;
  State* state_ = nullptr;
  HeadState* head_state_ = nullptr;
  Scratch* scratch_ = nullptr;
  float *vector_ = nullptr, *value_vector_ = nullptr, *probe_ = nullptr, *score_ = nullptr;
  Sight sight_;

  KV_HD const HeadInfo& info() const { return *info_; }
  KV_HD int size() const { return size_; }
  KV_HD int budget() const { return info_->budget; }
  KV_HD int now() const { return moment_.now; }  // token index of the newest slot
  KV_HD Phase phase() const { return moment_.phase; }
  KV_HD int compressions() const { return moment_.compressions; }  // finished so far
  KV_HD int block() const { return moment_.block; }                // index of the block under way or probed
  KV_HD int token(int s) const { return token_[s]; }
  KV_HD int age(int s) const { return moment_.now - token_[s]; }
  KV_HD int multiplicity(int s) const { return multiplicity_[s]; }
  /// Whether the newest query can see the slot: false beyond a sliding window.
  KV_HD bool visible(int s) const { return info_->window == 0 || age(s) < info_->window; }
  /// The slot `k` places to the right of s in token order (left when negative), or -1 beyond the ends.
  KV_HD int neighbour(int s, int k) const {
    const int place = rank_[s] + k;
    return place >= 0 && place < size_ ? order_[place] : -1;
  }
  KV_HD int next(int s) const { return neighbour(s, 1); }
  /// Place in token order, 0 = the oldest slot; and the slot of a place.
  KV_HD int place(int s) const { return rank_[s]; }
  KV_HD int at(int place) const { return order_[place]; }
  KV_HD State& state(int s) const { return state_[s]; }
  KV_HD HeadState& shared() const { return *head_state_; }
  /// The policy's Scratch of a slot: kept from on_probe or scoring to the plans of the same compression, and not a byte
  /// of the cache.
  KV_HD Scratch& scratch(int s) const { return scratch_[s]; }
  /// Rotated at its own position under positions `absolute`, unrotated otherwise.
  KV_HD RowOf key(int s) const { return RowOf::at(keys_, elements_, s, info_->key_dim); }
  KV_HD RowOf value(int s) const { return RowOf::at(values_, elements_, s, info_->value_dim); }
  /// The policy's own float[key_dim], with the trait key_probe.
  KV_HD float* vector() const { return KV_NEEDS(vector_, "head.vector() needs the trait key_probe"), vector_; }
  /// The policy's own float[value_dim], with the trait value_vector.
  KV_HD float* value_vector() const {
    return KV_NEEDS(value_vector_, "head.value_vector() needs the trait value_vector"), value_vector_;
  }
  /// key(s) . vector() at this compression, with the trait key_probe.
  KV_HD float probe(int s) const {
    return KV_NEEDS(probe_, "head.probe() needs the trait key_probe, and is known while scoring only"), probe_[s];
  }
  /// The attention of the last queries (trait observation_window) or of the incoming block (trait probe), from then on
  /// until the compression is over.
  KV_HD Observed seen(int s) const {
    KV_NEEDS(sight_.seen.sums,
             "head.seen() needs the trait observation_window or probe, and is known while compressing only");
    const Observation& seen = sight_.seen;
    if (seen.head_stride > 0) return {seen.sums + s, seen.rows, seen.group, seen.head_stride};
    return {seen.sums + static_cast<long>(s) * seen.group, seen.rows, seen.group};
  }
  /// What on_compress writes.
  KV_HD float& score(int s) const { return KV_NEEDS(score_, "head.score() belongs to on_compress"), score_[s]; }

  /// Who stays; from on_selected on.
  KV_HD bool kept(int s) const {
    return KV_NEEDS(sight_.kept, "head.kept() is known from on_selected on"), sight_.kept[s] != 0;
  }
  /// Where a victim belongs: under links the left slot of its link (picks fold: the slot that its run becomes), with
  /// the trait nearest the most similar slot; -1 of slots that stay. From on_selected on.
  KV_HD int target(int s) const {
    return KV_NEEDS(sight_.target, "head.target() is known from on_selected on"), sight_.target[s];
  }
  /// How similar a victim's key and its target's are, with the trait nearest.
  KV_HD float similarity(int s) const {
    return KV_NEEDS(sight_.similarity, "head.similarity() needs the trait nearest"), sight_.similarity[s];
  }
  /// Calls f(slot) for slot `first` and the victims of its run, oldest first.
  template <class F>
  KV_HD void for_run(int first, F f) const {
    for (int s = first; s >= 0 && (s == first || target(s) == first); s = next(s)) f(s);
  }
  /// In on_selected, picks fold: the run that became slot `first` becomes its member s instead.
  KV_HD void settle(int first, int s) const {
    if (s == first) return;
    const int* target = sight_.target;
    for (int member = next(first); member >= 0 && target[member] == first; member = next(member))
      sight_.target[member] = s;
    sight_.target[first] = s;
    sight_.target[s] = -1, sight_.kept[first] = 0, sight_.kept[s] = 1;
  }
  /// dLoss/d key(s) of the probed block, float[key_dim], with the trait key_gradient.
  KV_HD const float* key_gradient(int s) const {
    KV_NEEDS(sight_.key_gradient, "head.key_gradient() needs the trait key_gradient");
    return sight_.key_gradient + static_cast<long>(s) * info_->key_dim;
  }
  /// Mean [key_dim] and covariance [key_dim][key_dim] of query head g's queries, rotated to positions to come, with the
  /// trait future_queries.
  KV_HD const float* query_mean(int g) const {
    KV_NEEDS(sight_.query_mean, "head.query_mean() needs the trait future_queries");
    return sight_.query_mean + static_cast<long>(g) * info_->key_dim;
  }
  KV_HD const float* query_covariance(int g) const {
    KV_NEEDS(sight_.query_covariance, "head.query_covariance() needs the trait future_queries");
    return sight_.query_covariance + static_cast<long>(g) * info_->key_dim * info_->key_dim;
  }
  /// Full-attention mass that the slot's token gets from the recorded queries to come, with the trait future_mass.
  KV_HD float future_mass(int s) const {
    return KV_NEEDS(sight_.future_mass, "head.future_mass() needs the trait future_mass"), sight_.future_mass[s];
  }
  /// Mean over the group of |W_o v|_1 of the slot's token, with the trait output_norm.
  KV_HD float output_norm(int s) const {
    return KV_NEEDS(sight_.output_norm, "head.output_norm() needs the trait output_norm"),
           sight_.output_norm[token_[s]];
  }
};

/// The best k slots by some value, the older of equals first: what best_slots found, to be asked slot by slot.
struct Cut {
  std::uint32_t key;  // of the value of the last one that is in
  int token;          // of the last one that is in among those of that value; -1 when none is
  /// Floats as integers that compare alike.
  KV_HD static std::uint32_t key_of(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value + 0.f);  // -0 is 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  KV_HD static float value_of(std::uint32_t key) {
    return std::bit_cast<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
  }
  KV_HD bool has(float value, int slot_token) const {
    return key_of(value) > key || (key_of(value) == key && slot_token <= token);
  }
};

/// The best k of a head's slots by value(slot), by bisection: 63 passes over the slots, whatever k.
template <class Team, class Head, class Value>
KV_HD Cut best_slots(Team team, const Head& head, int k, Value value) {
  const auto count = [&](auto f) {
    return static_cast<int>(team.sum(head.size(), [&](int s) { return f(s) ? 1.f : 0.f; }));
  };
  if (k <= 0) return {0xffffffffu, -1};
  if (k >= head.size()) return {0, 0x7fffffff};
  Cut cut{0, 0};
  for (std::uint32_t bit = 0x80000000u; bit > 0; bit >>= 1)  // the largest key that k slots reach
    if (count([&](int s) { return Cut::key_of(value(s)) >= (cut.key | bit); }) >= k) cut.key |= bit;
  const int left = k - count([&](int s) { return Cut::key_of(value(s)) > cut.key; });
  for (int bit = 0x40000000; bit > 0; bit >>= 1)  // the oldest of those that share it
    if (count([&](int s) { return Cut::key_of(value(s)) == cut.key && head.token(s) < (cut.token | bit); }) < left)
      cut.token |= bit;
  return cut;
}

/// The view of a cache, without a policy's own state.
template <class State, class HeadState, class Scratch>
HeadView<State, HeadState, Scratch> view_of(const HeadInfo& info, const Moment& moment, const Cache& cache) {
  HeadView<State, HeadState, Scratch> head;
  head.info_ = &info, head.moment_ = moment, head.size_ = cache.size();
  head.keys_ = cache.keys(), head.values_ = cache.values();
  head.token_ = cache.tokens().data(), head.multiplicity_ = cache.multiplicities().data();
  head.order_ = cache.order().data(), head.rank_ = cache.rank().data();
  return head;
}

}  // namespace kv
