// Tokens that come alone, one after the other in one launch: append, attend, measure, observe, score, and let one go.
//
// A step at a full cache has two barriers. Before the first, some warps stream the cache, the others book the new token and look
// at it. Then every thread knows the row's log-sum-exps, observes and scores its own slots. After the second barrier everyone
// knows who goes; the newest row takes that place in memory, and in the tile that a warp holds for the next step. The
// warps that stream go on with that one at once; the others measure, fetch inputs for the step after it and book who went. Where
// hooks want more than slots, all go together, and measure and fetch under the next step's stream. What needs more - biases,
// probes, rotations, merges of keys - adds barriers.
#pragma once
#include "kernels/step_records.cuh"
#include "kernels/step_row.cuh"

namespace kv {

/// One unit through the tokens of a launch; `width` and `tile` as StepRow's.
template <class P, int width, int tile>
class Steps : StepRow<P, width, tile> {
 public:
  using StepRow<P, width, tile>::size;
  using StepRow<P, width, tile>::StepRow;

  /// Tokens [first, last) one by one.
  __device__ void run() {
    begin();
    for (int token = args_.first; token < args_.last; token = p_.now + 1) {
      begin_step(token);
      ++p_.size;
      take(token, token + 1 < args_.last || args_.last_compresses);
    }
    end();
    know_places();
    if (p_.is_clerk()) p_.progress.attended = p_.size;
  }

 private:
  using Row = StepRow<P, width, tile>;
  using Played = Player<P, (width > 0)>;
  using Row::absolute, Row::args_, Row::asks_for_mass, Row::attend_again, Row::await_gap, Row::begin, Row::begin_step,
      Row::bias_, Row::bias_moved_, Row::gap_open_, Row::end, Row::fetch_ahead, Row::first_server, Row::future_mass,
      Row::has_row_hooks, Row::inputs, Row::links, Row::look_around, Row::look_back, Row::looks_for_probe, Row::mass,
      Row::may_part, Row::parts, Row::measure_row, Row::merges, Row::measured_, Row::measured_token_, Row::own_look_,
      Row::p_, Row::pass, Row::prepare, Row::prepares_, Row::probes, Row::row_of_, Row::serve, Row::settle_measure,
      Row::start_clock, Row::stop_clock, Row::stream_tile, Row::streams_now, Row::vector_moved, Row::vector_moves,
      Row::watches;

  __device__ void take(int token, bool compresses) {
    const int m = p_.fixed.coming[static_cast<unsigned>(token) % 4].measured;  // attended, if timed, and no more
    const bool looked_for_probe = looks_for_probe(), moved = vector_moved();
    __syncwarp();  // or the compiler puts these reads off, and waits for one after the other
    const bool observes = detail::declares_on_attention<P> && p_.traits().observes && watches();
    const bool due = p_.due(token, args_.trace, args_.settings), attends = m >= 0 || observes;
    const bool looks_otherwise = p_.traits().key_probe && probes(due) != looked_for_probe;
    const bool looks = !own_look_ || !absolute() || future_mass() || (attends && looks_otherwise);
    const bool prepares = prepares_ || looks || !attends || moved;
    row_of_ = -1, p_.probe_known = false;
    bias_moved_ = detail::declares_log_bias<P> && observes;  // on_attention may change what biases say
    start_clock();
    if (prepares) {
      if constexpr (Row::folds_late) this->land_at_once(token);
      if (future_mass()) settle_measure();
      if (p_.is_clerk_warp()) await_gap();
      gap_open_ = false;
      Ring ring = p_.ring;
      prepare(args_, p_.fixed, p_.policy, p_.size, token, attends, due, looks, width > 0 ? nullptr : &ring);
      if constexpr (width == 0) p_.ring = ring;
      own_look_ = own_look_ || attends;
      if (!attends) vector_moves();
      bias_ = detail::declares_log_bias<P> ? p_.unit.bias : nullptr;
      stop_clock(TimedPhase::append);
    }
    if (attends) {
      p_.probe_known = probes(due);
      pass(token, !prepares);
      token = p_.now;
      // Where warps part, those that stream have nothing to do with it.
      measured_ = args_.timed || (may_part && streams_now()) ? -1 : m, measured_token_ = token;
    }
    const bool masses = m >= 0 && asks_for_mass(), falls_due = due && compresses;
    const bool ranks = attends && falls_due && !masses && evicts_one();
    const bool ranked = same_in_warp(ranks && (!may_part || (together() ? !p_.traits().window_past : parts())));
    if (may_part && !together()) {
      if (ranked && decide(token, observes)) return;
    } else if (ranked) {
      stop_clock(TimedPhase::attend);
      if (!streams_now()) await_copies<0>();  // the next step's inputs; a barrier follows
      const int victim = observe_and_rank(token, observes);
      stop_clock(TimedPhase::score);
      if (victim >= 0) drop(token, victim);
      if (may_part && !streams_now()) look_back(token);
      if (victim >= 0) {
        stop_clock(TimedPhase::compact);
        return;
      }
    }
    Steps copy = *this;
    go_on(copy, token, {m, attends, observes, masses, ranks, ranked, falls_due});
    follow(copy);
  }

