// Attention without tensor cores: any element type, any dims. One kernel for outputs, log-sum-exps and lost masses, one for
// column sums. Correct first: about a third of the float32 rate.
#pragma once
#include <type_traits>

#include "kernels/plain_tiles.cuh"
#include "kernels/row_attention.cuh"

namespace kv::blocks {

/// Logits of a tile of pairs (rows) and slots (columns) in units of log 2, bias included; -infinity where hidden.
struct PlainLogits {
  const AttentionTask& task;
  const LogitRule& rule;

  __device__ void finish(Corner& s, int slot, const int (&row_token)[4], int first_pair, int pairs) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = slot + plain_x() + j;
      const int token = at < task.slots ? task.token[at] : 0;
      const float bias2 = at < task.slots && task.bias ? task.bias[at] * log2_e : 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool seen =
            at < task.slots && first_pair + plain_y() + i < pairs && sight_of(task, row_token[i]).sees(token);
        s[i][j] = seen ? __fmaf_rn(rule.bend(s[i][j]), rule.factor2, bias2) : -INFINITY;
      }
    }
  }
};

/// Over the 16 threads of a row's columns, in a fixed order.
template <class T>
__device__ T sum_of_row(T x) {
#pragma unroll
  for (int k = 1; k < 16; k *= 2) x += __shfl_xor_sync(~0u, x, k);
  return x;
}

/// Floats of shared memory: keys and queries or values, probabilities, and outputs of `value_dim` dims.
inline int plain_row_floats(int value_dim) {
  return 2 * plain_tile_floats + plain_tile * (value_dim < plain_dims ? value_dim : plain_dims);
}

/// Block (x, y): the x-th piece of work, output dims [256 y, 256 (y + 1)).
template <class Task>
__global__ __launch_bounds__(plain_threads, 2) void plain_row_kernel(AttentionShape shape, LogitRule rule,
                                                                     const Task* tasks, int count, int ranks) {
  constexpr bool lost = std::is_same_v<Task, LostMassTask>;
  float* const work_tile = reinterpret_cast<float*>(launch_memory());
  float *const p_tile = work_tile + plain_tile_floats, *const o_tile = p_tile + plain_tile_floats;

  const WorkItem work = work_item(count, ranks);
  if (work.task >= count) return;
  const AttentionTask task = attention_of(tasks[work.task]);
  const Dtype type = shape.elements;
  const int group = shape.group, pairs = task.rows * group;
  const int first = ((pairs + plain_tile - 1) / plain_tile - 1 - work.rank) * plain_tile;
  const int first_dim = static_cast<int>(blockIdx.y) * plain_dims;
  const bool valued = !lost && task.output != nullptr;
  if (first < 0 || (!valued && first_dim > 0)) return;
  const int last = min(first + plain_tile, pairs) - 1, dims = min(shape.value_dim - first_dim, plain_dims);
  SlotTiles tiles{};
  if (task.slots > 0) tiles = visible_tiles(task, first / group, last / group, plain_tile);

  int row_token[4];
  [[maybe_unused]] float lse2[4];
  [[maybe_unused]] double mass[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int pair = min(first + plain_y() + i, last);
    row_token[i] = task.query_token[pair / group];
    if constexpr (lost) lse2[i] = task.lse[pair] == -INFINITY ? 0.f : task.lse[pair] * log2_e;
  }
  if (valued)
    for (int i = static_cast<int>(threadIdx.x); i < plain_tile * dims; i += plain_threads) o_tile[i] = 0;
  __syncthreads();

  float base[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, sum[4] = {};
  for (int t = 0; t < tiles.count; ++t) {
    const int slot = tiles[t] * plain_tile;
    Corner s;
    dot_rows(s, work_tile, shape.key_dim, type, QueryRows{task, shape, first, last}, type,
             SlotRows{task.keys, slot, task.slots, row_bytes(shape, shape.key_dim)});
    PlainLogits{task, rule}.finish(s, slot, row_token, first, pairs);
    if constexpr (lost) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = min(slot + plain_x() + j, task.slots - 1), lost_at = tasks[work.task].lost_at[at];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (lost_at < row_token[i]) mass[i] += exp2f(s[i][j] - lse2[i]);
      }
    } else {
      float rescale[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float peak = fmaxf(fmaxf(s[i][0], s[i][1]), fmaxf(s[i][2], s[i][3]));
#pragma unroll
        for (int k = 1; k < 16; k *= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, k));
        const float now = fmaxf(base[i], peak), zero = now == -INFINITY ? 0.f : now;
        rescale[i] = exp2f(base[i] - zero);
        base[i] = now;
        float added = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) added += s[i][j] = exp2f(s[i][j] - zero);
        sum[i] = __fmaf_rn(sum[i], rescale[i], added);
      }
      if (!valued) continue;
      store_across(p_tile, s);
      for (int d = 0; d < dims; d += plain_tile) {
        __syncthreads();  // the products before have been read
        load_along(work_tile, first_dim + d, shape.value_dim, type,
                   SlotRows{task.values, slot, task.slots, row_bytes(shape, shape.value_dim)});
        __syncthreads();
        Corner o;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int column = d + plain_x() + j;
            o[i][j] = column < dims ? o_tile[(plain_y() + i) * dims + column] * rescale[i] : 0.f;
          }
        multiply(o, p_tile, work_tile, plain_tile);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (d + plain_x() + j < dims) o_tile[(plain_y() + i) * dims + d + plain_x() + j] = o[i][j];
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = plain_y() + i, pair = first + row;
    if constexpr (lost) {
      const double all = sum_of_row(mass[i]);
      if (pair <= last && plain_x() == 0) tasks[work.task].masses[pair] = all;
    } else {
      const float all = sum_of_row(sum[i]);
      if (pair > last) continue;
      const RowEnd end = finish_row(task, pair % group, base[i], all, 0.f);
      if (plain_x() == 0 && first_dim == 0) task.lse[pair] = end.lse;
      if (!valued) continue;
      for (int d = plain_x(); d < dims; ++d) {  // the thread's own columns: four of every 64
        task.output[static_cast<long>(pair) * shape.value_dim + first_dim + d] = o_tile[row * dims + d] * end.factor;
        if (d % 4 == 3) d += plain_tile - 4;
      }
    }
  }
}

