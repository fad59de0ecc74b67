// Attention over rows on Hopper: key_dim = value_dim = 128, 16-bit elements, no softcap. As many blocks as there is room for
// go through the work: runs of (row, head) pairs, of which each warpgroup has 64. Four warps copy ahead, each into the one
// buffer that it owns, and say what the next run is; a warpgroup copies that run's queries after the last dots of the
// present one. Two kernels take turns at a launch's tasks: one for those with an output, one, with twice the warpgroups, for
// those that want the log-sum-exp alone.
#pragma once
#include "kernels/hopper.cuh"
#include "kernels/row_attention.cuh"

namespace kv::blocks {

/// What a warpgroup has to know of a run: pairs of a task and the slots that some of them may see, the last ones first.
struct alignas(16) RowRun {
  AttentionTask task;
  SlotTiles tiles;
  int first, last;  // pairs of the block; first = -1 when there is no more work
  int query[64];    // rows of task.queries. Pairs past the last are the last again
};

template <bool valued>
struct HopperRows {
  static constexpr int groups = valued ? 2 : 4, pairs = 64 * groups, threads = 128 * (groups + 1);
  static constexpr int registers = valued ? 224 : 104, copying_registers = valued ? 56 : 64;
  // Buffers of 128 rows: with values, keys and values of two stages (K V K V), else keys of four. A stage is free once its
  // dots are there, biases are needed a tile longer.
  static constexpr int buffers = 4, stages = valued ? 2 : 4, biases = 2 * stages, known_runs = 2;
  static constexpr int tiles = groups * bytes_64, token = tiles + buffers * bytes_128;
  static constexpr int bias = token + stages * 512, weight = bias + biases * 512;
  static constexpr int visible = weight + (valued ? 0 : biases * 512), runs = visible + 16;
  static constexpr int bytes = runs + groups * known_runs * int{sizeof(RowRun)} + swizzle_bytes;
  static constexpr int barriers = 2 * buffers + 2 * groups * known_runs;

  /// The buffer of the i-th tile's keys; its values are in the next one.
  static __device__ unsigned keys_of(unsigned i) { return valued ? i % 2 * 2 : i % 4; }
};

#ifdef KV_HOPPER
/// Where a block's things lie in shared memory.
template <bool valued>
struct HopperRowMemory {
  using Layout = HopperRows<valued>;
  char* shared;
  uint32_t base, barriers;

  __device__ uint32_t full(unsigned buffer) const { return barriers + 8 * buffer; }
  __device__ uint32_t free(unsigned buffer) const { return full(Layout::buffers + buffer); }
  __device__ uint32_t run_full(unsigned group, unsigned run) const {
    return full(2 * Layout::buffers + Layout::known_runs * group + run % Layout::known_runs);
  }
  __device__ uint32_t run_free(unsigned group, unsigned run) const {
    return run_full(group, run) + 8 * Layout::groups * Layout::known_runs;
  }
  /// Of a run's two barriers, when it is time to wait.
  static __device__ int parity(unsigned run) { return run / Layout::known_runs & 1; }
  __device__ RowRun& run(unsigned group, unsigned run) const {
    return reinterpret_cast<RowRun*>(shared + Layout::runs)[group * Layout::known_runs + run % Layout::known_runs];
  }
  __device__ uint32_t queries(unsigned group) const { return base + group * bytes_64; }
  __device__ uint32_t tile(unsigned buffer) const { return base + Layout::tiles + buffer * bytes_128; }
  __device__ const int* tokens(unsigned stage) const {
    return reinterpret_cast<const int*>(shared + Layout::token) + stage * hopper_tile;
  }
  /// Of a tile's slots, in units of log 2.
  __device__ float* biases(unsigned tile) const {
    return reinterpret_cast<float*>(shared + Layout::bias) + tile % Layout::biases * hopper_tile;
  }
  /// Those biases as weights. Without values.
  __device__ float* weights(unsigned tile) const {
    return reinterpret_cast<float*>(shared + Layout::weight) + tile % Layout::biases * hopper_tile;
  }
  /// Bit g: all rows of warpgroup g see all of the tile.
  __device__ unsigned& visible(unsigned stage) const {
    return reinterpret_cast<unsigned*>(shared + Layout::visible)[stage];
  }
};

/// A copying warp's work: every tile whose buffer it owns. Of the warps of keys the g-th serves warpgroup g.
template <bool valued>
struct RowCopies {
  using Layout = HopperRows<valued>;
  const AttentionShape& shape;
  const HopperRowMemory<valued>& memory;
  const unsigned buffer;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned stage = valued ? buffer / 2 : buffer;
  const bool keys = !valued || buffer % 2 == 0;