  /// The end of such a step. Once all threads know who goes, warps that stream go on with the next one's tiles; the others measure,
  /// fetch inputs and keep the books. Returns whether a slot went.
  __device__ __forceinline__ bool decide(int token, bool observes) {
    const int victim = rank_slots<true>(token, observes);
    begin_step(same_in_warp(p_.now)), token = p_.now;  // as after a row
    gone_ = gone_ || victim >= 0;
    if (streams_now()) {
      if (victim >= 0) this->take_place(victim, token);
      return victim >= 0;
    }
    if constexpr (Row::folds_late)
      if (merges() && victim >= 0) this->join(victim);
    if constexpr (!has_row_hooks) look_back(token);
    if (victim >= 0) take_out(victim);
    if constexpr (has_row_hooks) look_back(token);
    if (victim >= 0) --p_.size;
    return victim >= 0;
  }
  /// What the warps that do not stream do for a slot that goes. Hooks of rows go first: the clerk has no part in closing the gap,
  /// and awaits that it is closed when he comes to the next token's books.
  __device__ __forceinline__ void take_out(int victim) {
    constexpr int first = 32 * first_server;
    if (has_row_hooks && p_.is_clerk_warp()) {
      if constexpr (detail::declares_on_evict<P>) this->evict_hook(victim);
      p_.row.stream.gates.arrive(Gate::serving);
    } else if (Row::folds_late && merges()) {
      if (p_.warp == Row::gap_closer) this->leave_order(victim);
      if (p_.is_clerk_warp()) p_.row.stream.gates.pass(Gate::planned);
    } else if (!placeless()) {
      const int thread = static_cast<int>(threadIdx.x) - first, gap = p_.unit.rank[victim];
      p_.row.stream.gates.pass(Gate::serving);
      p_.close_gap(victim, gap, thread, team_threads - first);
      if constexpr (has_row_hooks)
        p_.row.stream.gates.arrive(Gate::gap_closed);
      else
        p_.row.stream.gates.pass(Gate::serving);
    }
    if (p_.is_clerk()) {
      const bool folds = Row::folds_late && merges() && p_.fixed.plan.target >= 0;
      if (folds)
        book_fold(p_, p_.fixed.plan, victim);
      else
        ++p_.progress.evictions;
      ++p_.progress.compressions, p_.book_removal(victim, folds);
    }
    gap_open_ = has_row_hooks;
  }
  /// What a step has come to that does not end as most do, with one slot evicted by its score.
  struct Course {
    int m;
    bool attends, observes, masses, ranks, ranked, compresses;  // ranked: without finding one that may go
  };
  /// The rest of such a step. Works on a copy, so that what the others hold can stay in registers, and is out of their way.
  static __device__ __noinline__ void go_on(Steps& s, int token, Course course) {
    s.end_otherwise(token, course);
    if constexpr (Row::folds_late) s.none_is_late();
    if (may_part && !s.streams_now()) s.fetch_ahead(token);  // again: other rows' queries may have taken their place
  }
  __device__ void end_otherwise(int token, const Course& course) {
    if (!course.attends) pass_by(token);
    if constexpr (may_part)
      if (course.attends && !course.ranked && !streams_now()) look_back(token);
    if (!course.ranked) stop_clock(TimedPhase::attend);
    if (course.masses) {
      settle_measure();
      mass(course.m, token, bias_);
      row_of_ = -1, own_look_ = false;
      if (course.observes) attend_again(token, 0x7fffffff);
    }
    if (!streams_now()) await_copies<0>();
    if (course.ranks && !course.ranked) {
      const int victim = observe_and_rank(token, course.observes);
      stop_clock(TimedPhase::score);
      if (victim >= 0) {
        drop(token, victim);
        stop_clock(TimedPhase::compact);
        __syncthreads();
        return;
      }
    } else if (!course.ranked) {
      if (course.observes) p_.observe_row();
      __syncthreads();
      stop_clock(TimedPhase::observe);
    }
    if (course.compresses) return compress_rounds(token);
    const int newest = p_.size - 1, of = stream_tile();
    if (p_.streams_slot(newest, of)) p_.patch(newest, inputs().key(token), inputs().value(token), of);
  }

