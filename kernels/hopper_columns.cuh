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
/// The query tiles that stream past some slots: rows of one head after the other, or, of windows of few rows, `paired` heads:
/// one in the upper half of a tile, the next in the lower.
struct QueryTiles {
  static constexpr int half = hopper_tile / 2;
  RowRange range;
  int first_head, heads;
  bool paired;

  __device__ QueryTiles(const AttentionTask& task, int first_slot, int first, int count)
      : range{0, 0}, first_head(first), heads(count) {
    if (task.rows > 0) range = rows_that_see(task, first_slot, HopperColumns::slots);
    paired = heads > 1 && range.end - range.begin <= half;
  }
  __device__ int of_head() const { return (range.end - range.begin + hopper_tile - 1) / hopper_tile; }
  __device__ int count() const { return paired ? (heads + 1) / 2 * of_head() : heads * of_head(); }
  /// Of the i-th tile's upper half; from 0. An odd number of heads has no lower half in the last tile.
  __device__ int head(int i) const { return paired ? 2 * i : i / of_head(); }
  __device__ bool has_lower(int i) const { return !paired || head(i) + 1 < heads; }
  __device__ int row(int i) const { return range.begin + (paired ? 0 : i % of_head() * hopper_tile); }
  /// How far the lower half's rows are behind what follows the upper one's.
  __device__ int back() const { return paired ? half : 0; }
};

/// A copying warp's work: every tile of the stage that it owns. Rows past the range are zeros.
__device__ inline void copy_query_tiles(const AttentionShape& shape, const AttentionTask& task, const QueryTiles& tiles,
                                        int stage, char* shared, uint32_t full, uint32_t free) {
  using Layout = HopperColumns;
  const int lane = static_cast<int>(threadIdx.x % 32), count = tiles.count();
  for (int i = stage, turn = 0; i < count; i += Layout::stages, ++turn) {
    int index[4];
    float lse2[4];
    int token[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const bool lower = tiles.paired && part >= 2, there = !lower || tiles.has_lower(i);
      const int head = tiles.first_head + tiles.head(i) + (lower && there ? 1 : 0);
      const int r = tiles.row(i) + 32 * part + lane - (lower ? tiles.back() : 0), real = min(r, tiles.range.end - 1);
      index[part] =
          r < tiles.range.end && there ? static_cast<int>(head * task.query_stride) + task.query_row[real] : -1;
      lse2[part] = task.lse[static_cast<long>(real) * shape.group + head] * log2_e;
      token[part] = task.query_token[real];
    }
    if (turn > 0) barrier_wait(free, (turn - 1) & 1);
    copy_rows(shared_address(shared) + Layout::tiles + stage * bytes_128, task.queries, index);
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

  /// What the halves of a tile of 128 rows add: `real` rows of it count, in the lower half `real_lower`; `after` rows of the
  /// task come after its first one.
  template <class Weigh, bool biased, bool masked>
  __device__ __forceinline__ void add(float (&added)[2][2], const Accumulators& s, const LogitRule& rule,
                                      const AttentionTask& task, const float* lse2, const int* row_token, int real,
                                      int real_lower, int after, int back) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      const int at = 8 * n + 2 * (lane % 4), column = n < 8 ? at : at - back;
      const float2 lse = *reinterpret_cast<const float2*>(lse2 + at);
      [[maybe_unused]] RowSight sight[2];
      if constexpr (masked) {
        const int2 tokens = *reinterpret_cast<const int2*>(row_token + at);
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
          added[n / 8][r] +=
              (column + e % 2 < (n < 8 ? real : real_lower)) & sight[e % 2].sees(token[r]) ? weighed : 0.f;
        else
          added[n / 8][r] += weighed;
      }
    }
  }

  /// Writes a head's sums.
  __device__ __forceinline__ void store(const float (&sums)[2], const AttentionTask& task, int group, int warp_first,
                                        int head) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float all = sums[r];
      all += __shfl_xor_sync(~0u, all, 1);
      all += __shfl_xor_sync(~0u, all, 2);
      const int slot = warp_first + lane / 4 + 8 * r;
      if (lane % 4 == 0 && slot < task.slots) task.sums[static_cast<long>(slot) * group + head] = all;
    }
  }
};
#endif

template <class Weigh, class Element>
__global__ __launch_bounds__(HopperColumns::threads, 1) void hopper_column_kernel(AttentionShape shape, LogitRule rule,
                                                                                  const AttentionTask* tasks, int count,
                                                                                  int ranks, int heads) {
#ifdef KV_HOPPER
  using Layout = HopperColumns;
  char* const unaligned = launch_memory<swizzle_bytes>();
  __shared__ uint64_t barriers[2 * Layout::stages];
  const WorkItem work = work_item(count, ranks);
  if (work.task >= count) return;
  const AttentionTask task = tasks[work.task];
  const int group = shape.group, parts = (group + heads - 1) / heads;
  const int first = work.rank / parts * Layout::slots, first_head = work.rank % parts * heads;
  if (first >= task.slots) return;
  const QueryTiles tiles(task, first, first_head, min(heads, group - first_head));

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
  const int tile_count = tiles.count(), back = tiles.back();
  for (int i = 0; i < tile_count; ++i) {
    const int stage = i % Layout::stages, row = tiles.row(i);
    barrier_wait(full + 8 * stage, i / Layout::stages & 1);
    named_wait(1 + mine, 256);  // the warpgroups start their dots one after another
    start_dots<Element>(s, keys, base + Layout::tiles + stage * bytes_128);
    named_arrive(1 + next, 256);
    await_products<0>();
    pin(s);
    release(free + 8 * stage);
    const float* const lse2 = reinterpret_cast<const float*>(shared + Layout::lse) + i % Layout::known * hopper_tile;
    const int* const row_token = reinterpret_cast<const int*>(shared + Layout::token) + i % Layout::known * hopper_tile;
    const int real = tiles.range.end - row, real_lower = tiles.has_lower(i) ? real : 0, after = task.rows - 1 - row;
    const bool plain = real_lower >= hopper_tile - back && all_visible(task, warp_first, 16, oldest_key, newest_key,
                                                                       row_token[0], row_token[hopper_tile - 1]);
    float added[2][2] = {};
    if (!plain)
      sums.add<Weigh, true, true>(added, s, rule, task, lse2, row_token, real, real_lower, after, back);
    else if (task.bias)
      sums.add<Weigh, true, false>(added, s, rule, task, lse2, row_token, real, real_lower, after, back);
    else
      sums.add<Weigh, false, false>(added, s, rule, task, lse2, row_token, real, real_lower, after, back);
    if (tiles.paired) {
      sums.store(added[0], task, group, warp_first, first_head + tiles.head(i));
      if (tiles.has_lower(i)) sums.store(added[1], task, group, warp_first, first_head + tiles.head(i) + 1);
      continue;
    }
    sums.sum[0] += added[0][0] + added[1][0], sums.sum[1] += added[0][1] + added[1][1];
    pin(sums.sum);
    if (row + hopper_tile < tiles.range.end) continue;
    sums.store(sums.sum, task, group, warp_first, first_head + tiles.head(i));
    sums.sum[0] = sums.sum[1] = 0;
  }
  if (tile_count == 0)  // nobody sees these slots
    for (int h = 0; h < tiles.heads; ++h) sums.store(sums.sum, task, group, warp_first, first_head + h);
  if (mine == 0) named_wait(1, 256);
#endif
}

}  // namespace kv::blocks
