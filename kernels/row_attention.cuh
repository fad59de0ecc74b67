// The general tensor core kernel over rows: attention output and log-sum-exp, or the mass of lost tokens. 16-bit elements,
// dims that are multiples of 8 up to 256. A block takes 64 (row, head) pairs of a task, head fastest: one read of the
// keys serves the whole group, and a task with few rows still fills its tile.
#pragma once
#include <cstddef>
#include <type_traits>

#include "kernels/attention_sight.cuh"
#include "kernels/launch.cuh"
#include "kernels/tensor_tiles.cuh"

namespace kv::blocks {

constexpr int row_threads = 128, row_tile = 64;

/// Shared memory of a block, D = padded dim: queries, then two stages of keys, values and what is known of each slot.
template <int D>
struct RowLayout {
  static constexpr int slots = D > 128 ? 32 : 64;
  static constexpr int queries = row_tile * D * 2, tile = slots * D * 2;
  static constexpr int keys = queries, values = keys + 2 * tile, token = values + 2 * tile;
  static constexpr int bias = token + 2 * slots * 4, lost = bias + 2 * slots * 4, bytes = lost + 2 * slots * 4;
};

/// A thread's two (row, head) pairs, 8 apart, of the 16 of its warp. Those past the last are the last again.
struct ThreadRows {
  int pair[2], token[2];
  RowSight sight[2];
  int oldest, newest;  // tokens of the warp's first and last row

  __device__ ThreadRows(const AttentionTask& task, int group, int warp_first, int last) {
    oldest = task.query_token[min(warp_first, last) / group];
    newest = task.query_token[min(warp_first + 15, last) / group];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      pair[r] = warp_first + static_cast<int>(threadIdx.x % 32) / 4 + 8 * r;
      token[r] = task.query_token[min(pair[r], last) / group];
      sight[r] = sight_of(task, token[r]);
    }
  }
};

/// `bias` of a tile's slots, in units of log 2 once multiplied by `unit`, as dot_tile's lanes have them.
__device__ inline float bias_of(const float* bias, int n, int e, float unit = 1) {
  return bias[8 * n + 2 * static_cast<int>(threadIdx.x % 4) + e % 2] * unit;
}
/// Dots of a tile become logits in units of log 2 with their slots' biases.
template <int N>
__device__ __forceinline__ void add_biases(float (&s)[N][4], float factor2, const float* bias, float unit = 1) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = __fmaf_rn(s[n][e], factor2, bias_of(bias, n, e, unit));
}

/// A thread's two rows in the running softmax. Logits are in units of log 2.
template <class Element>
struct RunningRows {
  static constexpr float shift = Words<Element>::shift, slack = Words<Element>::slack;
  float base[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  /// Logits become probabilities relative to the new base, times 2^shift; returns the factor on what was summed before.
  template <int N>
  __device__ __forceinline__ float2 take(float (&s)[N][4], float factor2) {
    float rescale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float peak = -INFINITY;
#pragma unroll
      for (int n = 0; n < N; ++n) peak = fmaxf(peak, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2)) * factor2;
      const float now = peak > base[r] + slack ? peak : base[r];
      const float zero = now == -INFINITY ? 0.f : now;  // nothing seen yet: all probabilities stay 0
      rescale[r] = exp2_fast(base[r] - zero);
      base[r] = now;
      float added = 0;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) added += s[n][e] = exp2_fast(__fmaf_rn(s[n][e], factor2, shift - zero));
      sum[r] = __fmaf_rn(sum[r], rescale[r], added);
    }
    return {rescale[0], rescale[1]};
  }

  /// The same of dots where nobody wants the probabilities: peaks are not looked for while sums show that no base moves.
  /// `biased`: with biases in units of log 2 and their powers of 2, `weight`, which cost nothing where a sum is taken anyway.
  template <bool biased, int N>
  __device__ __forceinline__ void add(float (&s)[N][4], float factor2, const float* bias, const float* weight,
                                      bool first_tile) {
    constexpr float usual = 1 << (Words<Element>::shift + Words<Element>::slack - 1);
    if (!first_tile) {
      float added[2] = {0, 0};
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float p = exp2_fast(__fmaf_rn(s[n][e], factor2, shift - base[e / 2]));
          added[e / 2] = biased ? __fmaf_rn(p, bias_of(weight, n, e), added[e / 2]) : added[e / 2] + p;
        }
      // A row that has seen nothing has a sum that is infinite or no number; so has one with a weight that is none.
      if (__all_sync(~0u, added[0] <= usual && added[1] <= usual)) {
        sum[0] += added[0], sum[1] += added[1];
        return;
      }
    }
    if constexpr (biased) add_biases(s, factor2, bias);
    take(s, biased ? 1.f : factor2);
  }
};