  /// A step in which nobody attends.
  __device__ void pass_by(int token) {
    if (!streams_now()) {
      if constexpr (width > 0) measure_row();
      serve(token);
    } else if (copies_boxes) {
      written_to_device();  // rows that changed, before another takes their place in `changed`
    }
    measured_ = -1;
  }

  static __device__ __noinline__ void attend_again_apart(Steps& s, int token, int newest_key) {
    s.attend_again(token, newest_key);
  }

  /// Rounds of scoring, choosing and folding of as many slots as there are too many.
  __device__ void compress_rounds(int token) {
    know_places();
    for (bool more = true; more;) {
      start_clock();
      const int rows = look_window(token), buffer = meetings_ & 1;
      stop_clock(TimedPhase::observe);
      look_around();
      p_.score(rows);
      stop_clock(TimedPhase::score);
      classify(p_.fixed, p_.size, p_.now, links(), buffer);
      if (together()) meet();
      p_.compress(buffer, rows);
      stop_clock(TimedPhase::compact);
      more = p_.over_budget();
      row_of_ = -1, p_.probe_known = false;  // slots have moved
      vector_moves();
    }
    if (p_.is_clerk()) ++p_.progress.compressions;
    if constexpr (copies_boxes) written_to_device();
    __syncthreads();
  }

  /// Whether the heads of a layer decide as one: the compiler knows of policies and kernels where they never do.
  __device__ bool together() const {
    return !decides_alone(width, tile) && p_.traits().scope == Scope::layer && args_.together;
  }