  /// The tile at `slot` is the n-th of the block. Lane g knows the tokens of warpgroup g's first and last row.
  __device__ void copy(const AttentionTask& task, int slot, unsigned n, int oldest, int newest) const {
    const int last_slot = task.slots - 1;
    const char* const rows = static_cast<const char*>(keys ? task.keys : task.values);
    const int first_key = task.token[slot], last_key = task.token[min(slot + hopper_tile - 1, last_slot)];
    const bool biased = keys && task.bias;
    float bias[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) bias[part] = biased ? task.bias[min(slot + 32 * part + lane, last_slot)] : 0;
    if (n >= Layout::stages) barrier_wait(memory.free(buffer), (n / Layout::stages - 1) & 1);
    copy_tile(memory.tile(buffer), rows + static_cast<long>(slot) * 256, task.slots - slot);
    if (keys) {
      const uint32_t tokens = shared_address(memory.tokens(stage));
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int column = 32 * part + lane;
        copy_4(tokens + column * 4, task.token + min(slot + column, last_slot), true);
        if (!biased) continue;
        const float bias2 = bias[part] * log2_e;
        memory.biases(n)[column] = bias2;
        if constexpr (!valued) memory.weights(n)[column] = weight_of(bias2);
      }
      const unsigned visible =
          __ballot_sync(~0u, all_visible(task, slot, hopper_tile, first_key, last_key, oldest, newest));
      if (lane == 0) memory.visible(stage) = visible;
    }
    publish_copies();
    barrier_arrive(memory.full(buffer));
  }

  /// Says what the n-th run is; first = -1 for the end of work.
  __device__ void tell(const AttentionTask* task, const SlotTiles& tiles, int first, int last, unsigned n) const {
    if (n >= Layout::known_runs) barrier_wait(memory.run_free(stage, n), memory.parity(n - Layout::known_runs));
    RowRun& run = memory.run(stage, n);
    if (lane == 0) run.tiles = tiles, run.first = first, run.last = last;
    if (first >= 0) {
#pragma unroll
      for (int row = lane; row < 64; row += 32) {
        const int pair = min(first + 64 * static_cast<int>(stage) + row, last);
        const int at = static_cast<int>(pair % shape.group * task->query_stride) + task->query_row[pair / shape.group];
        const char* const query = static_cast<const char*>(task->queries) + long{at} * 256;
        prefetch_line(query), prefetch_line(query + 128);
        run.query[row] = at;
      }
      static_assert(sizeof(AttentionTask) <= 32 * 4);
      if (lane < static_cast<int>(sizeof(AttentionTask) / 4))
        copy_4(shared_address(&run) + 4 * lane, reinterpret_cast<const int*>(task) + lane, true);
    }
    publish_copies();
    barrier_arrive(memory.run_full(stage, n));
  }

  __device__ void run(const AttentionTask* tasks, int count, int ranks) const {
    const int pieces = static_cast<int>(work_blocks(count, ranks));
    unsigned n = 0, streamed = 0;  // runs and their tiles so far
    for (int k = 0, i = piece_of_turn(0); i < pieces; i = piece_of_turn(++k)) {
      const WorkItem work = work_item(count, ranks, i);
      if (work.task >= count) continue;
      const AttentionTask& task = tasks[work.task];
      const int group = shape.group, pairs = task.rows * group;
      const int first = ((pairs + Layout::pairs - 1) / Layout::pairs - 1 - work.rank) * Layout::pairs;
      if ((task.output != nullptr) != valued || first < 0) continue;
      const int last = min(first + Layout::pairs, pairs) - 1;
      SlotTiles tiles{};
      if (task.slots > 0) tiles = visible_tiles(task, first / group, last / group, hopper_tile);
      if (keys) tell(&task, tiles, first, last, n);
      const int pair = first + 64 * (lane % Layout::groups);
      const int oldest = task.query_token[min(pair, last) / group],
                newest = task.query_token[min(pair + 63, last) / group];
      for (int t = (stage - streamed) % Layout::stages; t < tiles.count; t += Layout::stages)
        copy(task, tiles[tiles.count - 1 - t] * hopper_tile, streamed + t, oldest, newest);
      ++n, streamed += tiles.count;
    }
    if (keys) tell(nullptr, {}, -1, -1, n);
  }
};
#endif

