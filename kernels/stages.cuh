// A prompt block in stages, between which grid-wide kernels attend (block_attention.hpp); and what stages and single tokens
// have in common.
#pragma once
#include "kernels/lookout.cuh"
#include "kernels/measure.cuh"
#include "kernels/player.cuh"

namespace kv {

/// One unit at one stage of a launch.
template <class P>
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

  /// Bias and rotation are brought up to date, then what the rows look at is written down for the attention kernels.
  __device__ void look() {
    AttentionTask task;
    const bool idle = args_.window && !p_.due(args_.first);
    const int slots = args_.probing && !args_.window ? p_.progress.attended : p_.size;
    if (!idle) {
      task.bias = p_.biases(slots);
      if (!p_.absolute()) {
        turn_block(p_, args_.rows, args_.row_count, slots);
      }
      p_.team.for_each(args_.row_count,
                       [&](int r) { p_.unit.query_row[r] = p_.absolute() ? p_.layer.row_of_token[args_.rows[r]] : r; });
    }
    if (threadIdx.x != 0) return;
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
    task.sums = args_.sums ? unit.sums : nullptr;
    task.rows = idle ? 0 : args_.row_count, task.slots = slots;
    // Slots older than every row come first, in any order. A window's queries may be among them: then every slot is looked
    // at one by one.
    const bool among = args_.window && (args_.probing || args_.row_count > args_.last - args_.first);
    task.older = among ? slots : slots - (args_.last - args_.first);
    task.window = p_.layer.window, task.newest_key = among ? min(args_.newest_key, 0x7ffffffe) : args_.newest_key;
    args_.tasks[blockIdx.x] = task;
  }

  /// What Play::turn does, for many rows: places of queries are looked for by all threads, and a warp rotates several rows at
  /// once, so that it does not wait for the loads of each. Needs and gives a barrier.
  static __device__ __noinline__ void turn_block(Play play, const int* tokens, int count, int n) {
    const Unit& unit = play.unit;
    const TraceData& trace = play.trace;
    const LayerData& layer = play.layer;
    int *key_place = unit.work[3], *query_place = unit.query_row;
    play.find_places(n, key_place);
    rotate_rows(play, n, [&](int s) {
      if (unit.rotated_at[s] == key_place[s]) return Turn{};
      return Turn{key_place[s], play.at(unit.keys, s, trace.key_dim),
                  const_cast<char*>(play.at(unit.rotated, s, trace.key_dim))};
    });
    play.team.for_each(count, [&](int r) { query_place[r] = key_place[play.slot_of_query(tokens[r], n)]; });
    __syncthreads();
    play.team.for_each(n, [&](int s) { unit.rotated_at[s] = key_place[s]; });
    rotate_rows(play, count * trace.group, [&](int i) {
      const int r = i / trace.group, g = i % trace.group, from = layer.row_of_token[tokens[r]];
      return Turn{query_place[r],
                  play.at(layer.q, static_cast<long>(play.query_head(g)) * layer.query_rows + from, trace.key_dim),
                  const_cast<char*>(play.at(unit.queries, static_cast<long>(g) * count + r, trace.key_dim))};
    });
    __syncthreads();
  }
  /// A row and the place that it is rotated to; none where `in` is null.
  struct Turn {
    int place;
    const char* in;
    char* out;
  };
  /// turn_of(i) of every i < n, dealt over the warps.
  template <class TurnOf>
  static __device__ void rotate_rows(const Play& play, int n, TurnOf turn_of) {
    constexpr int at_once = 4;
    for (int first = static_cast<int>(threadIdx.x / 32); first < n; first += at_once * team_warps) {
      Turn turns[at_once];
#pragma unroll
      for (int t = 0; t < at_once; ++t)
        turns[t] = first + t * team_warps < n ? turn_of(first + t * team_warps) : Turn{};
      rotate(play, turns);
    }
  }
  template <std::size_t at_once>
  static __device__ void rotate(const Play& play, const Turn (&turns)[at_once]) {
    const TraceData& trace = play.trace;
    const int second = trace.half_style ? trace.pairs : 1, stride = trace.half_style ? 1 : 2;
    const auto round = [&](float x) { return round_as(play.layer.rope_step, x); };
    struct Pair {
      float x, y, cos, sin;
    };
    for (int i = static_cast<int>(threadIdx.x % 32); i < trace.pairs; i += 32) {
      Pair pair[at_once];
#pragma unroll
      for (std::size_t t = 0; t < at_once; ++t) {
        if (turns[t].in == nullptr) continue;
        const long angle = static_cast<long>(turns[t].place) * trace.pairs + i;
        pair[t] = {load_element(turns[t].in, trace.elements, i * stride),
                   load_element(turns[t].in, trace.elements, i * stride + second), play.layer.cos[angle],
                   play.layer.sin[angle]};
      }
#pragma unroll
      for (std::size_t t = 0; t < at_once; ++t) {
        if (turns[t].in == nullptr) continue;
        const auto [x, y, cos, sin] = pair[t];
        store_element(turns[t].out, trace.elements, i * stride, round(round(x * cos) + round(-y * sin)));
        store_element(turns[t].out, trace.elements, i * stride + second, round(round(y * cos) + round(x * sin)));
      }
    }
    for (int c = 2 * trace.pairs + static_cast<int>(threadIdx.x % 32); c < trace.key_dim; c += 32)
#pragma unroll
      for (const Turn& turn : turns)
        if (turn.in) store_element(turn.out, trace.elements, c, load_element(turn.in, trace.elements, c));
  }

  /// on_probe, of units whose compression the probe is for; every block's, if the policy asks for that.
  __device__ void probe() {
    if constexpr (detail::declares_on_probe<P>) {
      const bool again = !args_.first_round;
      if (again ? !p_.progress.more : p_.traits().probe == Probe::due && !p_.due(args_.first)) return;
      auto head = p_.head(args_.row_count);
      p_.policy.on_probe(p_.team, head);
    }
  }

  __device__ void append() {
    p_.append(args_.first, args_.last);
    if (threadIdx.x == 0) p_.unit.slots_at[args_.block] = p_.size, p_.progress.attended = p_.size;
    if (watches()) add_statistics(args_.first, args_.last);
  }
  __device__ bool watches() const {
    if (p_.phase == Phase::prompt) return p_.traits().observes_prompt;
    return p_.settings.compress == Compress::always || detail::declares_log_bias<P>;
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

  __device__ void measure_block() {
    const Unit& unit = p_.unit;
    const int group = p_.trace.group, dv = p_.trace.value_dim;
    for (int i = static_cast<int>(threadIdx.x / 32); i < args_.row_count * group; i += team_warps) {
      const int r = i / group, g = i % group, token = args_.rows[r], m = p_.settings.measured_of_token[token];
      if (m < 0) continue;
      measure_head(p_.fixed, g, m, token, unit.block_output + static_cast<long>(i) * dv, full_output_of(p_.fixed, g, m),
                   static_cast<double>(unit.block_lse[i]));
    }
    if (!p_.settings.mass) return;
    __syncthreads();
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
    Player<P>::score(p_, args_.row_count);
    classify(p_.fixed, p_.size, p_.now, links(), 0);
  }

  __device__ void compress() {
    const bool due = p_.due(args_.first);
    if (due) p_.compress(0, args_.row_count);
    if (threadIdx.x == 0) p_.progress.more = due && p_.over_budget();
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
  Player<P> p_;
};

}  // namespace kv
