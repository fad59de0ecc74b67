// One token's queries against a cache, within a thread block: logits, log-sum-exp, output. Long rows of 16-bit elements
// are streamed over tensor cores; any other shape is computed plainly.
#pragma once
#include "kernels/stream_row.cuh"

namespace kv {

/// Where a row's results are, in shared memory; and what a stream needs there.
struct RowMemory {
  StreamMemory stream;
  std::uint16_t* queries[2];  // RowNow::queries of tokens in turn
  int query_rows;             // of each
  // What comes with a token, for input_buffers tokens in turn: its key and value, and the group's full outputs.
  std::uint16_t *key, *value;                            // [input_buffers][width]
  float* full;                                           // [input_buffers][group][value_dim]
  float* output;                                         // [output_rows][value_dim]
  float* log_sum;                                        // [group] log-sum-exps
  int late;                                              // the slot whose value a row does not know yet, or -1
  float late_weight[stream_heads];                       // its probability in that row
  alignas(8) float log_sums[team_warps * stream_heads];  // every warp's own copy, to 2^-21
  SoftmaxPart whole[stream_heads];                       // what the log-sum-exps of a streamed row are of
  float* probabilities;  // [group][logit_stride] in device memory, for rows that are not streamed

  /// This warp's copy of the log-sum-exps, of groups that fit.
  __device__ float* own_log_sum() { return log_sums + threadIdx.x / 32 * stream_heads; }
  __device__ const float* own_log_sum() const { return log_sums + threadIdx.x / 32 * stream_heads; }
};

/// Lays the rest out in row_memory_bytes() of shared memory.
__device__ inline void carve_row(RowMemory& row, char* memory, bool streamed, int key_dim, int value_dim, int group,
                                 bool probes, int ring_bytes) {
  const auto take = [&](long bytes) {
    char* at = memory;
    memory += (bytes + 15) / 16 * 16;
    return at;
  };
  const auto take_at = [&](int place, long bytes) {
    memory += (place - static_cast<int>(reinterpret_cast<std::size_t>(memory) % bank_bytes) + bank_bytes) % bank_bytes;
    return take(bytes);
  };
  if (streamed) {
    const int width = stream_width(key_dim, value_dim);
    row.query_rows = query_rows(group);
    row.stream.ring = reinterpret_cast<uint4*>(take(stream_warps * ring_bytes));
    if (probes) {
      take(probe_product_bytes(width, ring_bytes));  // right behind the rings
      row.stream.probe.rows = take_at(place_of_parts, probe_row_bytes(width));
    }
    for (auto& buffer : row.queries) {
      const int bytes = row.query_rows * query_pitch(width) * 2;
      buffer = reinterpret_cast<std::uint16_t*>(probes ? take_at(0, bytes) : take(bytes));
    }
    const int key_bytes = input_buffers * width * 2;
    row.key = reinterpret_cast<std::uint16_t*>(probes ? take_at(place_of_newest, key_bytes) : take(key_bytes));
    row.value = reinterpret_cast<std::uint16_t*>(take(input_buffers * width * 2));
    row.stream.partial = reinterpret_cast<float*>(take(2 * stream_warps * group * stream_pitch(width) * 4));
    row.full = reinterpret_cast<float*>(take(input_buffers * group * value_dim * 4));
  }
  row.output = reinterpret_cast<float*>(take(output_rows(group) * value_dim * 4));
  row.log_sum = reinterpret_cast<float*>(take(group * 4));
}

/// What there is before the first row: no late fold, no log-sum-exps, and of the parts that nobody leaves nothing, but for the sink's (`sink` is
/// [group] or null). All threads; a barrier must follow.
__device__ inline void clear_parts(RowMemory& row, const float* sink, int group) {
  if (threadIdx.x == 0) row.late = -1;
  for (int i = static_cast<int>(threadIdx.x); i < team_warps * stream_heads; i += team_threads)
    row.log_sums[i] = -INFINITY;
  for (int i = static_cast<int>(threadIdx.x); i < stream_warps * stream_heads; i += team_threads)
    row.stream.bases[i] = -INFINITY;
  for (int i = static_cast<int>(threadIdx.x); i < stream_heads * softmax_parts; i += team_threads) {
    const int g = i / softmax_parts;
    const bool has_sink = sink && g < group && i % softmax_parts == stream_warps + 1;
    for (auto& parts : row.stream.parts)
      parts[i] = has_sink ? SoftmaxPart{sink[g] * log2_e, 1} : SoftmaxPart{-INFINITY, 0};
  }
}

/// The barriers of a stream, by one thread for all; a barrier must follow, and copies must have ended before the end.
__device__ inline void begin_barriers(StreamMemory& stream) {
  if (threadIdx.x != 0) return;
  stream.gates.begin();
  if constexpr (copies_boxes) {
    for (uint64_t& barrier : stream.landed) barrier_init(shared_address(&barrier), 1);
    barriers_ready();
  }
}
__device__ inline void end_barriers(StreamMemory& stream) {
  if (threadIdx.x != 0) return;
  stream.gates.end();
  if constexpr (copies_boxes)
    for (uint64_t& barrier : stream.landed) barrier_end(shared_address(&barrier));
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

/// A vector of the policy's own as a row.
struct FloatRow {
  const float* data;
  int dim;
  __device__ float operator[](int c) const { return data[c]; }
};

}  // namespace detail

/// Every head's log-sum-exp and output over slots [0, now.slots]. `sink` is [group] or null; `simple`: no logit is bent, biased
/// or hidden.
struct TokenAttention {
  BlockTeam team;
  Dtype elements;
  const float* sink;
  bool simple = false;