#ifdef KV_HOPPER
/// Tensor cores cut off where they add, always towards 0: over 16k slots a sum loses 5e-5 of itself. So it goes to the task's
/// output now and then and starts again from 0; what lies there is relative to `base`. A thread's two rows.
template <class Element>
struct LongSums {
  static constexpr int tiles = 16;
  float base[2];
  bool began = false;

  /// o += what lies there.
  __device__ void fetch(Accumulators& o, const AttentionTask& task, const ThreadRows& rows,
                        const RunningRows<Element>& running, int last) const {
    if (!began) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (rows.pair[r] > last) continue;
      const float now = running.base[r], factor = exp2_fast(base[r] - (now == -INFINITY ? 0.f : now));
      const float* const from = output_of(task, rows.pair[r], hopper_dim);
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const float2 part = *reinterpret_cast<const float2*>(from + 8 * n);
        o[n][2 * r] = __fmaf_rn(part.x, factor, o[n][2 * r]);
        o[n][2 * r + 1] = __fmaf_rn(part.y, factor, o[n][2 * r + 1]);
      }
    }
  }

  /// `o` goes there and is 0 again.
  __device__ void put(Accumulators& o, const AttentionTask& task, const ThreadRows& rows,
                      const RunningRows<Element>& running, int last) {
    fetch(o, task, rows, running, last);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      base[r] = running.base[r];
      if (rows.pair[r] > last) continue;
      float* const to = output_of(task, rows.pair[r], hopper_dim);
#pragma unroll
      for (int n = 0; n < 16; ++n) *reinterpret_cast<float2*>(to + 8 * n) = make_float2(o[n][2 * r], o[n][2 * r + 1]);
    }
    set_zero(o);
    began = true;
  }
};
#endif

#ifdef KV_HOPPER
/// A warpgroup's work.
template <class Element, bool valued, bool fast>
struct RowWork {
  using Layout = HopperRows<valued>;
  using Running = RunningRows<Element>;
  const AttentionShape& shape;
  const LogitRule& rule;
  const HopperRowMemory<valued>& memory;
  const int mine;
  unsigned n = 0, streamed = 0;  // runs and their tiles before the present one

  __device__ void await(unsigned buffer, unsigned tile) const {
    barrier_wait(memory.full(buffer), tile / Layout::stages & 1);
  }
  /// Starts the dots of the block's `tile`-th tile.
  __device__ __forceinline__ void start(Accumulators& s, unsigned tile) const {
    start_dots<Element>(s, memory.queries(mine), memory.tile(Layout::keys_of(tile)));
  }
  /// Whether all of the warpgroup's rows see all of a tile.
  __device__ bool visible(unsigned tile) const { return memory.visible(tile % Layout::stages) >> mine & 1; }
  /// Hides what rows do not see of the run's i-th tile. Its keys and tokens are read for the last time.
  __device__ __forceinline__ void hide(Accumulators& s, const RowRun& run, int i, const ThreadRows& rows,
                                       bool visible) const {
    const unsigned tile = streamed + i;
    if (!visible)
      hide_unseen(s, memory.tokens(tile % Layout::stages),
                  run.task.slots - run.tiles[run.tiles.count - 1 - i] * hopper_tile, rows);
    release(memory.free(Layout::keys_of(tile)));
  }
  /// Starts copying a run's queries, over those that no warp needs any longer.
  __device__ void copy_queries(unsigned run) const {
    barrier_wait(memory.run_full(mine, run), memory.parity(run));
    const RowRun& next = memory.run(mine, run);
    named_wait(8 + mine, 128);
    if (next.first >= 0) copy_own_rows(memory.queries(mine), next.task.queries, next.query);
  }

  /// Log-sum-exps.
  template <bool biased>
  __device__ __forceinline__ void sum(const RowRun& run, const ThreadRows& rows, Running& running,
                                      const Turns<Layout::groups>& turns) const {
    const int count = run.tiles.count;
    Accumulators s;
    for (int i = 0; i < count; ++i) {
      const unsigned tile = streamed + i;
      await(Layout::keys_of(tile), tile);
      turns.wait();
      start(s, tile);
      turns.pass();
      const bool sees_all = visible(tile);
      await_products<0>();
      pin(s);
      if (i + 1 == count) copy_queries(n + 1);
      hide(s, run, i, rows, sees_all);
      running.template add<biased>(s, rule.factor2, memory.biases(tile), memory.weights(tile), i == 0);
      pin(running.sum);
    }
  }

