// The one kernel of a policy: a thread block plays a unit. Prompt blocks are played in stages, between which grid-wide
// kernels attend (kernels/block_attention.hpp); tokens that come alone are played through in one launch.
#pragma once
#include "kernels/lookout.cuh"
#include "kernels/player.cuh"

namespace kv {

/// Plays one unit at one stage or through steps.
template <class P>
class Stager {
 public:
  __device__ Stager(const Launch& launch, Player<P>& player) : args_(launch), p_(player) {}

  __device__ void run() {
    switch (args_.stage) {
      case Stage::begin:
        return begin();
      case Stage::place:
        p_.append_rows(args_.first, args_.last, p_.size);
        if (threadIdx.x == 0) p_.progress.attended = p_.size + args_.last - args_.first;
        return;
      case Stage::look:
        return look();
      case Stage::probe:
        return probe();
      case Stage::append:
        return append();
      case Stage::measure:
        return measure_block();
      case Stage::observe:
        return p_.observe_block(args_.row_count);
      case Stage::score:
        return score_block();
      case Stage::compress:
        return compress();
      case Stage::count:
        if (threadIdx.x == 0 && p_.progress.compressing) ++p_.progress.compressions;
        return;
      case Stage::future:
        return begin_future();
      case Stage::steps:
        return steps();
      case Stage::finish:
        return finish();
    }
  }

 private:
  __device__ bool links() const { return p_.traits().select == Select::links; }

  __device__ void begin() {
    p_.begin();
    p_.size = 0;
    __syncthreads();
    if (threadIdx.x != 0) return;
    p_.progress = Progress{};
    p_.progress.lost = !p_.absolute();
  }

  /// Bias and rotation are brought up to date, then what the rows look at is written down for the attention kernels.
  __device__ void look() {
    AttentionTask task;
    const bool idle = args_.window && !p_.due(args_.first);
    const int slots = args_.probing ? p_.progress.attended : p_.size;
    if (!idle) {
      task.bias = p_.biases(slots);
      if (!p_.absolute()) {
        p_.rotate_keys(slots);
        p_.rotate_queries(args_.rows, args_.row_count, slots);
      }
      p_.team.for_each(args_.row_count, [&](int r) {
        p_.unit.query_row[r] = p_.absolute() ? p_.layer.row_of_token[args_.rows[r]] : r;
      });
    }
    if (threadIdx.x != 0) return;
    const Unit& unit = p_.unit;
    const TraceData& trace = p_.trace;
    task.keys = p_.attended_keys(), task.values = unit.values, task.token = unit.token;
    task.sink_logit = p_.layer.sink_logit ? p_.layer.sink_logit + p_.query_head(0) : nullptr;
    const long first = static_cast<long>(p_.query_head(0)) * p_.layer.query_rows;
    task.queries = p_.absolute() ? p_.at(p_.layer.q_rotated, first, trace.key_dim) : static_cast<const char*>(unit.queries);
    task.query_stride = p_.absolute() ? p_.layer.query_rows : args_.row_count;
    task.query_row = unit.query_row, task.query_token = args_.rows;
    task.output = args_.outputs ? unit.block_output : nullptr, task.lse = unit.block_lse;
    task.sums = args_.sums ? unit.sums : nullptr;
    task.rows = idle ? 0 : args_.row_count, task.slots = slots;
    // Slots older than every row come first, in any order. A window's queries may be among them: then every slot is looked
    // at one by one.
    const bool among = args_.window && args_.row_count > args_.last - args_.first;
    task.older = among ? slots : slots - (args_.last - args_.first);
    task.window = p_.layer.window, task.newest_key = among ? min(args_.newest_key, 0x7ffffffe) : args_.newest_key;
    args_.tasks[blockIdx.x] = task;
  }

  __device__ void probe() {
    if constexpr (detail::declares_on_probe<P>) {
      auto head = p_.head(args_.row_count);
      p_.policy.on_probe(p_.team, head);
    }
  }

