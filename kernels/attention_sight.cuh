// Which rows see which slots, in which order blocks of threads take the work, and how a dot product becomes a logit: what
// every attention kernel shares.
#pragma once
#include <climits>

#include "kernels/block_attention.hpp"
#include "kernels/tensor_words.cuh"

namespace kv::blocks {

/// logit = bend(q.k) * factor, with bend(x) = tanh(x * inner) under a softcap and x without. `factor2` gives it in units
/// of log 2, as exp2 wants it.
struct LogitRule {
  float inner, factor, factor2;
  bool capped;

  __device__ float bend(float dot) const { return capped ? tanhf(dot * inner) : dot; }
};

inline LogitRule logit_rule(const AttentionShape& shape) {
  const bool capped = shape.softcap > 0;
  const float factor = capped ? shape.softcap : shape.scale;
  return {capped ? shape.scale / shape.softcap : 1.f, factor, factor * log2_e, capped};
}

__device__ inline const AttentionTask& attention_of(const AttentionTask& task) { return task; }
__device__ inline const AttentionTask& attention_of(const LostMassTask& task) { return task.attention; }

/// Work of a launch: `ranks` pieces of each task, the longest first. `work_group` tasks run side by side, so that the keys
/// and values which their pieces share stay in the L2 cache. `task` may be past the last.
struct WorkItem {
  int task, rank;
};
constexpr int work_group = 8;

__host__ __device__ inline unsigned work_blocks(int tasks, int ranks) {
  const int together = tasks < work_group ? tasks : work_group;
  return static_cast<unsigned>((tasks + together - 1) / together * together) * static_cast<unsigned>(ranks);
}

__device__ inline WorkItem work_item(int tasks, int ranks, int block) {
  const int together = min(tasks, work_group), chunk = together * ranks, rest = block % chunk;
  return {block / chunk * together + rest % together, rest / together};
}
/// The k-th piece of a block, where blocks that stay resident go through all pieces, the longest first: in turns to and fro.
__device__ inline int piece_of_turn(int k) {
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  return k % 2 == 0 ? k * blocks + block : (k + 1) * blocks - 1 - block;
}
/// Of a block that does one piece.
__device__ inline WorkItem work_item(int tasks, int ranks) {
  return work_item(tasks, ranks, static_cast<int>(blockIdx.x));
}

/// The first index in [begin, end) of ascending `values` that is above `bound`; `end` if none is. Quick when it is the
/// `guess`. For whole warps.
__device__ inline int first_above(const int* values, int begin, int end, int bound, int guess) {
  if (guess >= begin && guess <= end) {
    const bool before = guess == begin || values[guess - 1] <= bound, above = guess == end || values[guess] > bound;
    if (before && above) return guess;
  }
  const int lane = static_cast<int>(threadIdx.x % 32);
  while (begin < end) {  // every lane looks at the last value of its share
    const int share = (end - begin + 31) / 32, mine = begin + (lane + 1) * share - 1;
    const unsigned above = __ballot_sync(~0u, mine >= end || values[mine] > bound);
    if (above == 0) return end;
    begin += (__ffs(static_cast<int>(above)) - 1) * share;
    end = min(end, begin + share - 1);
  }
  return begin;
}

/// The slot tiles that some row of a range may see: all that touch [0, older), then those that touch a run of later slots.
struct SlotTiles {
  int older, skipped, count;
  __device__ int operator[](int i) const { return i < older ? i : i + skipped; }
};

/// For rows first..last of a task with at least one row and one slot. For whole warps. The guesses here are exact when
/// every row's token is among the slots, the last row's last.
__device__ inline SlotTiles visible_tiles(const AttentionTask& task, int first, int last, int tile) {
  const int newest = min(task.query_token[last], task.newest_key);
  const int end = first_above(task.token, task.older, task.slots, newest, task.slots - (task.rows - 1 - last));
  int begin = task.older;
  if (task.window > 0) begin = first_above(task.token, task.older, end, task.query_token[first] - task.window, -1);
  const int older = (task.older + tile - 1) / tile;
  const int first_tile = max(older, begin / tile), end_tile = begin < end ? (end + tile - 1) / tile : 0;
  return {older, first_tile - older, older + max(0, end_tile - first_tile)};
}

/// The rows that may see some slot of a range.
struct RowRange {
  int begin, end;
};

/// For slots [first, first + count) of a task with at least one row, first < slots. For whole warps.
__device__ inline RowRange rows_that_see(const AttentionTask& task, int first, int count) {
  if (first < task.older) return {0, task.rows};  // older slots are in any order
  const int last = min(first + count, task.slots) - 1, oldest = task.token[first];
  if (oldest > task.newest_key) return {0, 0};
  RowRange range{first_above(task.query_token, 0, task.rows, oldest - 1, first - (task.slots - task.rows)), task.rows};
  if (task.window > 0)
    range.end = first_above(task.query_token, range.begin, task.rows, task.token[last] + task.window - 1, -1);
  return range;
}

/// Heads that a block of a column kernel does in turn: all of a group, so that it reads its keys once, unless that would
/// leave multiprocessors without work.
inline int heads_together(int blocks, int group, int multiprocessors) {
  return blocks >= 3 * multiprocessors ? group : 1;
}

/// A row sees the tokens in (oldest, newest].
struct RowSight {
  int oldest, newest;
  // No && in the loops over a tile: it would become a branch an element.
  __device__ bool sees(int token) const { return (token > oldest) & (token <= newest); }
};

__device__ inline RowSight sight_of(const AttentionTask& task, int query_token) {
  return {task.window > 0 ? query_token - task.window : INT_MIN, min(query_token, task.newest_key)};
}

/// True when every row with a token in [first_row, last_row] surely sees all slots [slot, slot + count), whose first and
/// last are of tokens first_key and last_key (read for slots >= older only).
__device__ inline bool all_visible(const AttentionTask& task, int slot, int count, int first_key, int last_key,
                                   int first_row, int last_row) {
  if (slot + count > task.slots) return false;
  const bool any_older = slot<task.older, any_newer = slot + count> task.older;
  if (any_older && (task.window > 0 || task.newest_key != INT_MAX)) return false;
  if (any_newer && last_key > min(first_row, task.newest_key)) return false;
  return task.window == 0 || first_key > last_row - task.window;
}

__host__ __device__ inline long row_bytes(const AttentionShape& shape, int dim) {
  return static_cast<long>(dim) * (shape.elements == Dtype::float32 ? 4 : 2);
}

/// The query of a row and head.
__device__ inline const char* query_at(const AttentionTask& task, int row, int head, const AttentionShape& shape) {
  const long index = head * task.query_stride + task.query_row[row];
  return static_cast<const char*>(task.queries) + index * row_bytes(shape, shape.key_dim);
}

}  // namespace kv::blocks