/// A block: 64 slots of one head of a task.
template <class Weigh>
__global__ __launch_bounds__(plain_threads, 2) void plain_column_kernel(AttentionShape shape, LogitRule rule,
                                                                        const AttentionTask* tasks, int count,
                                                                        int ranks) {
  float* const work_tile = reinterpret_cast<float*>(launch_memory());
  const WorkItem work = work_item(count, ranks);
  if (work.task >= count) return;
  const AttentionTask task = tasks[work.task];
  const int group = shape.group, head = work.rank % group, slot = work.rank / group * plain_tile;
  if (slot >= task.slots) return;
  RowRange range{0, 0};
  if (task.rows > 0) range = rows_that_see(task, slot, plain_tile);

  float sum[4] = {};
  for (int row = range.begin; row < range.end; row += plain_tile) {
    Corner s;
    const auto query = [&](int r) -> const void* {
      return row + r < range.end ? query_at(task, row + r, head, shape) : nullptr;
    };
    dot_rows(s, work_tile, shape.key_dim, shape.elements, query, shape.elements,
             SlotRows{task.keys, slot, task.slots, row_bytes(shape, shape.key_dim)});
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + plain_y() + i;
      if (r >= range.end) continue;
      const RowSight sight = sight_of(task, task.query_token[r]);
      const float lse2 = task.lse[static_cast<long>(r) * group + head] * log2_e;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = slot + plain_x() + j;
        if (at >= task.slots || !sight.sees(task.token[at])) continue;
        const float bent = rule.bend(s[i][j]), bias2 = task.bias ? task.bias[at] * log2_e : 0.f;
        const float p = exp2f(__fmaf_rn(bent, rule.factor2, bias2 - lse2));
        sum[j] += Weigh::weigh(p, bent * rule.factor, task.rows - 1 - r);
      }
    }
  }

  // Sixteen partial sums a slot, added by one thread in order.
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 4; ++j) work_tile[plain_y() / 4 * plain_pitch + plain_x() + j] = sum[j];
  __syncthreads();
  const int mine = static_cast<int>(threadIdx.x);
  if (mine >= plain_tile || slot + mine >= task.slots) return;
  float all = 0;
  for (int y = 0; y < 16; ++y) all += work_tile[y * plain_pitch + mine];
  task.sums[static_cast<long>(slot + mine) * group + head] = all;
}

}  // namespace kv::blocks