  /// A row over tensor cores, from queries in shared memory, by all threads. Leaves log-sum-exps and outputs in `memory`, and
  /// nothing in the ring; gives a barrier. `width`, `tile`: of streams where rows are known to be of bfloat16 and
  /// nobody probes; 0 for any rows.
  template <int width, int tile>
  __device__ void streamed(const RowLook& look, const RowNow& now, RowMemory& memory, Ring& ring) const {
    ring.running = false;
    __syncthreads();
    if (threadIdx.x / 32 < stream_warps)
      if constexpr (width > 0)
        stream_here<__nv_bfloat16, width, tile, Probing::none>(look, now, memory.stream, ring);
      else
        stream_apart(elements, look, now, memory.stream, ring);
    else
      newest_slot(look, now, memory, warp_of_team() - stream_warps, team_warps - stream_warps);
    const int of_any = tile_slots(stream_width(look.key_dim, look.value_dim), short_ring),
              of = width > 0 ? tile : of_any;
    TileRing::advance(ring, TileRing::tiles_of_row(now.slots, of), false, warp_of_team());
    __syncthreads();
    combine(look, now, memory);
    __syncthreads();
  }

  /// The same of any shape and type, plainly; the newest slot is one of all.
  __device__ __noinline__ void plain(const RowLook& look, const Queries& queries, const RowNow& now,
                                     RowMemory& memory) const {
    const int n = now.slots + 1;
    for (int s = static_cast<int>(threadIdx.x / 32); s < n; s += team_warps) {
      for (int g = 0; g < look.group; ++g) {
        const float dot = detail::warp_dot(queries.first, g * queries.stride, look.keys,
                                           static_cast<long>(s) * look.key_dim, look.key_dim, elements);
        if (threadIdx.x % 32 == 0) look.logits[static_cast<long>(g) * look.logit_stride + s] = bent(look, now, s, dot);
      }
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
    const auto lane = static_cast<int>(threadIdx.x % 32);
    if (lane < min(look.group, stream_heads)) memory.own_log_sum()[lane] = memory.log_sum[lane];
    __syncwarp();
  }

  /// The newest slot's logits, four heads a warp, by so many warps, of which this is the `first`-th.
  __device__ void newest_slot(const RowLook& look, const RowNow& now, RowMemory& memory, int first, int warps) const {
    const int pitch = query_pitch(stream_width(look.key_dim, look.value_dim)), group = look.group;
    const int lane = static_cast<int>(threadIdx.x % 8);
#pragma unroll 1
    for (int four = 4 * first; four < group; four += 4 * warps) {
      const int g = min(four + static_cast<int>(threadIdx.x % 32 / 8), group - 1);
      float dot[1] = {};  // eight channels a lane, and 64 further: a loop, as code is fetched anew in every step
#pragma unroll 1
      for (int c = 8 * lane; c < 128; c += 64)
        if (c < look.key_dim) {
          float query[8], key[8];
          widen_eight(elements, *reinterpret_cast<const uint4*>(now.queries + g * pitch + c), query);
          widen_eight(elements, *reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(now.newest_key) + c),
                      key);
#pragma unroll
          for (int k = 0; k < 8; ++k) dot[0] = __fmaf_rn(query[k], key[k], dot[0]);
        }
      sum_over_lanes(dot, 8 * 8, 8);
      if (lane != 0) continue;
      const float x = bent(look, now, now.slots, dot[0]);
      if (look.logits) look.logits[static_cast<long>(g) * look.logit_stride + now.slots] = x;
      memory.stream.parts_of(now.query_token)[g * softmax_parts + stream_warps] = {
          (!simple && look.bias ? x + look.bias[now.slots] : x) * log2_e, 1};
    }
  }
  /// Its probe, if anybody asks; by one warp.
  __device__ void newest_probe(const RowLook& look, const RowNow& now) const {
    if (look.probe_vector) probe_row(look, now.slots, now.newest_key);
  }

