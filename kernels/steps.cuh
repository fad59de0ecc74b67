// Tokens that come alone, one after the other in one launch: append, attend, measure, observe, score, and let one go.
#pragma once
#include "kernels/stages.cuh"

namespace kv {

/// One unit through the tokens of a launch.
template <class P>
class Steps : Stages<P> {
 public:
  __device__ Steps(const Launch& launch, Player<P>& player) : Stages<P>(launch, player) {}

  /// Tokens [first, last) one by one.
  __device__ void run() {
    for (int token = args_.first; token < args_.last; ++token) {
      const int step = args_.block + token - args_.first;
      p_.now = token, p_.block_first = token, p_.block = step;
      p_.phase = token < p_.trace.prompt_tokens ? Phase::prompt : Phase::decode;
      const bool compresses = (token + 1 < args_.last || args_.last_compresses);
      take(token, step, compresses);
    }
    await_copies<0>();
    know_places();
    if (threadIdx.x == 0) p_.progress.attended = p_.size;
  }

 private:
  using Stages<P>::args_;
  using Stages<P>::p_;
  using Stages<P>::add_statistics;
  using Stages<P>::after_append;
  using Stages<P>::links;
  using Stages<P>::look_around;
  using Stages<P>::mass;
  using Stages<P>::watches;

  __device__ void take(int token, int step, bool compresses) {
    start_clock();
    if (token + 1 < args_.last) p_.expect(token + 1);
    p_.append(token, token + 1);
    after_append(step);
    stop_clock(step, TimedPhase::append);
    if (watches()) add_statistics(token, token + 1);
    const int m = p_.settings.measured_of_token[token];  // attended, if timed, and no more
    const bool observes = detail::declares_on_attention<P> && p_.traits().observes && watches();
    const bool due = p_.due(token);
    row_of_ = -1, p_.probe_known = false;
    bias_moved_ = detail::declares_log_bias<P> && observes;  // on_attention may change what biases say
    if (m >= 0 || observes) {
      attend<true>(token, 0x7fffffff, due, m >= 0 && p_.settings.mass);
      stop_clock(step, TimedPhase::attend);
      if (m >= 0 && !args_.timed) measure_row(p_, m, token);
      if (m >= 0 && p_.settings.mass) {
        mass(m, token, bias_);
        row_of_ = -1;
        if (observes) attend(token, 0x7fffffff, due, false);
      }
      start_clock();
    }
    if (due && compresses) {
      compress_step(token, step, observes);
    } else if (observes) {
      p_.observe_row();
      __syncthreads();
      stop_clock(step, TimedPhase::observe);
    }
  }

  /// Attends one token's queries over the cache. With `scores`, the policy's key probe goes along.
  template <bool here = false>
  __device__ __forceinline__ void attend(int token, int newest_key, bool scores, bool again) {
    bias_ = p_.biases(p_.size);
    // Only where the keys that are attended are those that hooks see.
    const bool probes = p_.traits().key_probe && scores && p_.absolute();
    p_.look_at(token, bias_, newest_key, probes ? p_.unit.probe : nullptr);
    p_.probe_known = p_.probe_known || probes;
    if constexpr (here)
      p_.template attend<true>(!again, probes);
    else
      p_.attend_apart(!again);
    row_of_ = newest_key < p_.now ? -1 : token;
  }

  __device__ void compress_step(int token, int step, bool observes) {
    if (evicts_one()) {
      const int victim = observe_and_rank(token, observes);
      stop_clock(step, TimedPhase::score);
      if (victim >= 0) {
        fold_or_count(victim);
        placeless_ = placeless_ || goes_without_places();
        p_.drop_one(victim, !placeless_);
        if (threadIdx.x == 0) ++p_.progress.compressions;
        stop_clock(step, TimedPhase::compact);
        return;
      }
    } else if (observes) {
      p_.observe_row();
      __syncthreads();
      stop_clock(step, TimedPhase::observe);
    }
    know_places();
    for (bool more = true; more;) {
      start_clock();
      const int rows = look_window(token);
      stop_clock(step, TimedPhase::observe);
      look_around();
      Player<P>::score(p_, rows);
      stop_clock(step, TimedPhase::score);
      classify(p_.fixed, p_.size, p_.now, links(), buffer_);
      if (args_.together) meet();
      p_.compress(buffer_, rows);
      if (args_.together) buffer_ ^= 1;
      stop_clock(step, TimedPhase::compact);
      more = p_.over_budget();
      row_of_ = -1, p_.probe_known = false;  // slots have moved
    }
    if (threadIdx.x == 0) ++p_.progress.compressions;
    __syncthreads();
  }

  __device__ bool merges() const { return detail::declares_on_merge<P> && p_.traits().merges; }

  /// What becomes of a victim that is known: it joins its target, or is counted.
  __device__ void fold_or_count(int victim) {
    if (!merges()) {
      if (threadIdx.x == 0) ++p_.progress.evictions;
      return;
    }
    if constexpr (detail::declares_on_merge<P>) {
      if (threadIdx.x == 0) p_.unit.stays[victim] = 0, p_.unit.target[victim] = -1;
      __syncthreads();
      Player<P> copy = p_;
      Player<P>::fold_victim(copy, victim);
      p_.follow(copy);
    }
  }

  /// Whether this compression lets exactly one slot go by its score alone: then nothing has to be sorted.
  __device__ bool evicts_one() const {
    if constexpr (detail::declares_on_selected<P> || detail::declares_on_compress<P>) return false;
    const Traits traits = p_.traits();
    return p_.size == p_.budget + 1 && traits.select == Select::slots && traits.needs_budget() &&
           traits.nearest == Nearest::none && traits.future_queries.horizon == 0 && !traits.future_mass &&
           (traits.observation_window <= 1 || window_is_closed());
  }
  __device__ bool window_is_closed() const {
    return p_.traits().window_once && p_.phase == Phase::decode && p_.progress.compressions > 0;
  }

