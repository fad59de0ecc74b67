// Attention over rows on Hopper: key_dim = value_dim = 128, 16-bit elements, no softcap. Four warps copy, each into the one
// stage that it owns; the warpgroups compute. Two kernels take turns at a launch's tasks: one for those with an output,
// one, with twice the warpgroups, for those that want the log-sum-exp alone.
#pragma once
#include "kernels/hopper.cuh"
#include "kernels/row_attention.cuh"

namespace kv::blocks {

template <bool valued>
struct HopperRows {
  static constexpr int groups = valued ? 2 : 4, pairs = 64 * groups, threads = 128 * (groups + 1);
  static constexpr int registers = valued ? 232 : 104, copying_registers = valued ? 40 : 64;
  // Buffers of 128 rows: with values, keys and values of two stages (K V K V), else keys of four.
  static constexpr int buffers = 4, stages = valued ? 2 : 4;
  static constexpr int tiles = groups * bytes_64, token = tiles + buffers * bytes_128, bias = token + stages * 512;
  static constexpr int bytes = bias + stages * 512 + swizzle_bytes;

  /// The buffer of the i-th tile's keys; its values are in the next one.
  static __device__ int keys_of(int i) { return valued ? i % 2 * 2 : i % 4; }
};

#ifdef KV_HOPPER
/// A copying warp's work: every tile whose buffer it owns.
template <class Layout, bool valued>
__device__ void copy_row_tiles(const AttentionTask& task, const SlotTiles& tiles, int buffer, uint32_t base,
                               uint32_t full, uint32_t free) {
  const int stage = valued ? buffer / 2 : buffer, lane = static_cast<int>(threadIdx.x % 32);
  const bool keys = !valued || buffer % 2 == 0;
  const char* const rows = static_cast<const char*>(keys ? task.keys : task.values);
  for (int i = stage, turn = 0; i < tiles.count; i += Layout::stages, ++turn) {
    const int slot = tiles[tiles.count - 1 - i] * hopper_tile;
    if (turn > 0) barrier_wait(free, (turn - 1) & 1);
    copy_tile(base + Layout::tiles + buffer * bytes_128, rows + static_cast<long>(slot) * 256, task.slots - slot);
    if (keys)
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int column = 32 * part + lane, at = min(slot + column, task.slots - 1);
        copy_4(base + Layout::token + stage * 512 + column * 4, task.token + at, true);
        if (task.bias) copy_4(base + Layout::bias + stage * 512 + column * 4, task.bias + at, true);
      }
    publish_copies();
    barrier_arrive(full);
  }
}
#endif

#ifdef KV_HOPPER
/// Tensor cores cut off where they add, always towards 0: over 16k slots a sum loses 5e-5 of itself. So it goes to the task's
/// output now and then and starts again from 0; what lies there is relative to `base`. A thread's two rows.
struct LongSums {
  static constexpr int tiles = 16;
  float base[2];
  bool began = false;

