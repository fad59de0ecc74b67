// The general tensor core kernel over columns: per slot and head, a sum over the rows that see it. 16-bit elements, a key
// dim that is a multiple of 8 up to 256. Slots are the rows of the accumulators, so each sum has one owner and a fixed
// order. Queries stream past one tile of slots, or, where all of them fit in shared memory, a run of slot tiles streams
// past the queries: what an observation window of a few rows needs.
#pragma once
#include <algorithm>
#include <type_traits>

#include "kernels/attention_sight.cuh"
#include "kernels/launch.cuh"
#include "kernels/tensor_tiles.cuh"

namespace kv::blocks {

constexpr int column_threads = 128, column_tile = 64;

/// How the blocks of a launch share it: each does `heads` heads and `slot_tiles` tiles of slots with `buffers` tiles of
/// queries. With several tiles of slots all queries stay in their buffers, and keys have two.
struct ColumnPlan {
  int heads, slot_tiles, buffers;
  __host__ __device__ bool resident() const { return slot_tiles > 1; }
};

/// Shared memory of a block, D = padded dim: keys, queries, log-sum-exps and tokens of the queries' rows.
template <int D>
struct ColumnLayout {
  static constexpr int rows = D > 128 ? 32 : 64;  // of a tile of queries
  static constexpr int keys_tile = column_tile * D * 2, tile = rows * D * 2;
  int queries, lse, token, bytes;

  __host__ __device__ explicit ColumnLayout(const ColumnPlan& plan)
      : queries(plan.resident() ? 2 * keys_tile : keys_tile),
        lse(queries + plan.buffers * tile),
        token(lse + plan.buffers * rows * 4),
        bytes(token + plan.buffers * rows * 4) {}
};

template <int D>
ColumnPlan column_plan(const AttentionShape& shape, const AttentionBounds& bounds, int multiprocessors) {
  constexpr int most_bytes = 99 * 1024, most_buffers = 16;  // what a block can have on every GPU since sm_80
  const int tiles = bounds.tasks * ((bounds.slots + column_tile - 1) / column_tile);
  const int heads = heads_together(tiles, shape.group, multiprocessors);
  const int run = std::clamp(tiles / (8 * multiprocessors), 1, 16);
  const long listed = long{heads} * ((bounds.rows + 7) / 8 * 8);
  const long needed = (listed + ColumnLayout<D>::rows - 1) / ColumnLayout<D>::rows;
  if (run > 1 && needed <= most_buffers) {
    const ColumnPlan plan{heads, run, static_cast<int>(needed)};
    if (ColumnLayout<D>(plan).bytes <= most_bytes) return plan;
  }
  return {heads, 1, 2};
}

struct HeadRow {
  int head, row;
};

/// The queries of some heads as one list: each head's rows of a range, padded to a multiple of 8.
struct HeadRows {
  RowRange range;
  int first_head, heads, padded;

  __device__ int count() const { return heads * padded; }
  __device__ HeadRow at(int i) const { return {first_head + i / padded, range.begin + i % padded}; }
  __device__ HeadRow after(HeadRow from, int steps) const {
    from.row += steps;
    while (from.row >= range.begin + padded) from.row -= padded, ++from.head;
    return from;
  }
  /// Neither padding nor past the end.
  __device__ bool has(HeadRow place) const { return place.head < first_head + heads && place.row < range.end; }
};

/// What a block works on.
struct ColumnWork {
  const AttentionShape& shape;
  const LogitRule& rule;
  const AttentionTask& task;
  const ColumnPlan& plan;
  HeadRows rows;
  int first;  // slot