/// Hides the slots that rows do not see, and those from `count` on.
template <int N>
__device__ __forceinline__ void hide_unseen(float (&s)[N][4], const int* token, int count, const ThreadRows& rows) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = 8 * n + 2 * (lane % 4) + e % 2;
      const bool seen = (column < count) & rows.sight[e / 2].sees(token[column]);
      s[n][e] = seen ? s[n][e] : -INFINITY;
    }
}

/// Bends, biases and masks the logits of a tile of 8N slots in place, two rows a thread; returns the factor that brings
/// them to units of log 2. `token` and `bias` are of the tile's slots.
template <int N>
__device__ __forceinline__ float finish_logits(float (&s)[N][4], const LogitRule& rule, const AttentionTask& task,
                                               int slot, const int* token, const float* bias, const ThreadRows& rows) {
  if (rule.capped) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = rule.bend(s[n][e]);
  }
  if (task.bias) add_biases(s, rule.factor2, bias, log2_e);
  if (!all_visible(task, slot, 8 * N, token[0], token[8 * N - 1], rows.oldest, rows.newest))
    hide_unseen(s, token, task.slots - slot, rows);
  return task.bias ? 1.f : rule.factor2;
}

/// What joins a row at its end: the factor that makes its summed values an output, and its log-sum-exp.
struct RowEnd {
  float factor, lse;
};

/// `base` and `sum` (over all its threads, probabilities times 2^shift) of a row; a sink joins the denominator only.
__device__ inline RowEnd finish_row(const AttentionTask& task, int head, float base, float sum, float shift) {
  if (task.sink_logit == nullptr) {
    if (base == -INFINITY) return {0.f, -INFINITY};
    return {1.f / sum, (base - shift + log2f(sum)) * ln_2};
  }
  const float sink = task.sink_logit[head] * log2_e, peak = fmaxf(base, sink);
  if (peak == -INFINITY) return {0.f, -INFINITY};
  const float mine = exp2_fast(base - peak);
  const float all = __fmaf_rn(sum, mine, exp2_fast(sink - peak + shift));
  return {mine / all, (peak - shift + log2f(all)) * ln_2};
}

/// Brings what was summed of two rows to their new base.
template <int N>
__device__ __forceinline__ void rescale_rows(float (&o)[N][4], float2 factor) {
  if (!__any_sync(~0u, factor.x != 1.f || factor.y != 1.f)) return;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    o[n][0] *= factor.x, o[n][1] *= factor.x;
    o[n][2] *= factor.y, o[n][3] *= factor.y;
  }
}

/// Where a thread's part of a pair's output begins; eight values on comes the next two of it.
__device__ inline float* output_of(const AttentionTask& task, int pair, int value_dim) {
  return task.output + static_cast<long>(pair) * value_dim + 2 * (static_cast<int>(threadIdx.x) % 4);
}

/// Writes two rows' log-sum-exps and, if `valued`, outputs.
template <class Element, int N>
__device__ __forceinline__ void store_rows(const AttentionTask& task, const AttentionShape& shape,
                                           const ThreadRows& rows, const RunningRows<Element>& running,
                                           const float (&o)[N][4], int last, bool valued) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = running.sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int pair = rows.pair[r];
    if (pair > last) continue;
    const RowEnd end = finish_row(task, pair % shape.group, running.base[r], sum, Words<Element>::shift);
    if (lane % 4 == 0) task.lse[pair] = end.lse;
    if (!valued) continue;
    float* const out = output_of(task, pair, shape.value_dim);
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (8 * n < shape.value_dim)
        *reinterpret_cast<float2*>(out + 8 * n) = make_float2(o[n][2 * r] * end.factor, o[n][2 * r + 1] * end.factor);
  }
}

/// The mass of lost tokens in two rows.
struct LostRows {
  float lse2[2];
  double mass[2] = {0, 0};

  __device__ LostRows(const AttentionTask& task, const ThreadRows& rows, int last) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float lse = task.lse[min(rows.pair[r], last)];
      lse2[r] = lse == -INFINITY ? 0.f : lse * log2_e;  // sees nothing: every probability is 0 anyway
    }
  }

  template <int N>
  __device__ void add(const float (&s)[N][4], float factor2, const ThreadRows& rows, const int* lost_at) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float added = 0;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (lost_at[8 * n + 2 * static_cast<int>(threadIdx.x % 4) + e] < rows.token[r])
            added += exp2_fast(__fmaf_rn(s[n][2 * r + e], factor2, -lse2[r]));
      mass[r] += added;
    }
  }

  __device__ void store(double* masses, const ThreadRows& rows, int last) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      mass[r] += __shfl_xor_sync(~0u, mass[r], 1);
      mass[r] += __shfl_xor_sync(~0u, mass[r], 2);
      if (rows.pair[r] <= last && threadIdx.x % 4 == 0) masses[rows.pair[r]] = mass[r];
    }
  }
};