  /// o += what lies there.
  __device__ void fetch(Accumulators& o, const AttentionTask& task, const ThreadRows& rows, const RunningRows& running,
                        int last) const {
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
  __device__ void put(Accumulators& o, const AttentionTask& task, const ThreadRows& rows, const RunningRows& running,
                      int last) {
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

/// `fast`: see block_attention.
template <class Element, bool valued, bool fast>
__global__ __launch_bounds__(HopperRows<valued>::threads,
                             1) void hopper_row_kernel(AttentionShape shape, LogitRule rule, const AttentionTask* tasks,
                                                       int count, int ranks) {
#ifdef KV_HOPPER
  using Layout = HopperRows<valued>;
  constexpr float shift = Words<Element>::shift;
  char* const unaligned = launch_memory<swizzle_bytes>();
  __shared__ uint64_t barriers[2 * Layout::buffers];

  const WorkItem work = work_item(count, ranks);
  if (work.task >= count) return;
  const AttentionTask task = tasks[work.task];
  if ((task.output != nullptr) != valued) return;
  const int group = shape.group, pairs = task.rows * group;
  const int first = ((pairs + Layout::pairs - 1) / Layout::pairs - 1 - work.rank) * Layout::pairs;
  if (first < 0) return;
  const int last = min(first + Layout::pairs, pairs) - 1;
  SlotTiles tiles{};
  if (task.slots > 0) tiles = visible_tiles(task, first / group, last / group, hopper_tile);

  if (tiles.count == 0) {  // nothing to see but sinks
    for (int pair = first + static_cast<int>(threadIdx.x); pair <= last; pair += Layout::threads) {
      task.lse[pair] = finish_row(task, pair % group, -INFINITY, 0.f, shift).lse;
      for (int d = 0; valued && d < hopper_dim; ++d) task.output[static_cast<long>(pair) * hopper_dim + d] = 0;
    }
    return;
  }

  const char* const shared = unaligned + (-shared_address(unaligned) & (swizzle_bytes - 1));
  const uint32_t base = shared_address(shared), full = shared_address(barriers), free = full + 8 * Layout::buffers;
  if (threadIdx.x == 0) {
    for (int b = 0; b < Layout::buffers; ++b)
      barrier_init(full + 8 * b, 32), barrier_init(free + 8 * b, 4 * Layout::groups);
    barriers_ready();
  }
  __syncthreads();

  const int warpgroup = warpgroup_of_warp();
  if (warpgroup == 0) {
    fewer_registers<Layout::copying_registers>();
    const int buffer = static_cast<int>(threadIdx.x / 32);
    copy_row_tiles<Layout, valued>(task, tiles, buffer, base, full + 8 * buffer, free + 8 * buffer);
  } else {
    more_registers<Layout::registers>();
    const int mine = warpgroup - 1;
    const int warp_first = first + static_cast<int>(threadIdx.x / 32 - 4) * 16;
    const uint32_t queries = base + mine * bytes_64;
    copy_own_rows(queries, task.queries, [&](int r) {
      const int pair = min(first + mine * 64 + r, last);
      return query_at(task, pair / group, pair % group, shape);
    });
    const ThreadRows rows(task, group, warp_first, last);
    publish_copies();
    named_wait(8 + mine, 128);

    Accumulators s;
    RunningRows running;
    const auto start = [&](int i) __attribute__((always_inline)) {
      const int buffer = Layout::keys_of(i);
      barrier_wait(full + 8 * buffer, i / Layout::stages & 1);
      start_dots<Element>(s, queries, base + Layout::tiles + buffer * bytes_128);
    };
    // Dots of the i-th tile become probabilities; keys and what is known of the slots are read for the last time.
    const auto weigh = [&](int i) __attribute__((always_inline)) {
      const int stage = i % Layout::stages, slot = tiles[tiles.count - 1 - i] * hopper_tile;
      const int* const token = reinterpret_cast<const int*>(shared + Layout::token) + stage * hopper_tile;
      const float* const bias = reinterpret_cast<const float*>(shared + Layout::bias) + stage * hopper_tile;
      const float factor2 = finish_logits<false>(s, rule, task, slot, token, bias, rows);
      release(free + 8 * Layout::keys_of(i));
      return running.take(s, factor2, shift);
    };

    Accumulators o;
    if constexpr (valued) {
      set_zero(o);
      LongSums sums;
      SplitTile<fast> p;
      const auto start_sum = [&](int i) __attribute__((always_inline)) {
        const int buffer = Layout::keys_of(i) + 1;
        barrier_wait(full + 8 * buffer, i / 2 & 1);
        start_values<Element>(o, p, base + Layout::tiles + buffer * bytes_128);
      };
      start(0);
      await_products<0>();
      pin(s);
      weigh(0);
      p.template split<Element>(s);
      // Dots of tile i and the value sums of i - 1 are in flight together; the softmax of i runs under the latter.
      for (int i = 1; i < tiles.count; ++i) {
        start(i);
        start_sum(i - 1);
        await_products<1>();
        pin(s);
        const float2 rescale = weigh(i);
        await_products<0>();
        pin(o);
        release(free + 8 * (Layout::keys_of(i - 1) + 1));
        rescale_rows(o, rescale);
        if (i % LongSums::tiles == 0) sums.put(o, task, rows, running, last);
        p.template split<Element>(s);
      }
      start_sum(tiles.count - 1);
      await_products<0>();
      pin(o);
      sums.fetch(o, task, rows, running, last);
    } else {
      // The warpgroups start their dots one after another, so that one's softmax runs under the others' dots.
      const int next = (mine + 1) % Layout::groups;
      if (next == 0) named_arrive(1, 256);
      for (int i = 0; i < tiles.count; ++i) {
        named_wait(1 + mine, 256);
        start(i);
        named_arrive(1 + next, 256);
        await_products<0>();
        pin(s);
        weigh(i);
        pin(running.sum);
      }
      if (mine == 0) named_wait(1, 256);
    }

    store_rows(task, shape, rows, running, o, last, shift, valued);
  }
#endif
}

}  // namespace kv::blocks
