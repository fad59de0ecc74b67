// 64 x 64 tiles of float32 products without tensor cores: for elements or dims that those do not take, and for gradients.
#pragma once
#include <cuda_runtime.h>

#include "kernels/attention_sight.cuh"
#include "kernels/elements.cuh"

namespace kv::blocks {

// 256 threads; thread (y, x) owns the 4 x 4 corner of rows 4y.. and columns 4x.. of a tile of products.
constexpr int plain_tile = 64, plain_threads = 256, plain_depth = 32, plain_pitch = plain_tile + 4;
constexpr int plain_dims = 256;  // dims of an output that a block owns
constexpr int plain_tile_floats = plain_tile * plain_pitch;

__device__ inline int plain_y() { return static_cast<int>(threadIdx.x) / 16 * 4; }
__device__ inline int plain_x() { return static_cast<int>(threadIdx.x) % 16 * 4; }

using Corner = float[4][4];

/// corner += A^T B for tiles of [depth][plain_pitch].
__device__ inline void multiply(Corner& corner, const float* a, const float* b, int depth) {
  const int y = plain_y(), x = plain_x();
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    const float4 a4 = *reinterpret_cast<const float4*>(a + k * plain_pitch + y);
    const float4 b4 = *reinterpret_cast<const float4*>(b + k * plain_pitch + x);
    const float left[4] = {a4.x, a4.y, a4.z, a4.w}, right[4] = {b4.x, b4.y, b4.z, b4.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) corner[i][j] = __fmaf_rn(left[i], right[j], corner[i][j]);
  }
}

/// tile[k][r] = element first + k of row r: null rows, and dims from `dim` on, are 0.
template <class RowAt>
__device__ void load_across(float* tile, int first, int dim, Dtype type, RowAt row_at) {
  for (int i = static_cast<int>(threadIdx.x); i < plain_tile * plain_depth; i += plain_threads) {
    const int r = i / plain_depth, k = i % plain_depth;
    const void* const row = row_at(r);
    tile[k * plain_pitch + r] = row && first + k < dim ? load_element(row, type, first + k) : 0.f;
  }
}

/// tile[r][c] = element first + c of row r, 64 of each; zeros as above.
template <class RowAt>
__device__ void load_along(float* tile, int first, int dim, Dtype type, RowAt row_at) {
  for (int i = static_cast<int>(threadIdx.x); i < plain_tile * plain_tile; i += plain_threads) {
    const int r = i / plain_tile, c = i % plain_tile;
    const void* const row = row_at(r);
    tile[r * plain_pitch + c] = row && first + c < dim ? load_element(row, type, first + c) : 0.f;
  }
}

/// corner = A B^T over `dim` elements of 64 rows each. `work` holds plain_tile_floats; all threads call, and may overwrite
/// it after a barrier.
template <class RowA, class RowB>
__device__ void dot_rows(Corner& corner, float* work, int dim, Dtype type_a, RowA a, Dtype type_b, RowB b) {
  float *left = work, *right = work + plain_depth * plain_pitch;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) corner[i][j] = 0;
  for (int first = 0; first < dim; first += plain_depth) {
    __syncthreads();
    load_across(left, first, dim, type_a, a);
    load_across(right, first, dim, type_b, b);
    __syncthreads();
    multiply(corner, left, right, min(plain_depth, dim - first));
  }
}

/// Rows of a task as functions of a tile's row: slots from `first` on, or the queries of (row, head) pairs first..last.
struct SlotRows {
  const void* rows;
  int first, slots;
  long bytes;  // of a row
  __device__ const void* operator()(int r) const {
    return first + r < slots ? static_cast<const char*>(rows) + (first + r) * bytes : nullptr;
  }
};

struct QueryRows {
  const AttentionTask& task;
  const AttentionShape& shape;
  int first, last;
  __device__ const void* operator()(int r) const {
    const int pair = first + r;
    if (pair > last) return nullptr;
    return query_at(task, pair / shape.group, pair % shape.group, shape);
  }
};

/// Stores a corner to tile[column][row] (so that rows run along), or to tile[row][column].
__device__ inline void store_across(float* tile, const Corner& corner) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
    *reinterpret_cast<float4*>(tile + (plain_x() + j) * plain_pitch + plain_y()) =
        make_float4(corner[0][j], corner[1][j], corner[2][j], corner[3][j]);
}
__device__ inline void store_along(float* tile, const Corner& corner) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    *reinterpret_cast<float4*>(tile + (plain_y() + i) * plain_pitch + plain_x()) =
        make_float4(corner[i][0], corner[i][1], corner[i][2], corner[i][3]);
}

}  // namespace kv::blocks