/// Starts copying the slots [slot, slot + tile): keys, values if `valued`, tokens, biases, and `lost_at` if not null.
template <int D>
__device__ void load_row_step(const AttentionTask& task, const AttentionShape& shape, uint32_t base, int stage,
                              int slot, bool valued, const int* lost_at) {
  using Layout = RowLayout<D>;
  constexpr int slots = Layout::slots;
  const int thread = static_cast<int>(threadIdx.x);
  const auto load = [&](int to, const void* rows, int dim) {
    load_rows<D, row_threads>(base + to + stage * Layout::tile, slots, dim, rows, [&](int r) -> const void* {
      return slot + r < task.slots ? static_cast<const char*>(rows) + static_cast<long>(slot + r) * dim * 2 : nullptr;
    });
  };
  load(Layout::keys, task.keys, shape.key_dim);
  if (valued) load(Layout::values, task.values, shape.value_dim);
  if (thread < slots) {
    const bool real = slot + thread < task.slots;
    const int from = real ? slot + thread : 0, to = 4 * (stage * slots + thread);
    copy_4(base + Layout::token + to, task.token + from, real);
    if (task.bias) copy_4(base + Layout::bias + to, task.bias + from, real);
    if (lost_at) copy_4(base + Layout::lost + to, lost_at + from, real);
  }
  close_copies();
}

__device__ inline const int* lost_at_of(const AttentionTask&) { return nullptr; }
__device__ inline const int* lost_at_of(const LostMassTask& task) { return task.lost_at; }

/// `fast`: see block_attention.
template <class Element, int D, class Task, bool fast>
__global__ __launch_bounds__(row_threads) void row_kernel(AttentionShape shape, LogitRule rule, const Task* tasks,
                                                          int count, int ranks) {
  constexpr bool lost = std::is_same_v<Task, LostMassTask>;
  using Layout = RowLayout<D>;
  constexpr int slots = Layout::slots, N = slots / 8;
  char* const shared = launch_memory();

  const WorkItem work = work_item(count, ranks);
  if (work.task >= count) return;
  const AttentionTask task = attention_of(tasks[work.task]);
  const int group = shape.group, pairs = task.rows * group;
  const int first = ((pairs + row_tile - 1) / row_tile - 1 - work.rank) * row_tile;
  if (first < 0) return;
  const int last = min(first + row_tile, pairs) - 1;
  SlotTiles tiles{};
  if (task.slots > 0) tiles = visible_tiles(task, first / group, last / group, slots);
  const bool valued = !lost && task.output != nullptr;

  const uint32_t base = shared_address(shared);
  const int* const lost_at = lost_at_of(tasks[work.task]);
  const auto slot_of = [&](int i) { return tiles[tiles.count - 1 - i] * slots; };
  load_rows<D, row_threads>(base, row_tile, shape.key_dim, task.queries, [&](int r) -> const void* {
    const int pair = min(first + r, last);
    return query_at(task, pair / group, pair % group, shape);
  });
  close_copies();
  if (tiles.count > 0) load_row_step<D>(task, shape, base, 0, slot_of(0), valued, lost_at);

  const int warp = static_cast<int>(threadIdx.x / 32);
  const ThreadRows rows(task, group, first + warp * 16, last);
  RunningRows<Element> running;
  [[maybe_unused]] float o[D / 8][4] = {};
  float s[N][4];
  std::conditional_t<lost, LostRows, std::nullptr_t> losses = [&] {
    if constexpr (lost)
      return LostRows(task, rows, last);
    else
      return nullptr;
  }();
  for (int i = 0; i < tiles.count; ++i) {
    const int slot = slot_of(i), stage = i % 2;
    if (i + 1 < tiles.count) {
      load_row_step<D>(task, shape, base, stage ^ 1, slot_of(i + 1), valued, lost_at);
      await_copies<1>();
    } else {
      await_copies<0>();
    }
    __syncthreads();
    dot_tile<Element, D>(s, base, warp * 16, base + Layout::keys + stage * Layout::tile, shape.key_dim);
    const int* const token = reinterpret_cast<const int*>(shared + Layout::token) + stage * slots;
    const float* const bias = reinterpret_cast<const float*>(shared + Layout::bias) + stage * slots;
    const float factor2 = finish_logits(s, rule, task, slot, token, bias, rows);
    if constexpr (lost) {
      losses.add(s, factor2, rows, reinterpret_cast<const int*>(shared + Layout::lost) + stage * slots);
    } else {
      const float2 rescale = running.take(s, factor2);
      if (valued) {
        rescale_rows(o, rescale);
        add_values<Element, D, N, fast>(o, s, base + Layout::values + stage * Layout::tile, shape.value_dim);
      }
    }
    __syncthreads();
  }
  await_copies<0>();
  if constexpr (lost)
    losses.store(tasks[work.task].masses, rows, last);
  else
    store_rows(task, shape, rows, running, o, last, valued);
}

}  // namespace kv::blocks
