// Derivatives by keys on tensor cores: bfloat16 elements, dims that are multiples of 8 up to 256. A block owns 64 slots and
// walks the (row, head) pairs that see them. What is not stored in 16 bits (output gradients, slopes by the logits) enters
// as two words; float16 would need a scale for that, so those elements take the kernel without tensor cores.
#pragma once
#include "kernels/attention_sight.cuh"
#include "kernels/launch.cuh"
#include "kernels/tensor_tiles.cuh"

namespace kv::blocks {

constexpr int gradient_threads = 128, gradient_tile = 64;

/// Shared memory of a block, D = padded dim: keys, values, then of a tile of pairs: queries, both words of e, and what is
/// known of each pair.
template <int D>
struct GradientLayout {
  static constexpr int pairs = D > 128 ? 32 : 64;
  static constexpr int slots_bytes = gradient_tile * D * 2, tile = pairs * D * 2;
  static constexpr int values = slots_bytes, queries = 2 * slots_bytes, e_high = queries + tile, e_low = e_high + tile;
  static constexpr int lse = e_low + tile, token = lse + pairs * 4, e_dot_o = token + pairs * 4;
  static constexpr int bytes = e_dot_o + pairs * 4;
};

/// Splits the rows e of a tile of pairs into two tiles of words, and fills e_dot_o. Rows past `last` are zeros.
template <int D>
__device__ void split_gradients(char* shared, const KeyGradientTask& gradient, int first, int last, int group,
                                int dim) {
  using Layout = GradientLayout<D>;
  constexpr int chunks = D / 8;  // neighbouring lanes of a warp
  const AttentionTask& task = gradient.attention;
  float* const e_dot_o = reinterpret_cast<float*>(shared + Layout::e_dot_o);
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < Layout::pairs * chunks; i += gradient_threads) {
    const int row = i / chunks, chunk = i % chunks, pair = first + row;
    float e[8] = {}, product = 0;
    if (pair <= last && chunk * 8 < dim) {
      const float* const o = task.output + static_cast<long>(pair) * dim + chunk * 8;
      const float* own = o;
      if (gradient.e)
        own = gradient.e + (pair % group * gradient.e_stride + task.query_row[pair / group]) * dim + chunk * 8;
#pragma unroll
      for (int k = 0; k < 8; ++k) e[k] = own[k], product = __fmaf_rn(e[k], o[k], product);
    }
    uint32_t high[4], low[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) Words<__nv_bfloat16>::split(e[2 * k], e[2 * k + 1], high[k], low[k]);
    const uint32_t at = chunk_offset<D>(row, chunk);
    *reinterpret_cast<uint4*>(shared + Layout::e_high + at) = make_uint4(high[0], high[1], high[2], high[3]);
    *reinterpret_cast<uint4*>(shared + Layout::e_low + at) = make_uint4(low[0], low[1], low[2], low[3]);
#pragma unroll
    for (int k = 1; k < chunks; k *= 2) product += __shfl_xor_sync(~0u, product, k);
    if (chunk == 0) e_dot_o[row] = product;
  }
}

template <int D>
__global__ __launch_bounds__(gradient_threads) void gradient_tile_kernel(AttentionShape shape, LogitRule rule,
                                                                         const KeyGradientTask* tasks, int count,
                                                                         int ranks) {
  using Element = __nv_bfloat16;
  using Layout = GradientLayout<D>;
  constexpr int pairs = Layout::pairs, N = pairs / 8;
  char* const shared = launch_memory();
  const WorkItem work = work_item(count, ranks);
  if (work.task >= count) return;
  const KeyGradientTask& gradient = tasks[work.task];
  const AttentionTask task = gradient.attention;
  const int group = shape.group, slot = work.rank * gradient_tile;
  if (slot >= task.slots) return;
  RowRange range{0, 0};
  if (task.rows > 0) range = rows_that_see(task, slot, gradient_tile);

  const uint32_t base = shared_address(shared);
  const auto load_slots = [&](int to, const void* rows, int dim) {
    load_rows<D, gradient_threads>(base + to, gradient_tile, dim, rows, [&](int r) -> const void* {
      return slot + r < task.slots ? static_cast<const char*>(rows) + static_cast<long>(slot + r) * dim * 2 : nullptr;
    });
  };
  load_slots(0, task.keys, shape.key_dim);
  load_slots(Layout::values, task.values, shape.value_dim);

  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int warp_first = slot + warp * 16, last_slot = task.slots - 1;
  const int oldest_key = task.token[min(warp_first, last_slot)],
            newest_key = task.token[min(warp_first + 15, last_slot)];
  int token[2];
  float bias2[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = min(warp_first + lane / 4 + 8 * r, last_slot);
    token[r] = task.token[at];
    bias2[r] = task.bias ? task.bias[at] * log2_e : 0.f;
  }

  float* const lse2 = reinterpret_cast<float*>(shared + Layout::lse);
  int* const row_token = reinterpret_cast<int*>(shared + Layout::token);
  const float* const e_dot_o = reinterpret_cast<const float*>(shared + Layout::e_dot_o);
  float g[D / 8][4], s[N][4], t[N][4];
  set_zero(g);
  const int last = range.end * group - 1;
  for (int first = range.begin * group; first <= last; first += pairs) {
    __syncthreads();  // the tile before has been read
    load_rows<D, gradient_threads>(base + Layout::queries, pairs, shape.key_dim, task.queries,
                                   [&](int r) -> const void* {
                                     const int pair = first + r;
                                     return pair <= last ? query_at(task, pair / group, pair % group, shape) : nullptr;
                                   });
    close_copies();
    split_gradients<D>(shared, gradient, first, last, group, shape.value_dim);
    if (threadIdx.x < pairs) {
      const int pair = min(first + static_cast<int>(threadIdx.x), last);
      lse2[threadIdx.x] = task.lse[pair] * log2_e;
      row_token[threadIdx.x] = task.query_token[pair / group];
    }
    await_copies<0>();
    __syncthreads();

    dot_tile<Element, D>(s, base, warp * 16, base + Layout::queries, shape.key_dim);
    dot_tile<Element, D>(t, base + Layout::values, warp * 16, base + Layout::e_high, shape.value_dim);
    add_dots<Element, D>(t, base + Layout::values, warp * 16, base + Layout::e_low, shape.value_dim);
    const bool plain = first + pairs - 1 <= last &&
                       all_visible(task, warp_first, 16, oldest_key, newest_key, row_token[0], row_token[pairs - 1]);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = e / 2, column = 8 * n + 2 * (lane % 4) + e % 2;
        const float bent = rule.capped ? rule.bend(s[n][e]) : s[n][e];
        const float p = exp2_fast(__fmaf_rn(bent, rule.factor2, bias2[r] - lse2[column]));
        const float slope = rule.capped ? 1 - bent * bent : 1.f;
        const bool seen = plain | ((first + column <= last) & sight_of(task, row_token[column]).sees(token[r]));
        s[n][e] = seen ? shape.scale * p * (t[n][e] - e_dot_o[column]) * slope : 0.f;
      }
    add_values<Element, D, N, false>(g, s, base + Layout::queries, shape.key_dim);
  }
  close_copies();  // without a pair the slots may still be on their way
  await_copies<0>();

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = warp_first + lane / 4 + 8 * r;
    if (at >= task.slots) continue;
    float* const out = gradient.gradients + static_cast<long>(at) * shape.key_dim + 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      if (8 * n < shape.key_dim) *reinterpret_cast<float2*>(out + 8 * n) = make_float2(g[n][2 * r], g[n][2 * r + 1]);
  }
}

}  // namespace kv::blocks