  /// One pass over the slots: on_attention, the window's statistic where the window is this row, score. Returns the slot
  /// that must go, the lowest score, of equals the newest; -1 when all are safe.
  __device__ int observe_and_rank(int token, bool observes) {
    const bool window = p_.traits().observation_window == 1 && !window_is_closed();
    if (window && (row_of_ != token || bias_moved_ || p_.traits().window_past)) {
      if (observes) {
        p_.observe_row();
        __syncthreads();
        observes = false;
      }
      attend(token, p_.traits().window_past ? token - 1 : 0x7fffffff, false, true);
    }
    p_.know_probe();
    auto head = p_.head();
    const SlotLoop<P> slots(p_.fixed, p_.now);
    const P policy = p_.policy;
    const bool together = observes && slots.info.group <= stream_heads;  // observed in the pass that scores
    unsigned long long mine = ~0ull;
    int slot = -1;
    const auto rank = [&](int s, float score, std::uint8_t safety, int slot_token) {
      if (safety != safety_normal) return;
      const unsigned long long key =
          static_cast<unsigned long long>(Cut::key_of(score)) << 31 | static_cast<unsigned>(0x7fffffff - slot_token);
      if (key < mine) mine = key, slot = s;
    };
    const auto look_at_slot = [&](int s) {
      const int slot_token = slots.token[s];
      const float score = checked_score(p_.fixed, score_of(policy, slots, head, s), s, slot_token);
      const std::uint8_t safety = safety_of(slots.protect, slots.now, score, slot_token);
      if (args_.together)
        p_.unit.score_at[buffer_][s] = safety == safety_normal ? score : 0, p_.unit.safety_at[buffer_][s] = safety;
      else
        rank(s, score, safety, slot_token);
    };
    if (window) p_.sum_row(true, 0, true);
    if (detail::declares_score_in<P> || !together) {  // score_in may read what its neighbours saw
      if (observes) p_.observe_row();
      __syncthreads();
      p_.team.for_each(p_.size, look_at_slot);
    } else {
      p_.team.for_each(p_.size, [&](int s) {
        slots.observe(policy, s);
        look_at_slot(s);
      });
    }
    if (args_.together) {  // heads that keep the same tokens keep them in the same slots
      meet();
      p_.team.for_each(p_.size, [&](int s) {
        std::uint8_t safety = 0;
        const float score = sum_over_heads(p_.fixed, buffer_, s, safety);
        rank(s, score, safety, slots.token[s]);
      });
      buffer_ ^= 1;
    }
    const unsigned long long least = p_.team.min_key(mine);
    if (least == ~0ull) return -1;
    if (mine == least) p_.team.memory->number = slot;
    __syncthreads();
    return p_.team.memory->number;
  }

  template <class Head>
  __device__ static float score_of(const P& policy, const SlotLoop<P>& slots, Head& head, int s) {
    if constexpr (detail::declares_score<P>)
      return policy.score(slots.view(s, policy.traits().key_probe ? slots.probe[s] : 0.f));
    else if constexpr (detail::declares_score_in<P>)
      return policy.score_in(head, s);
    else
      return 0;
  }

  /// Whether nothing in these steps asks for places: then they are made again at the end.
  __device__ bool goes_without_places() const {
    return detail::declares_score<P> && !detail::declares_on_append<P> && !detail::declares_on_evict<P> &&
           p_.absolute() && !p_.settings.mass && !p_.traits().future_mass && !merges();
  }
  __device__ void know_places() {
    if (placeless_) Play::find_order(p_.fixed, p_.size, p_.now);
    placeless_ = false;
  }

  /// The observation window's sums, if the policy has one that is still open. Returns its rows.
  __device__ int look_window(int token) {
    const int window = p_.traits().observation_window;
    if (window == 0 || window_is_closed()) return 1;
    const int rows = min(window, token + 1), first = token + 1 - rows;
    const int newest_key = p_.traits().window_past ? first - 1 : 0x7fffffff;
    for (int r = 0; r < rows; ++r) {
      if (row_of_ != first + r || bias_moved_ || p_.traits().window_past)
        attend(first + r, newest_key, false, r + 1 < rows);
      p_.sum_row(true, rows - 1 - r, r == 0);
      __syncthreads();
    }
    return rows;
  }

  /// All heads of the layer have come this far. Blocks of a layer are resident together: the launch is cooperative.
  __device__ void meet() {
    __syncthreads();
    if (threadIdx.x == 0) {
      int* arrivals = args_.meeting + p_.unit.first_head;
      __threadfence();
      atomicAdd(arrivals, 1);
      ++meetings_;
      while (static_cast<volatile int*>(arrivals)[0] < meetings_ * p_.unit.layer_heads) __nanosleep(32);
      __threadfence();
    }
    __syncthreads();
  }

  __device__ void start_clock() {
    if (args_.timed && threadIdx.x == 0) p_.fixed.clock = clock64();
  }
  __device__ void stop_clock(int step, TimedPhase phase) {
    if (!args_.timed) return;
    __syncthreads();
    if (threadIdx.x != 0) return;
    const long long now = clock64();
    p_.unit.clocks[step * timed_phases + static_cast<int>(phase)] += static_cast<unsigned>(now - p_.fixed.clock);
    p_.fixed.clock = now;
  }

  const float* bias_ = nullptr;
  int row_of_ = -1;  // token whose row the logits are of
  bool bias_moved_ = false;
  int buffer_ = 0, meetings_ = 0;
  bool placeless_ = false;  // order and rank were left behind
};

}  // namespace kv
