// One token's queries against a cache, within a thread block: logits, log-sum-exp, output. Long rows of 16-bit elements
// are streamed over tensor cores; any other shape is computed plainly.
#pragma once
#include "kernels/stream_attention.cuh"

namespace kv {

/// Where a row's results are, in shared memory; and what a stream needs there.
struct RowMemory {
  StreamMemory stream;
  float* output;   // [group][value_dim]
  float* weight;   // [team_warps + 1][group] what every warp's part counts in the output; the last: the newest slot
  float* log_sum;  // [group] log-sum-exps
  float* newest;   // [group] logits of the newest slot, with bias
  float* probabilities;  // [group][logit_stride] in device memory, for rows that are not streamed
};

/// Lays it out in row_memory_bytes() of shared memory.
__device__ inline RowMemory carve_row(char* memory, bool streamed, int key_dim, int value_dim, int group) {
  RowMemory row{};
  const auto take = [&](long bytes) {
    char* at = memory;
    memory += bytes;
    return at;
  };
  if (streamed) {
    row.stream.ring = reinterpret_cast<uint4*>(take(team_warps * stream_ring_bytes));
    row.stream.probe = reinterpret_cast<unsigned*>(take(4 * query_pitch(stream_width(key_dim, value_dim)) * 2));
    row.stream.queries =
        reinterpret_cast<std::uint16_t*>(take(stream_heads * query_pitch(stream_width(key_dim, value_dim)) * 2));
    row.stream.partial = reinterpret_cast<float*>(take(team_warps * group * stream_pitch(value_dim) * 4));
    row.stream.parts =
        reinterpret_cast<SoftmaxPart*>(take(team_warps * group * static_cast<long>(sizeof(SoftmaxPart))));
  }
  row.output = reinterpret_cast<float*>(take(group * value_dim * 4));
  row.weight = reinterpret_cast<float*>(take((team_warps + 1) * group * 4));
  row.newest = reinterpret_cast<float*>(take(group * 4));
  row.log_sum = reinterpret_cast<float*>(take(group * 4));
  return row;
}

namespace detail {

__device__ inline float warp_sum(float x) {
  for (int k = 16; k > 0; k /= 2) x += __shfl_xor_sync(~0u, x, k);
  return x;
}

/// A dot product by one warp, channels dealt over lanes.
__device__ inline float warp_dot(const void* a, long a_row, const void* b, long b_row, int dim, Dtype elements) {
  float sum = 0;
  for (int c = static_cast<int>(threadIdx.x % 32); c < dim; c += 32)
    sum = __fmaf_rn(load_element(a, elements, a_row + c), load_element(b, elements, b_row + c), sum);
  return warp_sum(sum);
}

/// Logits of one slot for heads first_head, first_head + step, ... of the group, by one warp; with bias in newest[g].
__device__ inline void slot_logits(const RowLook& look, Dtype elements, int slot, int first_head, int step,
                                   float* newest) {
  for (int g = first_head; g < look.group; g += step) {
    const float dot = warp_dot(look.query, g * look.query_stride, look.keys, static_cast<long>(slot) * look.key_dim,
                               look.key_dim, elements);
    if (threadIdx.x % 32 != 0) continue;
    const float x = look.masked && look.hidden(slot) ? -INFINITY : logit_of(look, dot);
    if (look.logits) look.logits[static_cast<long>(g) * look.logit_stride + slot] = x;
    if (newest) newest[g] = look.bias ? x + look.bias[slot] : x;
  }
}

/// A vector of the policy's own as a row.
struct FloatRow {
  const float* data;
  __device__ float operator[](int c) const { return data[c]; }
};

}  // namespace detail

/// Every head's log-sum-exp and output over slots [0, look.slots]: look.slots older ones, and the newest. `sink` is
/// [group] or null. All threads call; results are ready when a function returns.
struct TokenAttention {
  BlockTeam team;
  Dtype elements;
  const float* sink;

  /// `here`: inlined where it is called, in bfloat16.
  template <bool here>
  __device__ __forceinline__ void streamed(const RowLook& look, const RowMemory& memory, bool probing, bool resume,
                                           bool next) const {
    const bool half = elements == Dtype::float16;
    if (probing) {
      half ? split_probe<__half>(look, memory.stream.probe) : split_probe<__nv_bfloat16>(look, memory.stream.probe);
    }
    stage_queries(look, memory.stream.queries);
    __syncthreads();
    const bool wide = stream_width(look.key_dim, look.value_dim) > 64;
    if (half && wide)
      stream_row<__half, 128>(look, memory.stream, resume, next);
    else if (half)
      stream_row<__half, 64>(look, memory.stream, resume, next);
    else if (wide)
      stream<here, 128>(look, memory.stream, probing, resume, next);
    else
      stream<here, 64>(look, memory.stream, probing, resume, next);
    newest_slot(look, memory);
    __syncthreads();
    weigh_parts(look, memory);
    __syncthreads();
    add_parts(look, memory);
    __syncthreads();
  }

