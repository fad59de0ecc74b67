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
  __device__ Stager(const Launch& launch, Player<P>& player) : args_(launch), player_(player) {}

  __device__ void run() {
    switch (args_.stage) {
      case Stage::begin:
        return begin();
      case Stage::place:
        player_.append_rows(args_.first, args_.last, player_.size);
        if (threadIdx.x == 0) player_.progress.attended = player_.size + args_.last - args_.first;
        return;
      case Stage::look:
        return look();
      case Stage::probe:
        player_.look_around();
        player_.head.sight_.seen.rows = args_.row_count;
        if constexpr (detail::declares_on_probe<P>) player_.policy.on_probe(player_.team, player_.head);
        return;
      case Stage::append:
        return append();
      case Stage::measure:
        return measure_block();
      case Stage::observe:
        return player_.observe_block(args_.row_count);
      case Stage::score:
        return score_block();
      case Stage::compress:
        return compress();
      case Stage::count:
        if (threadIdx.x == 0 && player_.progress.compressing) ++player_.progress.compressions;
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
  __device__ bool links() const { return player_.traits.select == Select::links; }

  __device__ void begin() {
    player_.begin();
    player_.size = 0;
    __syncthreads();
    if (threadIdx.x != 0) return;
    player_.progress = Progress{};
    player_.progress.lost = !player_.absolute();
  }

  /// Bias and rotation are brought up to date, then what the rows look at is written down for the attention kernels.
  __device__ void look() {
    AttentionTask task;
    const bool idle = args_.window && !player_.due(args_.first);
    const int slots = args_.probing ? player_.progress.attended : player_.size;
    if (!idle) {
      task.bias = player_.biases(slots);
      if (!player_.absolute()) {
        player_.rotate_keys(slots);
        player_.rotate_queries(args_.rows, args_.row_count, slots);
      }
      player_.team.for_each(args_.row_count, [&](int r) {
        player_.unit.query_row[r] = player_.absolute() ? player_.layer.row_of_token[args_.rows[r]] : r;
      });
    }
    if (threadIdx.x != 0) return;
    const Unit& unit = player_.unit;
    task.keys = player_.attended_keys(), task.values = unit.values, task.token = unit.token;
    const TraceData& trace = player_.trace;
    task.sink_logit = player_.layer.sink_logit ? player_.layer.sink_logit + player_.query_head(0) : nullptr;
    const long first = static_cast<long>(player_.query_head(0)) * player_.layer.query_rows;
    task.queries = player_.absolute() ? player_.at(player_.layer.q_rotated, first, trace.key_dim)
                                      : static_cast<const char*>(unit.queries);
    task.query_stride = player_.absolute() ? player_.layer.query_rows : args_.row_count;
    task.query_row = unit.query_row, task.query_token = args_.rows;
    task.output = args_.outputs ? unit.block_output : nullptr, task.lse = unit.block_lse;
    task.sums = args_.sums ? unit.sums : nullptr;
    task.rows = idle ? 0 : args_.row_count, task.slots = slots;
    // Slots older than every row come first, in any order.
    // A window's queries may be among them: then every slot is looked at one by one.
    const bool among = args_.window && args_.row_count > args_.last - args_.first;
    task.older = among ? slots : slots - (args_.last - args_.first);
    task.window = player_.layer.window, task.newest_key = among ? min(args_.newest_key, 0x7ffffffe) : args_.newest_key;
    args_.tasks[blockIdx.x] = task;
  }

  __device__ void append() {
    player_.append(args_.first, args_.last);
    after_append(args_.block);
    if (threadIdx.x == 0) player_.progress.attended = player_.size;
    if (watches()) add_statistics(args_.first, args_.last);
  }
  __device__ void after_append(int step) const {
    if (threadIdx.x == 0 && player_.unit.slots_at) player_.unit.slots_at[step] = player_.size;
  }
  __device__ bool watches() const {
    if (player_.phase == Phase::prompt) return player_.traits.observes_prompt;
    return player_.settings.compress == Compress::always || detail::declares_log_bias<P>;
  }
  __device__ void add_statistics(int first, int last) {
    const FutureQueries& asked = player_.traits.future_queries;
    if (asked.horizon > 0) add_queries(player_, max(first, asked.first), last);
    if (player_.traits.future_mass && first > 0) add_future(player_, first, last, -1);  // the first block never came
  }

  __device__ void measure_block() {
    const Unit& unit = player_.unit;
    const int group = player_.trace.group, dv = player_.trace.value_dim;
    for (int i = static_cast<int>(threadIdx.x / 32); i < args_.row_count * group; i += team_warps) {
      const int r = i / group, g = i % group, token = args_.rows[r], m = player_.settings.measured_of_token[token];
      if (m < 0) continue;
      player_.measure_head(g, m, token, unit.block_output + static_cast<long>(i) * dv, unit.block_lse[i]);
    }
    if (!player_.settings.mass) return;
    __syncthreads();
    for (int r = 0; r < args_.row_count; ++r) {
      const int token = args_.rows[r], m = player_.settings.measured_of_token[token];
      if (m < 0) continue;
      const float* bias = player_.biases(player_.size);
      RowLook look = player_.look_of(token, bias);
      look.masked = true;  // rows of the block that come later
      player_.attend(look, false);
      measure_mass(player_, m, token, player_.logits, player_.logit_stride, bias);
    }
  }

  __device__ void score(int window_rows) {
    if (player_.traits.future_queries.horizon > 0) look_ahead(player_, player_.traits.future_queries.horizon);
    if (player_.traits.future_mass) {
      player_.team.for_each(player_.size, [&](int s) {
        player_.unit.future[s] = static_cast<float>(player_.unit.future_left[player_.unit.token[s]]);
      });
      __syncthreads();
    }
    player_.score(window_rows);
  }

  __device__ void score_block() {
    const bool due = player_.due(args_.first);
    if (threadIdx.x == 0 && args_.first_round) player_.progress.compressing = due;
    if (!due) return;
    score(args_.row_count);
    classify(player_, links(), 0);
  }

  __device__ void compress() {
    const bool due = player_.due(args_.first);
    if (due) player_.compress(0);
    if (threadIdx.x == 0) player_.progress.more = due && player_.over_budget();
  }

  /// Tokens [first, last) one by one.
  __device__ void steps() {
    for (int token = args_.first; token < args_.last; ++token) {
      const int step = args_.block + token - args_.first;
      player_.now = token, player_.block_first = token, player_.block = step;
      player_.phase = token < player_.trace.prompt_tokens ? Phase::prompt : Phase::decode;
      take(token, step);
      if (token + 1 < args_.last || args_.last_compresses) compress_step(token, step);
    }
    detail::copies_wait<0>();
    if (threadIdx.x == 0) player_.progress.attended = player_.size;
  }

  /// What the rows that come after the first block will give.
  __device__ void begin_future() {
    Player<P>& p = player_;
    p.team.for_each(p.trace.tokens, [&](int t) { p.unit.future_all[t] = p.unit.future_left[t] = 0; });
    __syncthreads();
    add_future(p, args_.first, args_.last, 1);
  }

  __device__ void take(int token, int step) {
    Player<P>& p = player_;
    start_clock();
    p.append(token, token + 1);
    after_append(step);
    stop_clock(step, TimedPhase::append);
    if (watches()) add_statistics(token, token + 1);
    const int m = p.settings.measured_of_token[token];
    const bool observes = detail::declares_on_attention<P> && p.traits.observes && watches();
    row_of_ = -1, p.probe_known = false;
    if (m < 0 && !observes) return;
    attend(token, 0x7fffffff, p.due(token), m >= 0 && p.settings.mass);
    stop_clock(step, TimedPhase::attend);
    if (m >= 0) {
      p.measure(m, token);
      if (p.settings.mass) {
        measure_mass(p, m, token, p.logits, p.logit_stride, bias_);
        row_of_ = -1;
        if (observes) attend(token, 0x7fffffff, p.due(token), false);
      }
    }
    start_clock();
    if (observes) p.observe_row();
    stop_clock(step, TimedPhase::observe);
  }

  /// Attends one token's queries over the cache. With `scores`, the policy's key probe goes along.
  __device__ void attend(int token, int newest_key, bool scores, bool again) {
    Player<P>& p = player_;
    bias_ = p.biases(p.size);
    RowLook look = p.look_of(token, bias_);
    look.newest_key = newest_key, look.masked = look.masked || newest_key < p.now || token < p.now;
    // Only where the keys that are attended are those that hooks see.
    if (p.traits.key_probe && scores && p.absolute()) look.probe_vector = p.unit.vector, look.probe = p.unit.probe, p.probe_known = true;
    p.attend(look, !again);
    row_of_ = newest_key < p.now ? -1 : token;
  }

  __device__ void compress_step(int token, int step) {
    Player<P>& p = player_;
    if (!p.due(token)) return;
    for (bool more = true; more;) {
      start_clock();
      const int rows = look_window(token);
      stop_clock(step, TimedPhase::observe);
      score(rows);
      const int victim = single_victim();
      stop_clock(step, TimedPhase::score);
      if (victim >= 0) {
        p.evict_one(victim);
        stop_clock(step, TimedPhase::compact);
        break;
      }
      classify(p, links(), buffer_);
      if (args_.together) meet();
      p.compress(buffer_);
      if (args_.together) buffer_ ^= 1;
      stop_clock(step, TimedPhase::compact);
      more = p.over_budget();
    }
    if (threadIdx.x == 0) ++p.progress.compressions;
    __syncthreads();
  }

  /// The observation window's sums, if the policy has one that is still open. Returns its rows.
  __device__ int look_window(int token) {
    Player<P>& p = player_;
    const int window = p.traits.observation_window;
    const bool frozen = p.traits.window_once && p.phase == Phase::decode && p.progress.compressions > 0;
    if (window == 0 || frozen) return 1;
    const int rows = min(window, token + 1), first = token + 1 - rows;
    const int newest_key = p.traits.window_past ? first - 1 : 0x7fffffff;
    for (int r = 0; r < rows; ++r) {
      if (row_of_ != first + r || p.traits.window_past) attend(first + r, newest_key, false, r + 1 < rows);
      p.sum_row(true, rows - 1 - r, r == 0);
      __syncthreads();
    }
    return rows;
  }

  /// The one slot that must go, when it is one, nothing is folded and it is not safe; else -1. It is the lowest score, of
  /// equals the newest, found without places.
  __device__ int single_victim() {
    Player<P>& p = player_;
    if (p.size != p.budget + 1 || args_.together || links() || !p.traits.needs_budget()) return -1;
    if constexpr (detail::declares_on_selected<P>) return -1;
    if (detail::declares_on_merge<P> && p.traits.merges) return -1;
    unsigned long long mine = ~0ull;
    int slot = -1;
    p.team.for_each(p.size, [&](int s) {
      const float score = p.unit.score[s];
      const int token = p.unit.token[s];
      if (isnan(score)) p.fail(UnitError::nan_score, s, token);
      if (safety_of(p, score, token) != safety_normal) return;
      const unsigned long long key =
          static_cast<unsigned long long>(Cut::key_of(score)) << 31 | static_cast<unsigned>(0x7fffffff - token);
      if (key < mine) mine = key, slot = s;
    });
    const unsigned long long least = p.team.min_key(mine);
    if (least == ~0ull) return -1;
    if (mine == least) p.team.memory->number = slot;
    __syncthreads();
    const int victim = p.team.memory->number;
    __syncthreads();
    return victim;
  }

  /// All heads of the layer have come this far. Blocks of a layer are resident together: the launch is cooperative.
  __device__ void meet() {
    __syncthreads();
    if (threadIdx.x == 0) {
      int* arrivals = args_.meeting + player_.unit.first_head;
      __threadfence();
      atomicAdd(arrivals, 1);
      ++meetings_;
      while (static_cast<volatile int*>(arrivals)[0] < meetings_ * player_.unit.layer_heads) __nanosleep(32);
      __threadfence();
    }
    __syncthreads();
  }

  /// When every token was lost: at the end of the chain of slots that came to stand for it.
  __device__ void finish() {
    const Unit& unit = player_.unit;
    player_.team.for_each(player_.trace.tokens, [&](int t) {
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
      player_.unit.clocks[step * timed_phases + static_cast<int>(phase)] += static_cast<unsigned>(now - clock_);
    clock_ = now;
  }

  const Launch& args_;
  Player<P>& player_;
  const float* bias_ = nullptr;
  int row_of_ = -1;  // token whose row `logits` holds
  int buffer_ = 0, meetings_ = 0;
  long long clock_ = 0;
};

template <class P>
__global__ void __launch_bounds__(team_threads, 2) play_kernel(const __grid_constant__ Launch launch, const P* points) {
  extern __shared__ __align__(16) char memory[];
  __shared__ TeamMemory team;
  const TraceData& trace = launch.trace;
  const bool streamed = streams(trace.elements, trace.key_dim, trace.value_dim, trace.group);
  const int row_bytes = row_memory_bytes(streamed, trace.key_dim, trace.value_dim, trace.group);
  // Under a cooperative launch whole layers are resident at a time; otherwise there is a block for every unit.
  for (int u = static_cast<int>(blockIdx.x); u < launch.unit_count; u += static_cast<int>(gridDim.x)) {
    const Unit& unit = launch.units[u];
    Progress& progress = launch.progress[u];
    Play play{unit, progress, launch.layers[unit.layer], trace, launch.settings, BlockTeam{&team},
              carve_row(memory, streamed, trace.key_dim, trace.value_dim, trace.group)};
    play.row.probabilities = unit.probabilities;
    play.logits = launch.shared_logits > 0 ? reinterpret_cast<float*>(memory + row_bytes) : unit.logits;
    play.logit_stride = launch.shared_logits > 0 ? launch.shared_logits : unit.capacity;
    play.size = progress.size, play.budget = unit.info.budget, play.streamed = streamed;
    play.phase = launch.phase, play.block = launch.block, play.block_first = launch.first;
    play.now = (launch.probing ? launch.first : launch.last) - 1;
    Player<P> player(play, points[unit.point], launch.units);
    Stager<P>(launch, player).run();
    __syncthreads();
    if (threadIdx.x == 0) progress.size = player.size;
    __syncthreads();
  }
}

}  // namespace kv