  __device__ void append() {
    p_.append(args_.first, args_.last);
    after_append(args_.block);
    if (threadIdx.x == 0) p_.progress.attended = p_.size;
    if (watches()) add_statistics(args_.first, args_.last);
  }
  __device__ void after_append(int step) const {
    if (threadIdx.x == 0) p_.unit.slots_at[step] = p_.size;
  }
  __device__ bool watches() const {
    if (p_.phase == Phase::prompt) return p_.traits().observes_prompt;
    return p_.settings.compress == Compress::always || detail::declares_log_bias<P>;
  }
  __device__ void add_statistics(int first, int last) {
    const FutureQueries asked = p_.traits().future_queries;
    if (asked.horizon > 0) add_queries(p_.fixed, max(first, asked.first), last);
    if (p_.traits().future_mass && first > 0) future(first, last, -1);  // the first block never came
  }
  __device__ void future(int first, int last, double sign) {
    Play copy = p_;
    add_future(copy, first, last, sign);
    p_.follow(copy);
  }

  __device__ void measure_block() {
    const Unit& unit = p_.unit;
    const int group = p_.trace.group, dv = p_.trace.value_dim;
    for (int i = static_cast<int>(threadIdx.x / 32); i < args_.row_count * group; i += team_warps) {
      const int r = i / group, g = i % group, token = args_.rows[r], m = p_.settings.measured_of_token[token];
      if (m < 0) continue;
      Play::measure_head(p_.fixed, g, m, token, unit.block_output + static_cast<long>(i) * dv, unit.block_lse[i]);
    }
    if (!p_.settings.mass) return;
    __syncthreads();
    const int newest = p_.now;
    for (int r = 0; r < args_.row_count; ++r) {
      const int token = args_.rows[r], m = p_.settings.measured_of_token[token];
      if (m < 0) continue;
      p_.now = newest;
      const float* bias = p_.biases(p_.size);
      p_.look_at(token, bias);  // rows of the block that come later are hidden
      p_.attend_apart(false);
      mass(m, token, bias);
    }
  }
  __device__ void mass(int m, int token, const float* bias) {
    Play copy = p_;
    measure_mass(copy, m, token, p_.fixed.logits, p_.fixed.logit_stride, bias);
    p_.follow(copy);
  }

  /// What else scoring needs to know.
  __device__ void look_around() {
    if (p_.traits().future_queries.horizon > 0) look_ahead(p_.fixed, p_.now, p_.traits().future_queries.horizon);
    if (!p_.traits().future_mass) return;
    p_.team.for_each(p_.size, [&](int s) { p_.unit.future[s] = static_cast<float>(p_.unit.future_left[p_.unit.token[s]]); });
    __syncthreads();
  }

  __device__ void score_block() {
    const bool due = p_.due(args_.first);
    if (threadIdx.x == 0 && args_.first_round) p_.progress.compressing = due;
    if (!due) return;
    look_around();
    Player<P>::score(p_, args_.row_count);
    classify(p_.fixed, p_.size, p_.now, links(), 0);
  }

  __device__ void compress() {
    const bool due = p_.due(args_.first);
    if (due) p_.compress(0, args_.row_count);
    if (threadIdx.x == 0) p_.progress.more = due && p_.over_budget();
  }

  /// Tokens [first, last) one by one.
  __device__ void steps() {
    for (int token = args_.first; token < args_.last; ++token) {
      const int step = args_.block + token - args_.first;
      p_.now = token, p_.block_first = token, p_.block = step;
      p_.phase = token < p_.trace.prompt_tokens ? Phase::prompt : Phase::decode;
      const bool compresses = (token + 1 < args_.last || args_.last_compresses);
      take(token, step, compresses);
    }
    detail::copies_wait<0>();
    if (threadIdx.x == 0) p_.progress.attended = p_.size;
  }

  /// What the rows that come after the first block will give.
  __device__ void begin_future() {
    p_.team.for_each(p_.trace.tokens, [&](int t) { p_.unit.future_all[t] = p_.unit.future_left[t] = 0; });
    __syncthreads();
    future(args_.first, args_.last, 1);
  }