  __device__ __noinline__ void plain(const RowLook& look, const RowMemory& memory) const {
    const int n = look.slots + 1;
    for (int s = static_cast<int>(threadIdx.x / 32); s < n; s += team_warps) {
      detail::slot_logits(look, elements, s, 0, 1, nullptr);
      if (look.probe_vector) probe_slot(look, s);
    }
    __syncthreads();
    for (int g = 0; g < look.group; ++g) {
      const float* logits = look.logits + static_cast<long>(g) * look.logit_stride;
      float* p = memory.probabilities + static_cast<long>(g) * look.logit_stride;
      const auto x = [&](int s) { return look.bias ? logits[s] + look.bias[s] : logits[s]; };
      const float seen = team.max(n, x), most = sink ? fmaxf(seen, sink[g]) : seen;
      const float base = most == -INFINITY ? 0.f : most;
      const float sum = team.sum(n, [&](int s) { return p[s] = exp2f((x(s) - base) * log2_e); }) +
                        (sink ? exp2f((sink[g] - base) * log2_e) : 0.f);
      if (threadIdx.x == 0) memory.log_sum[g] = sum > 0 ? base + logf(sum) : -INFINITY;
      const float share = sum > 0 ? 1 / sum : 0.f;
      for (int c = static_cast<int>(threadIdx.x); c < look.value_dim; c += team_threads) {
        float o = 0;
        for (int s = 0; s < n; ++s)
          o = __fmaf_rn(p[s] * share, load_element(look.values, elements, static_cast<long>(s) * look.value_dim + c),
                        o);
        memory.output[g * look.value_dim + c] = o;
      }
    }
    __syncthreads();
  }

 private:
  template <bool here, int width>
  __device__ __forceinline__ static void stream(const RowLook& look, const StreamMemory& memory, bool probing,
                                                bool resume, bool next) {
    if constexpr (!here)
      stream_row<__nv_bfloat16, width>(look, memory, resume, next);
    else if (probing)
      stream_here<__nv_bfloat16, width, true>(look, memory, resume, next);
    else
      stream_here<__nv_bfloat16, width, false>(look, memory, resume, next);
  }

  __device__ void probe_slot(const RowLook& look, int slot) const {
    const float dot =
        WarpRows{}.dot(DeviceRow::at(look.keys, elements, slot, look.key_dim), detail::FloatRow{look.probe_vector});
    if (threadIdx.x % 32 == 0) look.probe[slot] = dot;
  }

  __device__ void newest_slot(const RowLook& look, const RowMemory& memory) const {
    const int warp =
        static_cast<int>(threadIdx.x / 32);  // a head a warp, from the last warp on: the first have more tiles
    detail::slot_logits(look, elements, look.slots, team_warps - 1 - warp, team_warps, memory.newest);
    if (look.probe_vector && warp == 0) probe_slot(look, look.slots);
  }

  /// Log-sum-exp of a head, and what each warp's part counts: a warp a head, a lane a part. In units of log 2.
  __device__ void weigh_parts(const RowLook& look, const RowMemory& memory) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    static_assert(team_warps + 2 <= 16);
    for (int g = static_cast<int>(threadIdx.x / 32); g < look.group; g += team_warps) {
      float most = -INFINITY, sum = 0;
      if (lane < team_warps)
        most = memory.stream.parts[lane * look.group + g].most, sum = memory.stream.parts[lane * look.group + g].sum;
      else if (lane == team_warps)
        most = memory.newest[g] * log2_e, sum = 1;
      else if (lane == team_warps + 1 && sink)
        most = sink[g] * log2_e, sum = 1;
      float base = most;
      for (int k = 8; k > 0; k /= 2) base = fmaxf(base, __shfl_xor_sync(~0u, base, k));
      base = __shfl_sync(~0u, base, 0);
      const float share = base == -INFINITY ? 0.f : exp2_fast(most - base);
      float all = share * sum;
      for (int k = 8; k > 0; k /= 2) all += __shfl_xor_sync(~0u, all, k);
      all = __shfl_sync(~0u, all, 0);
      if (lane <= team_warps) memory.weight[lane * look.group + g] = all > 0 ? share / all : 0.f;
      if (lane == 0) memory.log_sum[g] = all > 0 ? (base + log2f(all)) * ln_2 : -INFINITY;
    }
  }

  __device__ void add_parts(const RowLook& look, const RowMemory& memory) const {
    const int pitch = stream_pitch(look.value_dim);
    for (int i = static_cast<int>(threadIdx.x); i < look.group * look.value_dim; i += team_threads) {
      const int g = i / look.value_dim, c = i % look.value_dim;
      float o = memory.weight[team_warps * look.group + g] *
                load_element(look.values, elements, static_cast<long>(look.slots) * look.value_dim + c);
#pragma unroll
      for (int w = 0; w < team_warps; ++w)
        o = __fmaf_rn(memory.stream.partial[(w * look.group + g) * pitch + c], memory.weight[w * look.group + g], o);
      memory.output[i] = o;
    }
  }
};

}  // namespace kv