  __device__ int buffer_of(int t) const { return plan.resident() ? t : t % 2; }
};

/// Starts copying what step (slot tile st, query tile t) needs and no step before it brought.
template <int D>
__device__ void load_column_step(const ColumnWork& work, const ColumnLayout<D>& layout, uint32_t base, int st, int t) {
  using Layout = ColumnLayout<D>;
  const AttentionTask& task = work.task;
  const HeadRows& rows = work.rows;
  const int thread = static_cast<int>(threadIdx.x), dim = work.shape.key_dim;
  if (t == 0) {
    const int slot = work.first + st * column_tile;
    load_rows<D, column_threads>(base + st % 2 * Layout::keys_tile, column_tile, dim, task.keys,
                                 [&](int r) -> const void* {
                                   if (slot + r >= task.slots) return nullptr;
                                   return static_cast<const char*>(task.keys) + static_cast<long>(slot + r) * dim * 2;
                                 });
  }
  if (st == 0) {
    const int buffer = work.buffer_of(t);
    const HeadRow from = rows.at(t * Layout::rows);
    load_rows<D, column_threads>(base + layout.queries + buffer * Layout::tile, Layout::rows, dim, task.queries,
                                 [&](int r) -> const void* {
                                   const HeadRow place = rows.after(from, r);
                                   return rows.has(place) ? query_at(task, place.row, place.head, work.shape) : nullptr;
                                 });
    if (thread < Layout::rows) {
      const HeadRow place = rows.after(from, thread);
      const bool real = rows.has(place);
      const long pair = real ? static_cast<long>(place.row) * work.shape.group + place.head : 0;
      const int to = 4 * (buffer * Layout::rows + thread);
      copy_4(base + layout.lse + to, task.lse + pair, real);
      copy_4(base + layout.token + to, task.query_token + (real ? place.row : 0), real);
    }
  }
  close_copies();
}

/// A thread's two slots, and where in the list of queries it is.
struct ColumnCursor {
  HeadRow place;
  int slot[2], token[2];
  float bias2[2], sum[2] = {0, 0};

  __device__ ColumnCursor(const ColumnWork& work, int warp_first) : place{work.rows.first_head, work.rows.range.begin} {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      slot[r] = warp_first + static_cast<int>(threadIdx.x % 32) / 4 + 8 * r;
      const int real = min(slot[r], work.task.slots - 1);
      token[r] = work.task.token[real];
      bias2[r] = work.task.bias ? work.task.bias[real] * log2_e : 0.f;
    }
  }

  /// Writes the present head's sums.
  __device__ __forceinline__ void finish(const ColumnWork& work) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
      if (threadIdx.x % 4 == 0 && slot[r] < work.task.slots)
        work.task.sums[static_cast<long>(slot[r]) * work.shape.group + place.head] = sum[r];
      sum[r] = 0;
    }
  }

  __device__ __forceinline__ void advance(const ColumnWork& work, int steps) {
    place.row += steps;
    if (place.row - work.rows.range.begin < work.rows.padded) return;
    finish(work);
    place = {place.head + 1, work.rows.range.begin};
  }

  /// Adds a tile of 8N rows; `lse` and `row_token` are the thread's first column's.
  template <class Weigh, bool masked, bool many_heads, int N>
  __device__ __forceinline__ void add(const ColumnWork& work, const float (&s)[N][4], const float* lse,
                                      const int* row_token) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (many_heads && place.head == work.rows.first_head + work.rows.heads) break;  // the rest of the last tile
      float added[2] = {0, 0};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = e / 2, column = 8 * n + e % 2;
        const int row = place.row + (many_heads ? e % 2 : column) + 2 * (lane % 4);
        const float p = exp2_fast(__fmaf_rn(s[n][e], work.rule.factor2, bias2[r] - lse[column] * log2_e));
        const float weighed = Weigh::weigh(p, s[n][e] * work.rule.factor, work.task.rows - 1 - row);
        if constexpr (masked)
          added[r] +=
              (row < work.rows.range.end) & sight_of(work.task, row_token[column]).sees(token[r]) ? weighed : 0.f;
        else
          added[r] += weighed;
      }
      sum[0] += added[0], sum[1] += added[1];
      if (many_heads) advance(work, 8);
    }
    if (!many_heads) advance(work, 8 * N);
  }
};

