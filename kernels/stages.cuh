// A prompt block in stages, between which grid-wide kernels attend (block_attention.hpp); and what stages and single tokens
// have in common.
#pragma once
#include "kernels/lookout.cuh"
#include "kernels/measure.cuh"
#include "kernels/player.cuh"

namespace kv {

/// One unit at one stage of a launch; `plain` as Player's.
template <class P, bool plain = false>
class Stages {
 public:
  __device__ Stages(const Launch& launch, Fixed& fixed, const P& policy) : args_(launch), p_(fixed, policy) {
    p_.phase = launch.phase, p_.block = launch.block, p_.block_first = launch.first;
    p_.now = (launch.probing ? launch.first : launch.last) - 1;
  }

  /// Slots in the cache.
  __device__ int size() const { return p_.size; }

  __device__ void run() {
    switch (args_.stage) {
      case Stage::begin:
        return begin();
      case Stage::look:
        return look();
      case Stage::probe:
        return probe();
      case Stage::append:
        return append();
      case Stage::measure:
        return measure_masses();
      case Stage::observe:
        return p_.observe_block(args_.row_count);
      case Stage::score:
        return score_block();
      case Stage::compress:
        return compress();
      case Stage::future:
        return begin_future();
      case Stage::finish:
        return finish();
      case Stage::steps:
        return;  // steps.cuh
    }
  }

 protected:
  __device__ bool links() const { return p_.traits().select == Select::links; }

  __device__ void begin() {
    p_.begin();
    p_.size = 0;
    __syncthreads();
    if (threadIdx.x != 0) return;
    p_.progress = Progress{};
    p_.progress.lost = !p_.absolute();
  }

  /// Biases are brought up to date and places found, then what the rows look at is written down for the kernels that turn
  /// rows and attend. The rows of a block that is to come lie behind the cache: nothing is appended yet.
  __device__ void look() {
    AttentionTask task;
    const bool idle = args_.window && !p_.due(args_.first);
    const int coming = args_.probing && !args_.window ? args_.last - args_.first : 0, slots = p_.size + coming;
    if (coming > 0) p_.append_rows(args_.first, args_.last, p_.size);
    __syncthreads();
    if (!idle) {
      task.bias = p_.biases(slots);
      if (!p_.absolute()) find_turns(p_, args_.rows, args_.row_count, slots);
      p_.team.for_each(args_.row_count,
                       [&](int r) { p_.unit.query_row[r] = p_.absolute() ? p_.layer.row_of_token[args_.rows[r]] : r; });
    }
    if (threadIdx.x != 0) return;
    if (coming > 0) p_.progress.attended = slots;
    const Unit& unit = p_.unit;
    const TraceData& trace = p_.trace;
    task.keys = p_.attended_keys(), task.values = unit.values, task.token = unit.token;
    task.sink_logit = p_.layer.sink_logit ? p_.layer.sink_logit + p_.query_head(0) : nullptr;
    const long first = static_cast<long>(p_.query_head(0)) * p_.layer.query_rows;
    task.queries =
        p_.absolute() ? p_.at(p_.layer.q_rotated, first, trace.key_dim) : static_cast<const char*>(unit.queries);
    task.query_stride = p_.absolute() ? p_.layer.query_rows : args_.row_count;
    task.query_row = unit.query_row, task.query_token = args_.rows;
    task.output = args_.outputs ? unit.block_output : nullptr, task.lse = unit.block_lse;
    if (const int known = args_.prefill.rows(); known > 0)
      task.lse = const_cast<float*>(p_.layer.prefill_lse) +
                 (static_cast<long>(unit.info.kv_head) * known + args_.rows[0] - args_.prefill.first) * trace.group;
    task.sums = args_.sums ? unit.sums : nullptr;
    task.rows = idle ? 0 : args_.row_count, task.slots = slots;
    // Slots older than every row come first, in any order. A window's queries may be among them: then every slot is looked
    // at one by one.
    const bool among = args_.window && (args_.probing || args_.row_count > args_.last - args_.first);
    task.older = among ? slots : slots - (args_.last - args_.first);
    task.window = p_.layer.window, task.newest_key = among ? min(args_.newest_key, 0x7ffffffe) : args_.newest_key;
    args_.tasks[blockIdx.x] = task;
  }

