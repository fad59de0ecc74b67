// Column sums on Hopper: key_dim = 128, 16-bit elements, no softcap. Four warpgroups own 64 slots each and keep their keys;
// four warps copy query tiles past them, each into the one stage that it owns. A block does several heads in turn.
#pragma once
#include "kernels/attention_sight.cuh"
#include "kernels/hopper.cuh"

namespace kv::blocks {

struct HopperColumns {
  static constexpr int groups = 4, slots = 64 * groups, threads = 128 * (groups + 1), stages = 4;
  static constexpr int registers = 104, copying_registers = 64;
  // A query tile is free once its dots are there, what is known of its rows only after the next tile's dots.
  static constexpr int known = 2 * stages;
  static constexpr int tiles = groups * bytes_64, lse = tiles + stages * bytes_128, token = lse + known * 512;
  static constexpr int bytes = token + known * 512 + swizzle_bytes;
};

#ifdef KV_HOPPER
/// A copying warp's work: every tile of the stage that it owns. Rows past the range are zeros.
__device__ inline void copy_query_tiles(const AttentionShape& shape, const AttentionTask& task, const HeadTiles& tiles,
                                        int stage, char* shared, uint32_t full, uint32_t free) {
  using Layout = HopperColumns;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const char* const queries = static_cast<const char*>(task.queries);
  for (int i = stage, turn = 0; i < tiles.count(); i += Layout::stages, ++turn) {
    const int head = tiles.head(i), row = tiles.row(i, hopper_tile);
    int index[4];
    float lse2[4];
    int token[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int r = row + 32 * part + lane, real = min(r, tiles.range.end - 1);
      index[part] = r < tiles.range.end ? task.query_row[real] : -1;
      lse2[part] = task.lse[static_cast<long>(real) * shape.group + head] * log2_e;
      token[part] = task.query_token[real];
    }
    if (turn > 0) barrier_wait(free, (turn - 1) & 1);
    copy_rows(shared_address(shared) + Layout::tiles + stage * bytes_128, queries + head * task.query_stride * 256,
              index);
    float* const lse_tile = reinterpret_cast<float*>(shared + Layout::lse) + i % Layout::known * hopper_tile;
    int* const token_tile = reinterpret_cast<int*>(shared + Layout::token) + i % Layout::known * hopper_tile;
#pragma unroll
    for (int part = 0; part < 4; ++part)
      lse_tile[32 * part + lane] = lse2[part], token_tile[32 * part + lane] = token[part];
    publish_copies();
    barrier_arrive(full);
  }
}

/// A thread's two slots.
struct ColumnSums {
  int token[2];
  float bias2[2], sum[2] = {0, 0};

  /// Adds a tile of 128 rows, of which the first `real` count; `after` rows of the task come after its first one.
  template <class Weigh, bool biased, bool masked>
  __device__ __forceinline__ void add(const Accumulators& s, const LogitRule& rule, const AttentionTask& task,
                                      const float* lse2, const int* row_token, int real, int after) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    float added[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      const int column = 8 * n + 2 * (lane % 4);
      const float2 lse = *reinterpret_cast<const float2*>(lse2 + column);
      [[maybe_unused]] RowSight sight[2];
      if constexpr (masked) {
        const int2 tokens = *reinterpret_cast<const int2*>(row_token + column);
        sight[0] = sight_of(task, tokens.x), sight[1] = sight_of(task, tokens.y);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = e / 2;
        float offset = -(e % 2 ? lse.y : lse.x);
        if constexpr (biased) offset += bias2[r];
        const float p = exp2_fast(__fmaf_rn(s[n][e], rule.factor2, offset));
        const float weighed = Weigh::weigh(p, s[n][e] * rule.factor, after - column - e % 2);
        if constexpr (masked)
          added[r] += (column + e % 2 < real) & sight[e % 2].sees(token[r]) ? weighed : 0.f;
        else
          added[r] += weighed;
      }
    }
    sum[0] += added[0], sum[1] += added[1];
  }
};
#endif