  /// The victim joins its target or is counted, and goes. Needs a barrier before, one must follow.
  __device__ void drop(int token, int victim) {
    vector_moves();
    const int last = p_.size - 1;
    const void *key = inputs().key(token), *value = inputs().value(token);
    gone_ = true;
    const int gap = placeless() ? -1 : p_.unit.rank[victim];
    constexpr bool leaves = leaves_in_fold<P>;
    bool newest_folded = false, adopted = false, closed = false;
    if (merges()) {
      if (p_.is_clerk()) p_.unit.stays[victim] = 0, p_.unit.target[victim] = -1;
      if (p_.traits().nearest != Nearest::none)
        Played::find_nearest_apart(p_.fixed, p_.policy, p_.size, p_.now, p_.phase, p_.block, victim);
      const int target = p_.fold_apart(victim, leaves ? gap : -1);
      newest_folded = target == last || target == many_targets, adopted = target != -1, closed = leaves && target >= 0;
    } else {
      if (p_.is_clerk()) ++p_.progress.evictions;
      if (gap >= 0 && !detail::declares_on_evict<P>) __syncthreads();
    }
    if (newest_folded)
      key = p_.at(p_.unit.keys, last, p_.trace.key_dim), value = p_.at(p_.unit.values, last, p_.trace.value_dim);
    if (leaves && merges())
      p_.take_place(victim, key, value, stream_tile());
    else
      p_.let_go(victim, gap, key, value, stream_tile(), adopted);
    if (p_.is_clerk()) ++p_.progress.compressions;
    if (copies_boxes && merges() && !closed) written_to_device();  // rows that the fold wrote
    if (newest_folded || (!closed && (gap >= 0 || detail::declares_log_bias<P>)))
      __syncthreads();  // the clerk's next row and place go where the newest ones were read, and biases read his books
  }

  /// Whether this compression lets exactly one slot go by its score alone: then nothing has to be sorted.
  __device__ bool evicts_one() const {
    if constexpr (detail::declares_on_selected<P>) return false;
    const Traits traits = p_.traits();
    const int window =
        detail::declares_on_compress<P> || merges() ? 0 : 1;  // whose statistics are at hand for its hooks
    return p_.size == p_.budget + 1 && traits.select == Select::slots && traits.needs_budget() &&
           traits.future_queries.horizon == 0 && !traits.future_mass &&
           (traits.observation_window <= window || window_is_closed());
  }
  __device__ bool window_is_closed() const {
    return p_.traits().window_once && p_.phase == Phase::decode && p_.progress.compressions > 0;
  }

  /// One pass over the slots: on_attention, the window's statistic where the window is this row, score (or on_compress, a pass
  /// before). Returns the slot that must go, the lowest score, of equals the newest; -1 when all are safe. Gives a barrier.
  __device__ int observe_and_rank(int token, bool observes) {
    const bool window = p_.traits().observation_window == 1 && !window_is_closed();
    if (window && (row_of_ != token || bias_moved_ || p_.traits().window_past)) {
      if (observes) p_.observe_row();
      observes = false;
      __syncthreads();
      Steps copy = *this;
      attend_again_apart(copy, token, p_.traits().window_past ? token - 1 : 0x7fffffff);
      follow(copy);
    }
    return rank_slots<false>(token, observes);
  }
  /// The same where the row has been looked at. `parted`: parts() holds.
  template <bool parted>
  __device__ __forceinline__ int rank_slots(int token, bool observes) {
    const bool meets = !parted && together();
    const bool window = p_.traits().observation_window == 1 && !window_is_closed();
    p_.know_probe();
    auto head = p_.head();
    const SlotLoop<P> slots(p_.fixed, p_.now);
    const P policy = p_.policy;
    const bool in_one_loop = parted || slots.info.group <= loop_heads;
    const bool at_once = observes && in_one_loop;  // observed in the pass that scores
    const int buffer = meetings_ & 1;
    unsigned long long mine = ~0ull;
    int slot = -1;
    int not_a_number = -1;                                                    // a slot whose score is none
    const auto rank = [&](int s, float score, int slot_token, bool may_go) {  // without branches, as safety_of()
      const unsigned long long key =
          static_cast<unsigned long long>(Cut::key_of(score)) << 31 | static_cast<unsigned>(0x7fffffff - slot_token);
      const bool is_less = may_go & (key < mine);
      mine = is_less ? key : mine, slot = is_less ? s : slot;
    };
    const auto look_at = [&](int s, int slot_token, const auto& seen) {
      const float given =
          detail::declares_on_compress<P> ? p_.unit.score[s] : slots.score(policy, head, s, slot_token, seen);
      const float score = isnan(given) ? 0.f : given;
      not_a_number = isnan(given) ? s : not_a_number;
      const bool may_go = safety_of(slots.protect, slots.now, score, slot_token) == safety_normal;
      if (meets)
        p_.unit.score_at[buffer][s] = may_go ? score : NAN;
      else
        rank(s, score, slot_token, may_go);
    };
    const auto look_at_slot = [&](int s, int slot_token) { look_at(s, slot_token, p_.seen_in_window(head, s)); };
    constexpr bool compares = detail::declares_score_in<P> || detail::declares_on_compress<P>;
    const bool before = observes && (window || compares || !at_once);
    if (before) p_.observe_row();
    if (detail::declares_on_compress<P>) Played::forget_scores(p_.fixed, p_.size);
    if (detail::declares_on_compress<P> || before) __syncthreads();
    observes = observes && !before;
    if constexpr (detail::declares_on_compress<P>) p_.score(1, true);
    const bool seen_at_once = window && !compares && in_one_loop;  // in the pass that scores
    if (window && !seen_at_once) {
      p_.weigh_row_in_place();
      head.sight_.seen = {p_.fixed.logits, 1, p_.trace.group, p_.fixed.logit_stride};
      row_of_ = -1;
      __syncthreads();  // score_in may read what its neighbours saw
    }
    if (seen_at_once)
      slots.each_seen(p_.size, look_at);
    else if (observes)
      slots.observe(policy, p_.size, look_at_slot);
    else
      slots.each(p_.size, look_at_slot);
    if (not_a_number >= 0) [[unlikely]]
      report_nan(p_.fixed, not_a_number, slots.token[not_a_number]);
    if (meets) {  // heads that keep the same tokens keep them in the same slots
      meet();
      each_sum_over_heads(p_.fixed, buffer, p_.size, [&](int s, float score) { rank(s, score, slots.token[s], true); });
    }
    if constexpr (parted && detail::declares_on_evict<P>) return this->least_with_rows(mine, slot);
    if constexpr (parted && Row::folds_late)
      if (merges()) return this->least_with_value(mine, slot);
    return p_.team.least(mine, slot, p_.now & 1).slot;
  }