  /// Places of the first n slots' keys, in unit.work[3], and of the queries, which may stand there since a probe. Needs and gives
  /// a barrier.
  static __device__ __noinline__ void find_turns(Play play, const int* tokens, int count, int n) {
    const Unit& unit = play.unit;
    const bool same_rows = play.progress.turned_rows == count;
    play.find_places(n, unit.work[3]);
    play.team.for_each(count, [&](int r) {
      const int token = tokens[r], place = unit.work[3][play.slot_of_query(token, n)];
      int2& turned = unit.query_turned[r];
      unit.query_place[r] = same_rows && turned.x == token && turned.y == place ? -1 : place;
      turned = {token, place};
    });
    __syncthreads();
    if (threadIdx.x == 0) play.progress.turned_rows = count;
  }

  /// on_probe, of units whose compression the probe is for; every block's, if the policy asks for that.
  __device__ void probe() {
    if constexpr (detail::declares_on_probe<P>) {
      const bool again = !args_.first_round;
      if (again ? !p_.progress.more : p_.traits().probe == Probe::due && !p_.due(args_.first)) return;
      auto head = p_.head(args_.row_count);
      const P policy = p_.policy;
      policy.on_probe(p_.team, head);
    }
  }

  __device__ void append() {
    p_.append(args_.first, args_.last);
    if (threadIdx.x == 0) p_.unit.slots_at[args_.block] = p_.size, p_.progress.attended = p_.size;
    if (watches()) add_statistics(args_.first, args_.last);
  }
  __device__ bool watches() const {
    if (p_.phase == Phase::prompt) return p_.traits().observes_prompt;
    return args_.settings.compress == Compress::always || detail::declares_log_bias<P>;
  }
  __device__ void add_statistics(int first, int last) {
    const FutureQueries asked = p_.traits().future_queries;
    if (asked.horizon > 0) add_queries(p_.fixed, max(first, asked.first), last);
    if (!p_.traits().future_mass) return;
    const int past = p_.progress.past;
    __syncthreads();
    if (past < last) future(past, last, -1);  // queries that went by unwatched go along
    __syncthreads();
    if (threadIdx.x == 0) p_.progress.past = last;
  }
  __device__ void future(int first, int last, double sign) {
    Play copy = p_;
    add_future(copy, first, last, sign);
    p_.follow(copy);
  }

  /// mass_tv of a block's measured queries.
  __device__ void measure_masses() {
    for (int r = 0; r < args_.row_count; ++r) {
      const int token = args_.rows[r], m = p_.settings.measured_of_token[token];
      if (m < 0) continue;
      const float* bias = p_.biases(p_.size);
      p_.look_at(token, bias);  // rows of the block that come later are hidden
      p_.attend_apart(token);
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
    p_.team.for_each(p_.size,
                     [&](int s) { p_.unit.future[s] = static_cast<float>(p_.unit.future_left[p_.unit.token[s]]); });
    __syncthreads();
  }

  __device__ void score_block() {
    const bool due = p_.due(args_.first);
    if (threadIdx.x == 0 && args_.first_round) p_.progress.compressing = due;
    if (!due) return;
    look_around();
    p_.score(args_.row_count);
    classify(p_.fixed, p_.size, p_.now, links(), 0);
  }

  __device__ void compress() {
    const bool due = p_.due(args_.first);
    if (due) p_.compress(0, args_.row_count);
    if (threadIdx.x != 0) return;
    p_.progress.more = due && in_rounds(p_.traits()) && p_.over_budget();
    if (!p_.progress.compressing || p_.progress.more) return;
    ++p_.progress.compressions;
    p_.progress.compressing = false;
  }

  /// What the rows that come after the first block will give.
  __device__ void begin_future() {
    p_.team.for_each(p_.trace.tokens, [&](int t) { p_.unit.future_all[t] = p_.unit.future_left[t] = 0; });
    __syncthreads();
    future(args_.first, args_.last, 1);
    if (threadIdx.x == 0) p_.progress.past = args_.first;
  }

  /// Cosines and lost masses; and when every token was lost: at the end of the chain of slots that came to stand for it.
  __device__ void finish() {
    finish_measures(p_);
    const Unit& unit = p_.unit;
    p_.team.for_each(p_.trace.tokens, [&](int t) {
      int stands = t;
      while (stands >= 0 && unit.parent[stands] != stands) stands = unit.parent[stands];
      unit.lost_at[t] = stands >= 0 ? never_lost : -2 - stands;
    });
  }

  const Launch& args_;
  Player<P, plain> p_;
};

}  // namespace kv