  __device__ void take(int token, int step, bool compresses) {
    start_clock();
    p_.append(token, token + 1);
    after_append(step);
    stop_clock(step, TimedPhase::append);
    if (watches()) add_statistics(token, token + 1);
    const int m = p_.settings.measured_of_token[token];
    const bool observes = detail::declares_on_attention<P> && p_.traits().observes && watches();
    const bool due = p_.due(token);
    row_of_ = -1, p_.probe_known = false;
    if (m >= 0 || observes) {
      attend<true>(token, 0x7fffffff, due, m >= 0 && p_.settings.mass);
      stop_clock(step, TimedPhase::attend);
      if (m >= 0) p_.measure(m, token);
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
      p_.team.for_each(p_.size, [&](int s) { p_.observe_slot(s); });
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
      p_.template attend<true>(!again);
    else
      p_.attend_apart(!again);
    row_of_ = newest_key < p_.now ? -1 : token;
  }

  __device__ void compress_step(int token, int step, bool observes) {
    if (evicts_one()) {
      const int victim = observe_and_rank(token, observes);
      stop_clock(step, TimedPhase::score);
      if (victim >= 0) {
        if (threadIdx.x == 0) ++p_.progress.evictions, ++p_.progress.compressions;
        p_.drop_one(victim);
        stop_clock(step, TimedPhase::compact);
        return;
      }
    } else if (observes) {
      p_.team.for_each(p_.size, [&](int s) { p_.observe_slot(s); });
      __syncthreads();
      stop_clock(step, TimedPhase::observe);
    }
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
    }
    if (threadIdx.x == 0) ++p_.progress.compressions;
    __syncthreads();
  }

  /// Whether this compression lets exactly one slot go by its own score, nothing being folded: then places are not needed.
  __device__ bool evicts_one() const {
    if constexpr (detail::declares_on_selected<P> || detail::declares_on_compress<P>) return false;
    const Traits traits = p_.traits();
    return p_.size == p_.budget + 1 && !args_.together && traits.select == Select::slots && traits.needs_budget() &&
           !(detail::declares_on_merge<P> && traits.merges) && traits.future_queries.horizon == 0 && !traits.future_mass &&
           (traits.observation_window <= 1 || window_is_closed());
  }
  __device__ bool window_is_closed() const {
    return p_.traits().window_once && p_.phase == Phase::decode && p_.progress.compressions > 0;
  }

  /// One pass over the slots: on_attention, the window's statistic where the window is this row, score. Returns the slot
  /// that must go, the lowest score, of equals the newest; -1 when all are safe.
  __device__ int observe_and_rank(int token, bool observes) {
    const bool window = p_.traits().observation_window == 1 && !window_is_closed();
    if (window && (row_of_ != token || p_.traits().window_past)) {
      if (observes) {
        p_.team.for_each(p_.size, [&](int s) { p_.observe_slot(s); });
        __syncthreads();
        observes = false;
      }
      attend(token, p_.traits().window_past ? token - 1 : 0x7fffffff, false, true);
    }
    p_.know_probe();
    auto head = p_.head();
    unsigned long long mine = ~0ull;
    int slot = -1;
    const auto look_at_slot = [&](int s) {
      const float score = p_.score_of(head, s);
      const int slot_token = p_.unit.token[s];
      if (isnan(score)) p_.fail(UnitError::nan_score, s, slot_token);
      if (safety_of(p_.unit.protect, p_.now, score, slot_token) != safety_normal) return;
      const unsigned long long key =
          static_cast<unsigned long long>(Cut::key_of(score)) << 31 | static_cast<unsigned>(0x7fffffff - slot_token);
      if (key < mine) mine = key, slot = s;
    };
    if constexpr (detail::declares_score_in<P>) {  // it may read what its neighbours saw
      p_.team.for_each(p_.size, [&](int s) {
        if (observes) p_.observe_slot(s);
      });
      if (window) p_.sum_row(true, 0, true);
      __syncthreads();
      p_.team.for_each(p_.size, look_at_slot);
    } else {
      if (window) p_.sum_row(true, 0, true);
      p_.team.for_each(p_.size, [&](int s) {
        if (observes) p_.observe_slot(s);
        look_at_slot(s);
      });
    }
    const unsigned long long least = p_.team.min_key(mine);
    if (least == ~0ull) return -1;
    if (mine == least) p_.team.memory->number = slot;
    __syncthreads();
    return p_.team.memory->number;
  }