  /// Outputs. Dots of tile i and the value sums of i - 1 are in flight together; the softmax of i runs under the latter.
  template <bool biased>
  __device__ __forceinline__ void attend(Accumulators& o, const RowRun& run, const ThreadRows& rows,
                                         Running& running) const {
    const int count = run.tiles.count;
    Accumulators s;
    using Sums = LongSums<Element>;
    Sums sums;
    SplitTile<fast> p;
    const auto start_tile = [&](int i) __attribute__((always_inline)) {
      await(Layout::keys_of(streamed + i), streamed + i);
      start(s, streamed + i);
    };
    const auto start_sum = [&](int i) __attribute__((always_inline)) {
      const unsigned buffer = Layout::keys_of(streamed + i) + 1;
      await(buffer, streamed + i);
      start_values<Element>(o, p, memory.tile(buffer));
    };
    const auto weigh = [&](int i, bool sees_all) __attribute__((always_inline)) {
      hide(s, run, i, rows, sees_all);
      if constexpr (biased) add_biases(s, rule.factor2, memory.biases(streamed + i));
      return running.take(s, biased ? 1.f : rule.factor2);
    };
    start_tile(0);
    bool sees_all = visible(streamed);
    await_products<0>();
    pin(s);
    weigh(0, sees_all);
    p.template split<Element>(s);
    for (int i = 1; i < count; ++i) {
      start_tile(i);
      start_sum(i - 1);
      sees_all = visible(streamed + i);
      await_products<1>();
      pin(s);
      const float2 rescale = weigh(i, sees_all);
      await_products<0>();
      pin(o);
      release(memory.free(Layout::keys_of(streamed + i - 1) + 1));
      rescale_rows(o, rescale);
      if (i % Sums::tiles == 0) sums.put(o, run.task, rows, running, run.last);
      p.template split<Element>(s);
    }
    copy_queries(n + 1);
    start_sum(count - 1);
    await_products<0>();
    pin(o);
    release(memory.free(Layout::keys_of(streamed + count - 1) + 1));
    sums.fetch(o, run.task, rows, running, run.last);
  }

  __device__ void work() {
    [[maybe_unused]] const Turns<Layout::groups> turns(mine);
    copy_queries(0);
    for (;; ++n) {
      const RowRun& run = memory.run(mine, n);
      if (run.first < 0) break;
      const int warp = static_cast<int>(threadIdx.x / 32 % 4);
      const ThreadRows rows(run.task, shape.group, run.first + 64 * mine + 16 * warp, run.last);
      Running running;
      Accumulators o;
      if constexpr (valued) set_zero(o);
      publish_copies();
      named_wait(8 + mine, 128);
      if (run.tiles.count == 0) {  // nothing to see but sinks
        copy_queries(n + 1);
      } else if constexpr (valued) {
        run.task.bias ? attend<true>(o, run, rows, running) : attend<false>(o, run, rows, running);
      } else {
        run.task.bias ? sum<true>(run, rows, running, turns) : sum<false>(run, rows, running, turns);
      }
      store_rows(run.task, shape, rows, running, o, run.last, valued);
      streamed += run.tiles.count;
      release(memory.run_free(mine, n));
    }
    turns.end();
  }
};
#endif

/// `fast`: see block_attention.
template <class Element, bool valued, bool fast>
__global__ __launch_bounds__(HopperRows<valued>::threads,
                             1) void hopper_row_kernel(AttentionShape shape, LogitRule rule, const AttentionTask* tasks,
                                                       int count, int ranks) {
#ifdef KV_HOPPER
  using Layout = HopperRows<valued>;
  char* const unaligned = launch_memory<swizzle_bytes>();
  __shared__ uint64_t barriers[Layout::barriers];
  char* const shared = unaligned + (-shared_address(unaligned) & (swizzle_bytes - 1));
  const HopperRowMemory<valued> memory{shared, shared_address(shared), shared_address(barriers)};
  if (threadIdx.x == 0) {
    for (int b = 0; b < Layout::buffers; ++b)
      barrier_init(memory.full(b), 32), barrier_init(memory.free(b), 128 * Layout::groups);
    for (int g = 0; g < Layout::groups; ++g)
      for (int r = 0; r < Layout::known_runs; ++r)
        barrier_init(memory.run_full(g, r), 32), barrier_init(memory.run_free(g, r), 128);
    barriers_ready();
  }
  __syncthreads();

  const int warpgroup = warpgroup_of_warp();
  if (warpgroup == 0) {
    fewer_registers<Layout::copying_registers>();
    RowCopies<valued>{shape, memory, threadIdx.x / 32}.run(tasks, count, ranks);
  } else {
    more_registers<Layout::registers>();
    RowWork<Element, valued, fast>{shape, rule, memory, warpgroup - 1}.work();
  }
#endif
}

}  // namespace kv::blocks