  /// Whether slots that go leave order and rank behind.
  __device__ bool placeless() const { return goes_without_places<P>(p_.traits(), args_.settings); }
  __device__ void know_places() {
    if (gone_ && placeless()) Play::find_order(p_.fixed, p_.size, p_.now);
    gone_ = false;
  }

  /// The observation window's sums, if the policy has one that is still open. Returns its rows.
  __device__ int look_window(int token) {
    const int window = p_.traits().observation_window;
    if (window == 0 || window_is_closed()) return 1;
    const int rows = min(window, token + 1), first = token + 1 - rows;
    const int newest_key = p_.traits().window_past ? first - 1 : 0x7fffffff;
    for (int r = 0; r < rows; ++r) {
      if (row_of_ != first + r || bias_moved_ || p_.traits().window_past) attend_again(first + r, newest_key);
      p_.sum_row(true, rows - 1 - r, r == 0);
      __syncthreads();
    }
    return rows;
  }

  /// All heads of the layer have come this far. Blocks of a layer are resident together: the launch is cooperative.
  __device__ void meet() {
    __syncthreads();
    ++meetings_;
    if (threadIdx.x == 0) {
      int* arrivals = args_.meeting + p_.unit.first_head;
      add_release(arrivals, 1);
      while (load_acquire(arrivals) < meetings_ * p_.unit.layer_heads) wait_a_moment();
    }
    __syncthreads();
  }

  /// What a copy that went on in this one's place left behind.
  __device__ void follow(const Steps& copy) {
    Row::follow(copy);
    meetings_ = copy.meetings_, gone_ = copy.gone_;
  }

  int meetings_ = 0;   // whose scores lie in one buffer and the other in turn
  bool gone_ = false;  // slots have, since order and rank were known
};

}  // namespace kv
