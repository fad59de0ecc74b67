// What hooks see: one slot, one row, one head. Plain pointers behind accessors, so that the same hook source runs in
// the CPU engine and inlined in kernels.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/policy.hpp"

#if defined(__CUDACC__)
#define KV_HD __host__ __device__
#else
#define KV_HD
#endif

namespace kv {

/// Scores above every other: such slots stay whatever the rest. When more are protected than fit, the lowest sinks stay
/// (all but one slot of the budget), then the newest protected slots.
inline constexpr float sink = INFINITY;
inline constexpr float protect = 3.402823466e38f;

/// Per query head of the group: the sum over query rows of weigh(probability), by default attention mass.
class Observed {
 public:
  KV_HD Observed(const float* sums, int rows, int group) : sums_(sums), rows_(rows), group_(group) {}
  KV_HD float operator[](int g) const { return sums_[g]; }
  KV_HD int group() const { return group_; }
  KV_HD int rows() const { return rows_; }  // how many query rows were summed
  KV_HD float mean() const {
    float sum = 0;
    for (int g = 0; g < group_; ++g) sum += sums_[g];
    return sum / static_cast<float>(group_);
  }
  KV_HD float max() const {
    float best = sums_[0];
    for (int g = 1; g < group_; ++g) best = sums_[g] > best ? sums_[g] : best;
    return best;
  }

 private:
  const float* sums_;
  int rows_, group_;
};

/// One slot, in a slot hook: its own data only, so hooks cannot race.
template <class State>
struct SlotView {
  State& state;  // the policy's Slot
  const HeadInfo& head;
  int token;                                                  // index in the sequence (never a RoPE position)
  int now;                                                    // token index of the newest slot
  int multiplicity;                                           // tokens it stands for
  float probe;                                                // key . head.vector(), with the trait key_probe
  KV_HD int age() const { return now - token; }               // 0 = just appended
  KV_HD bool recent(int n) const { return now - token < n; }  // among the newest n
  KV_HD int budget() const { return head.budget; }
};

/// One key or value as a row hook sees it: opaque, read through RowTeam.
struct Row {
  const float* data;
  int dim;
};

/// Who works on a row: a loop on the CPU, a warp on CUDA. All members must call together.
struct RowTeam {
  /// Sum of a[c] * b[c]: 8 channels in order, then a tree over the chunks; the same order on both engines.
  KV_HD float dot(Row a, Row b) const {
    float chunk[max_chunks] = {};
    const int chunks = (a.dim + 7) / 8;
    for (int c = 0; c < a.dim; ++c) chunk[(c / 8) % max_chunks] += a.data[c] * b.data[c];
    for (int n = chunks < max_chunks ? chunks : max_chunks; n > 1; n = (n + 1) / 2)
      for (int i = 0; i < n / 2; ++i) chunk[i] += chunk[i + (n + 1) / 2];
    return chunk[0];
  }
  /// vector += weight * row
  KV_HD void add(float* vector, float weight, Row row) const {
    for (int c = 0; c < row.dim; ++c) vector[c] += weight * row.data[c];
  }

 private:
  static constexpr int max_chunks = 32;
};

/// Who works on a head: a loop on the CPU, a thread block on CUDA. An index always meets the same member, so passes
/// over one's own slots need no sync(); reading another's does.
struct HostTeam {
  template <class F>
  KV_HD void for_each(int n, F f) const {
    for (int i = 0; i < n; ++i) f(i);
  }
  /// Sum of f(i): 256 strided partial sums, then a tree; the same order on both engines.
  template <class F>
  KV_HD float sum(int n, F f) const {
    float partial[256] = {};
    for (int i = 0; i < n; ++i) partial[i % 256] += f(i);
    for (int half = 128; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) partial[i] += partial[i + half];
    return partial[0];
  }
  KV_HD void sync() const {}
};

/// One KV head: its slots 0 .. size()-1 in no particular order, linked in token order.
template <class State, class HeadState>
struct HeadView {
  const HeadInfo* info_;
  Moment moment_;
  int size_;
  const float *keys_, *values_;
  const int *token_, *multiplicity_, *order_, *rank_;
  State* state_;
  HeadState* head_state_;
  float *vector_, *probe_, *score_;
  Observation seen_;
  const std::uint8_t* kept_;

  KV_HD const HeadInfo& info() const { return *info_; }
  KV_HD int size() const { return size_; }
  KV_HD int budget() const { return info_->budget; }
  KV_HD int now() const { return moment_.now; }  // token index of the newest slot
  KV_HD Phase phase() const { return moment_.phase; }
  KV_HD int compressions() const { return moment_.compressions; }  // finished so far
  KV_HD int token(int s) const { return token_[s]; }
  KV_HD int age(int s) const { return moment_.now - token_[s]; }
  KV_HD int multiplicity(int s) const { return multiplicity_[s]; }
  /// The slot `k` places to the right of s in token order (left when negative), or -1 beyond the ends.
  KV_HD int neighbour(int s, int k) const {
    const int place = rank_[s] + k;
    return place >= 0 && place < size_ ? order_[place] : -1;
  }
  KV_HD int next(int s) const { return neighbour(s, 1); }
  KV_HD State& state(int s) const { return state_[s]; }
  KV_HD HeadState& shared() const { return *head_state_; }
  KV_HD Row key(int s) const {
    return {keys_ + static_cast<long>(s) * info_->key_dim, info_->key_dim};
  }  // rotated under positions `absolute`
  KV_HD Row value(int s) const { return {values_ + static_cast<long>(s) * info_->value_dim, info_->value_dim}; }
  KV_HD float* vector() const { return vector_; }       // the policy's own float[key_dim], with the trait key_probe
  KV_HD float probe(int s) const { return probe_[s]; }  // key(s) . vector() at this compression
  KV_HD Observed seen(int s) const {
    return {seen_.sums + static_cast<long>(s) * seen_.group, seen_.rows, seen_.group};
  }
  KV_HD float& score(int s) const { return score_[s]; }   // on_compress writes it
  KV_HD bool kept(int s) const { return kept_[s] != 0; }  // after selection
};

}  // namespace kv