  /// What the parts of a row count: lane h * softmax_parts + p of weight[i] holds what part p counts in head
  /// i * heads_at_once + h.
  static constexpr int heads_at_once = 32 / softmax_parts, used_parts = stream_warps + 2;
  struct Weights {
    float weight[stream_heads / heads_at_once] = {};
  };

  /// Log-sum-exps from the parts of a token's row, every warp its own copy: without a branch, and every lane by itself, since every
  /// step waits for them. The wholes are kept pair by pair of heads by so many warps, of which this is the `keeper`-th, if any. By
  /// whole warps; a barrier before.
  __device__ Weights log_sums(int group, RowMemory& memory, int token, int keeper, int keepers) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    Weights weights;
#pragma unroll
    for (int i = 0; i < stream_heads / heads_at_once; ++i) {
      if (i * heads_at_once >= group) break;
      const SoftmaxPart* const of_head = memory.stream.parts_of(token) + i * 32 + lane / softmax_parts * softmax_parts;
      const SoftmaxPart mine = of_head[lane % softmax_parts];
      alignas(16) SoftmaxPart part[used_parts];
#pragma unroll
      for (int p = 0; p < used_parts; p += 2)
        *reinterpret_cast<float4*>(&part[p]) = *reinterpret_cast<const float4*>(&of_head[p]);
      float base = part[0].most;
#pragma unroll
      for (int p = 1; p < used_parts; ++p) base = fmaxf(base, part[p].most);
      const float zero = base == -INFINITY ? 0.f : base, share = exp2_fast(mine.most - zero);
      float all = 0;
#pragma unroll
      for (int p = 0; p < used_parts; ++p) all = __fmaf_rn(exp2_fast(part[p].most - zero), part[p].sum, all);
      weights.weight[i] = all > 0 ? share * reciprocal_fast(all) : 0.f;
      if (lane % softmax_parts == 0) {
        const int g = i * heads_at_once + lane / softmax_parts;
        memory.own_log_sum()[g] = (base + log2_fast(all)) * ln_2;
        if (g / 2 % keepers == keeper) memory.whole[g] = {base, all};
      }
    }
    __syncwarp();
    return weights;
  }

  /// The log-sum-exp of a whole, exactly.
  __device__ static float log_sum_of(const SoftmaxPart& whole) {
    const float log_sum = (whole.most + log2f(whole.sum)) * ln_2;  // whatever it is: a branch would wait
    return whole.sum > 0 ? log_sum : -INFINITY;
  }

