// Derivatives by keys, in float32 without tensor cores. A block owns 64 slots of a task and walks the rows that see them.
#pragma once
#include "kernels/plain_attention.cuh"

namespace kv::blocks {

/// Floats of shared memory: two tiles of work, the slopes by the logits, gradients of `key_dim` dims, e.o of the rows.
inline int gradient_floats(int key_dim) {
  return 2 * plain_tile_floats + plain_tile * (key_dim < plain_dims ? key_dim : plain_dims) + plain_tile;
}

/// e.o of 64 pairs: four threads a row.
template <class RowE, class RowO>
__device__ void dot_outputs(float* products, int dim, RowE e, RowO o) {
  const int row = static_cast<int>(threadIdx.x) / 4, part = static_cast<int>(threadIdx.x) % 4;
  const float *left = e(row), *right = o(row);
  float sum = 0;
  for (int d = part; left && d < dim; d += 4) sum = __fmaf_rn(left[d], right[d], sum);
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  if (part == 0) products[row] = sum;
}

/// Block (x, y): the x-th 64 slots, key dims [256 y, 256 (y + 1)).
static __global__ __launch_bounds__(plain_threads, 2) void gradient_kernel(AttentionShape shape, LogitRule rule,
                                                                           const KeyGradientTask* tasks, int count,
                                                                           int ranks) {
  float* const work_tile = reinterpret_cast<float*>(launch_memory());
  float *const slopes = work_tile + plain_tile_floats, *const sums = slopes + plain_tile_floats;
  const WorkItem work = work_item(count, ranks);
  if (work.task >= count) return;
  const KeyGradientTask& gradient = tasks[work.task];
  const AttentionTask task = gradient.attention;
  const Dtype type = shape.elements;
  const int group = shape.group, slot = work.rank * plain_tile, value_dim = shape.value_dim;
  if (slot >= task.slots) return;
  const int first_dim = static_cast<int>(blockIdx.y) * plain_dims, dims = min(shape.key_dim - first_dim, plain_dims);
  float* const e_dot_o = sums + plain_tile * dims;
  RowRange range{0, 0};
  if (task.rows > 0) range = rows_that_see(task, slot, plain_tile);
  for (int i = static_cast<int>(threadIdx.x); i < plain_tile * dims; i += plain_threads) sums[i] = 0;

  const int last = range.end * group - 1;
  for (int first = range.begin * group; first <= last; first += plain_tile) {
    const auto output_row = [&](int r) -> const float* {
      return first + r > last ? nullptr : task.output + static_cast<long>(first + r) * value_dim;
    };
    const auto e_row = [&](int r) -> const float* {
      const int pair = first + r;
      if (pair > last || gradient.e == nullptr) return output_row(r);
      return gradient.e + (pair % group * gradient.e_stride + task.query_row[pair / group]) * value_dim;
    };
    const QueryRows query{task, shape, first, last};
    Corner s, t;
    dot_rows(s, work_tile, shape.key_dim, type, query, type,
             SlotRows{task.keys, slot, task.slots, row_bytes(shape, shape.key_dim)});
    dot_rows(t, work_tile, value_dim, Dtype::float32, e_row, type,
             SlotRows{task.values, slot, task.slots, row_bytes(shape, value_dim)});
    dot_outputs(e_dot_o, value_dim, e_row, output_row);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = plain_y() + i, pair = min(first + row, last);
      const RowSight sight = sight_of(task, task.query_token[pair / group]);
      const float lse2 = task.lse[pair] * log2_e;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = slot + plain_x() + j;
        if (first + row > last || at >= task.slots || !sight.sees(task.token[at])) {
          s[i][j] = 0;
          continue;
        }
        const float bent = rule.bend(s[i][j]), bias2 = task.bias ? task.bias[at] * log2_e : 0.f;
        const float p = exp2f(__fmaf_rn(bent, rule.factor2, bias2 - lse2));
        const float slope = rule.capped ? 1 - bent * bent : 1.f;
        s[i][j] = shape.scale * p * (t[i][j] - e_dot_o[row]) * slope;
      }
    }
    store_along(slopes, s);
    for (int d = 0; d < dims; d += plain_tile) {
      __syncthreads();
      load_along(work_tile, first_dim + d, shape.key_dim, type, query);
      __syncthreads();
      Corner g;
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int column = d + plain_x() + j;
          g[i][j] = column < dims ? sums[(plain_y() + i) * dims + column] : 0.f;
        }
      multiply(g, slopes, work_tile, plain_tile);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (d + plain_x() + j < dims) sums[(plain_y() + i) * dims + d + plain_x() + j] = g[i][j];
    }
  }

  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < plain_tile * dims; i += plain_threads) {
    const int at = slot + i / dims;
    if (at < task.slots) gradient.gradients[static_cast<long>(at) * shape.key_dim + first_dim + i % dims] = sums[i];
  }
}

}  // namespace kv::blocks