template <class Weigh, class Element, int D>
__global__ __launch_bounds__(column_threads, 4) void column_kernel(AttentionShape shape, LogitRule rule,
                                                                   const AttentionTask* tasks, int count, int ranks,
                                                                   ColumnPlan plan) {
  using Layout = ColumnLayout<D>;
  constexpr int tile_rows = Layout::rows, N = tile_rows / 8;
  char* const shared = launch_memory();
  const Layout layout(plan);
  const WorkItem item = work_item(count, ranks);
  if (item.task >= count) return;
  const AttentionTask task = tasks[item.task];
  const int group = shape.group, parts = (group + plan.heads - 1) / plan.heads, run = plan.slot_tiles * column_tile;
  const int first_head = item.rank % parts * plan.heads, first = item.rank / parts * run;
  if (first >= task.slots) return;
  RowRange range{0, 0};
  if (task.rows > 0) range = rows_that_see(task, first, run);
  range.begin = range.begin / 8 * 8;  // a row meets the same lane whatever slots go along: the same bits in any launch
  const int padded = (range.end - range.begin + 7) / 8 * 8;
  const ColumnWork work{shape, rule, task, plan, {range, first_head, min(plan.heads, group - first_head), padded},
                        first};
  const int tiles = (work.rows.count() + tile_rows - 1) / tile_rows;
  const int slot_tiles = (min(run, task.slots - first) + column_tile - 1) / column_tile;

  const uint32_t base = shared_address(shared);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int first_token = tiles > 0 ? task.query_token[range.begin] : 0;
  const int last_token = tiles > 0 ? task.query_token[range.end - 1] : 0;
  if (tiles > 0) load_column_step<D>(work, layout, base, 0, 0);
  for (int st = 0; st < slot_tiles; ++st) {
    const int warp_first = first + st * column_tile + warp * 16, last_slot = task.slots - 1;
    const int oldest_key = task.token[min(warp_first, last_slot)];
    const int newest_key = task.token[min(warp_first + 15, last_slot)];
    ColumnCursor cursor(work, warp_first);
    if (tiles == 0)
      for (int h = 0; h < work.rows.heads; ++h) cursor.finish(work), ++cursor.place.head;

    for (int t = 0; t < tiles; ++t) {
      const bool last_tile = t + 1 == tiles;
      if (!last_tile || st + 1 < slot_tiles) {
        load_column_step<D>(work, layout, base, last_tile ? st + 1 : st, last_tile ? 0 : t + 1);
        await_copies<1>();
      } else {
        await_copies<0>();
      }
      __syncthreads();
      float s[N][4];
      const int buffer = work.buffer_of(t);
      dot_tile<Element, D>(s, base + st % 2 * Layout::keys_tile, warp * 16,
                           base + layout.queries + buffer * Layout::tile, shape.key_dim);
      if (rule.capped) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[n][e] = rule.bend(s[n][e]);
      }
      const float* const lse = reinterpret_cast<const float*>(shared + layout.lse) + buffer * tile_rows;
      const int* const row_token = reinterpret_cast<const int*>(shared + layout.token) + buffer * tile_rows;
      const bool one_head = cursor.place.row + tile_rows <= range.end, no_padding = padded == range.end - range.begin;
      const bool plain = (one_head || no_padding) && all_visible(task, warp_first, 16, oldest_key, newest_key,
                                                                 one_head ? row_token[0] : first_token,
                                                                 one_head ? row_token[tile_rows - 1] : last_token);
      const float* const my_lse = lse + 2 * (lane % 4);
      const int* const my_token = row_token + 2 * (lane % 4);
      if (plain && one_head)
        cursor.add<Weigh, false, false>(work, s, my_lse, my_token);
      else if (plain)
        cursor.add<Weigh, false, true>(work, s, my_lse, my_token);
      else if (one_head)
        cursor.add<Weigh, true, false>(work, s, my_lse, my_token);
      else
        cursor.add<Weigh, true, true>(work, s, my_lse, my_token);
      __syncthreads();
    }
  }
}

}  // namespace kv::blocks