  /// A head's output as its parts are, from what the warps left of a token's row.
  struct HeadOutput {
    Dtype elements;
    float weight[stream_warps + 1];
    const float* part;  // of the first warp; the next one's is `step` floats further
    int step, value_dim;
    const std::uint16_t* newest_value;
    /// f(first channel, four neighbouring channels) for half a warp's share of them, eight of every 128 a lane. A loop: code that is
    /// twice as long is fetched twice as long.
    template <class F>
    __device__ __forceinline__ void each(F f) const {
#pragma unroll 1
      for (int c = 4 * static_cast<int>(threadIdx.x % 16); c < value_dim; c += 64) {
        float4 o{}, of_warp[stream_warps];
        const auto add = [&](float each, const float4& x) {
          o.x = __fmaf_rn(x.x, each, o.x), o.y = __fmaf_rn(x.y, each, o.y);
          o.z = __fmaf_rn(x.z, each, o.z), o.w = __fmaf_rn(x.w, each, o.w);
        };
#pragma unroll
        for (int w = 0; w < stream_warps; ++w) of_warp[w] = *reinterpret_cast<const float4*>(part + w * step + c);
        const float4 newest = load_four(newest_value, elements, c);
#pragma unroll
        for (int w = 0; w < stream_warps; ++w) add(weight[w], of_warp[w]);
        add(weight[stream_warps], newest);
        f(c, o);
      }
    }
  };
  /// That of the g-th of `group` heads, g's pair being the same in both halves of the warp, of a row whose streams are `width` wide;
  /// beyond the last head that one's.
  __device__ HeadOutput output_of(int g, const Weights& weights, int group, int value_dim, int width, int token,
                                  const void* newest_value, const RowMemory& memory) const {
    g = min(g, group - 1);
    const int pitch = stream_pitch(width), first_lane = g % heads_at_once * softmax_parts;
    const float of_head = g < heads_at_once ? weights.weight[0] : weights.weight[stream_heads / heads_at_once - 1];
    static_assert(stream_heads / heads_at_once <= 2 && heads_at_once % 2 == 0);
    HeadOutput output{elements,      {},        memory.stream.partial_of(token, group, width) + g * pitch,
                      group * pitch, value_dim, static_cast<const std::uint16_t*>(newest_value)};
#pragma unroll
    for (int p = 0; p <= stream_warps; ++p) output.weight[p] = __shfl_sync(~0u, of_head, first_lane + p);
    return output;
  }
  /// The head of a pair that this half of a warp has to do with.
  __device__ static int head_of_pair(int pair) { return 2 * pair + static_cast<int>(threadIdx.x / 16 % 2); }

  /// Log-sum-exps and outputs from what the warps left. All threads; a barrier before, and one must follow, but for the
  /// warp's own log-sum-exps.
  __device__ void combine(const RowLook& look, const RowNow& now, RowMemory& memory) const {
    const bool keeps = threadIdx.x / 32 == team_warps - 1;
    const Weights weights = log_sums(look.group, memory, now.query_token, keeps ? 0 : -1, 1);
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (keeps && lane < look.group) memory.log_sum[lane] = log_sum_of(memory.whole[lane]);
    const int pair = static_cast<int>(threadIdx.x / 32), g = head_of_pair(pair), dv = look.value_dim;
    if (2 * pair >= look.group) return;
    const HeadOutput output = output_of(g, weights, look.group, dv, stream_width(look.key_dim, dv), now.query_token,
                                        now.newest_value, memory);
    output.each([&](int c, const float4& o) {
      if (g < look.group) *reinterpret_cast<float4*>(memory.output + g * dv + c) = o;
    });
  }
  static_assert(2 * team_warps >= stream_heads);

 private:
  __device__ float bent(const RowLook& look, const RowNow& now, int slot, float dot) const {
    if (simple) return dot * look.scale;
    return look.masked && look.hidden(slot, now.query_token) ? -INFINITY : detail::logit_of(look, dot);
  }

  __device__ void probe_slot(const RowLook& look, int slot) const {
    probe_row(look, slot, DeviceRow::at(look.keys, elements, slot, look.key_dim).data);
  }
  __device__ void probe_row(const RowLook& look, int slot, const void* key) const {
    const float dot =
        WarpRows{}.dot(DeviceRow{key, look.key_dim, elements}, detail::FloatRow{look.probe_vector, look.key_dim});
    if (threadIdx.x % 32 == 0) look.probe[slot] = dot;
  }
};

}  // namespace kv