  /// The observation window's sums, if the policy has one that is still open. Returns its rows.
  __device__ int look_window(int token) {
    const int window = p_.traits().observation_window;
    if (window == 0 || window_is_closed()) return 1;
    const int rows = min(window, token + 1), first = token + 1 - rows;
    const int newest_key = p_.traits().window_past ? first - 1 : 0x7fffffff;
    for (int r = 0; r < rows; ++r) {
      if (row_of_ != first + r || p_.traits().window_past) attend(first + r, newest_key, false, r + 1 < rows);
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

  /// When every token was lost: at the end of the chain of slots that came to stand for it.
  __device__ void finish() {
    const Unit& unit = p_.unit;
    p_.team.for_each(p_.trace.tokens, [&](int t) {
      int stands = t;
      while (stands >= 0 && unit.parent[stands] != stands) stands = unit.parent[stands];
      unit.lost_at[t] = stands >= 0 ? never_lost : -2 - stands;
    });
  }

  __device__ void start_clock() {
    if (args_.timed) clock_ = clock64();
  }
  __device__ void stop_clock(int step, TimedPhase phase) {
    if (!args_.timed) return;
    __syncthreads();
    const long long now = clock64();
    if (threadIdx.x == 0)
      p_.unit.clocks[step * timed_phases + static_cast<int>(phase)] += static_cast<unsigned>(now - clock_);
    clock_ = now;
  }

  const Launch& args_;
  Player<P>& p_;
  const float* bias_ = nullptr;
  int row_of_ = -1;  // token whose row the logits are of
  int buffer_ = 0, meetings_ = 0;
  long long clock_ = 0;
};

/// A struct, word by word, by all threads.
template <class T>
__device__ void copy_words(T* to, const T* from) {
  static_assert(sizeof(T) % 4 == 0);
  for (unsigned i = threadIdx.x; i < sizeof(T) / 4; i += team_threads)
    reinterpret_cast<unsigned*>(to)[i] = reinterpret_cast<const unsigned*>(from)[i];
}

template <class P>
__global__ void __launch_bounds__(team_threads, 2) play_kernel(const __grid_constant__ Launch launch, const P* points) {
  extern __shared__ __align__(16) char memory[];
  __shared__ Fixed fixed;
  __shared__ __align__(16) unsigned char policy[sizeof(P)];
  const TraceData& trace = launch.trace;
  const bool streamed = streams(trace.elements, trace.key_dim, trace.value_dim, trace.group);
  // Under a cooperative launch whole layers are resident at a time; otherwise there is a block for every unit.
  for (int u = static_cast<int>(blockIdx.x); u < launch.unit_count; u += static_cast<int>(gridDim.x)) {
    const Unit* unit = launch.units + u;
    copy_words(&fixed.unit, unit);
    copy_words(&fixed.layer, launch.layers + unit->layer);
    for (unsigned i = threadIdx.x; i < sizeof(P); i += team_threads)
      policy[i] = reinterpret_cast<const unsigned char*>(points + unit->point)[i];
    if (threadIdx.x == 0) {
      fixed.trace = launch.trace, fixed.settings = launch.settings;
      fixed.row = carve_row(memory, streamed, trace.key_dim, trace.value_dim, trace.group);
      fixed.row.probabilities = unit->probabilities;
      fixed.units = launch.units, fixed.progress = launch.progress + u;
      const int row_bytes = row_memory_bytes(streamed, trace.key_dim, trace.value_dim, trace.group);
      fixed.logits = launch.shared_logits > 0 ? reinterpret_cast<float*>(memory + row_bytes) : unit->logits;
      fixed.logit_stride = launch.shared_logits > 0 ? launch.shared_logits : unit->capacity;
      fixed.streamed = streamed;
    }
    __syncthreads();
    Player<P> player(fixed, *reinterpret_cast<const P*>(policy));
    player.phase = launch.phase, player.block = launch.block, player.block_first = launch.first;
    player.now = (launch.probing ? launch.first : launch.last) - 1;
    Stager<P>(launch, player).run();
    __syncthreads();
    if (threadIdx.x == 0) fixed.progress->size = player.size;
    __syncthreads();
  }
}

}  // namespace kv