template <class Weigh, class Element>
__global__ __launch_bounds__(HopperColumns::threads, 1) void hopper_column_kernel(AttentionShape shape, LogitRule rule,
                                                                                  const AttentionTask* tasks, int count,
                                                                                  int ranks, int heads) {
#ifdef KV_HOPPER
  using Layout = HopperColumns;
  char* const unaligned = launch_memory();
  __shared__ uint64_t barriers[2 * Layout::stages];
  const WorkItem work = work_item(count, ranks);
  if (work.task >= count) return;
  const AttentionTask task = tasks[work.task];
  const int group = shape.group, parts = (group + heads - 1) / heads;
  const int first = work.rank / parts * Layout::slots, first_head = work.rank % parts * heads;
  if (first >= task.slots) return;
  const HeadTiles tiles =
      head_tiles(task, first, Layout::slots, first_head, min(heads, group - first_head), hopper_tile);

  char* const shared = unaligned + (-shared_address(unaligned) & (swizzle_bytes - 1));
  const uint32_t base = shared_address(shared), full = shared_address(barriers), free = full + 8 * Layout::stages;
  if (threadIdx.x == 0) {
    for (int b = 0; b < Layout::stages; ++b)
      barrier_init(full + 8 * b, 32), barrier_init(free + 8 * b, 4 * Layout::groups);
    barriers_ready();
  }
  __syncthreads();

  const int warpgroup = static_cast<int>(threadIdx.x / 128);
  if (warpgroup == 0) {
    fewer_registers<Layout::copying_registers>();
    const int stage = static_cast<int>(threadIdx.x / 32);
    copy_query_tiles(shape, task, tiles, stage, shared, full + 8 * stage, free + 8 * stage);
    return;
  }
  more_registers<Layout::registers>();
  const int mine = warpgroup - 1, lane = static_cast<int>(threadIdx.x % 32), next = (mine + 1) % Layout::groups;
  const uint32_t keys = base + mine * bytes_64;
  copy_own_rows(keys, task.keys, [&](int r) -> const char* {
    const int slot = first + 64 * mine + r;
    return slot < task.slots ? static_cast<const char*>(task.keys) + static_cast<long>(slot) * 256 : nullptr;
  });
  const int last_slot = task.slots - 1, warp_first = first + static_cast<int>(threadIdx.x / 32 - 4) * 16;
  const int oldest_key = task.token[min(warp_first, last_slot)],
            newest_key = task.token[min(warp_first + 15, last_slot)];
  ColumnSums sums;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int slot = min(warp_first + lane / 4 + 8 * r, last_slot);
    sums.token[r] = task.token[slot];
    sums.bias2[r] = task.bias ? task.bias[slot] * log2_e : 0.f;
  }
  publish_copies();
  named_wait(8 + mine, 128);

  Accumulators s;
  if (next == 0) named_arrive(1, 256);
  for (int h = 0; h < tiles.heads; ++h) {
    for (int t = 0; t < tiles.tiles; ++t) {
      const int i = h * tiles.tiles + t, stage = i % Layout::stages, row = tiles.row(t, hopper_tile);
      barrier_wait(full + 8 * stage, i / Layout::stages & 1);
      named_wait(1 + mine, 256);  // the warpgroups start their dots one after another
      start_dots<Element>(s, keys, base + Layout::tiles + stage * bytes_128);
      named_arrive(1 + next, 256);
      await_products<0>();
      pin(s);
      release(free + 8 * stage);
      const float* const lse2 = reinterpret_cast<const float*>(shared + Layout::lse) + i % Layout::known * hopper_tile;
      const int* const row_token =
          reinterpret_cast<const int*>(shared + Layout::token) + i % Layout::known * hopper_tile;
      const int real = tiles.range.end - row, after = task.rows - 1 - row;
      const bool plain = real >= hopper_tile && all_visible(task, warp_first, 16, oldest_key, newest_key, row_token[0],
                                                            row_token[hopper_tile - 1]);
      if (!plain)
        sums.add<Weigh, true, true>(s, rule, task, lse2, row_token, real, after);
      else if (task.bias)
        sums.add<Weigh, true, false>(s, rule, task, lse2, row_token, real, after);
      else
        sums.add<Weigh, false, false>(s, rule, task, lse2, row_token, real, after);
      asm volatile("" : "+f"(sums.sum[0]), "+f"(sums.sum[1])::"memory");  // the work stays before the next wait
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = sums.sum[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int slot = warp_first + lane / 4 + 8 * r;
      if (lane % 4 == 0 && slot < task.slots) task.sums[static_cast<long>(slot) * group + first_head + h] = sum;
      sums.sum[r] = 0;
    }
  }
  if (mine == 0) named_wait(1, 256);
#endif
}

}  // namespace kv::blocks
