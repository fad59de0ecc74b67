// One query row per head of a group against a long cache, near the read bandwidth of the card: what a decode step is made
// of. Keys and values are read once, by 16-byte asynchronous copies in which every lane fetches just what it will multiply
// itself: lanes share nothing, so there is no barrier, no swizzle and no bank conflict between memory and tensor cores.
//
// Products are mma.m16n8k16 with the queries as the left operand. The order of channels inside a dot product, and of
// output channels, is free: each lane takes 8 neighbouring channels of a row as one load. Of the 16 rows of the left
// operand the first 8 are heads; in Q.K the others hold the policy's probe vector in three parts (24 bits of it), in P.V
// they hold what is left of the probabilities after rounding to 16 bits.
#pragma once
#include "kernels/elements.cuh"
#include "kernels/team.cuh"

namespace kv {

constexpr float log2_e = 1.44269504088896340736f;

/// The queries of one token, and what they look at. Slots [0, slots) are streamed.
struct RowLook {
  const void *keys = nullptr, *values = nullptr;
  const void* query = nullptr;  // head g's row: query + g * query_stride elements
  long query_stride = 0;
  int slots = 0, key_dim = 0, value_dim = 0, group = 1;
  float scale = 1, softcap = 0;
  const float* bias = nullptr;  // [slots] or null
  const int* token = nullptr;   // [slots], read only when `masked`
  int query_token = 0, newest_key = 0x7fffffff, window = 0;
  bool masked = false;
  float* logits = nullptr;  // [group][logit_stride], null = not wanted; without bias, -infinity where hidden
  int logit_stride = 0;
  const float* probe_vector = nullptr;  // [key_dim] or null
  float* probe = nullptr;               // [slots] key . probe_vector

  __device__ bool hidden(int slot) const {
    const int t = token[slot];
    return t > query_token || t > newest_key || (window > 0 && query_token - t >= window);
  }
};

/// Running maximum and sum of one warp's part of a softmax, for one head.
struct SoftmaxPart {
  float most, sum;
};

/// Shared memory of a stream.
struct StreamMemory {
  uint4* ring;          // [team_warps][2][8 * 32]: a tile of keys and one of values per warp
  SoftmaxPart* parts;   // [team_warps][group]
  float* partial;       // [team_warps][group][value_dim padded to stream_pitch]
  unsigned* probe;      // [3][key_dim / 2] the probe vector's parts as elements
};

namespace detail {

__device__ inline void copy_async(uint4* to, const void* from, bool there) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int still_flying>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(still_flying) : "memory");
}

template <bool half>
__device__ inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  if constexpr (half)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// Two floats as one word of 16-bit elements, the first in the lower half; and back.
template <bool half>
__device__ inline unsigned pack(float low, float high) {
  unsigned word;
  if constexpr (half)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <bool half>
__device__ inline float2 unpack(unsigned word) {
  if constexpr (half) return __half22float2(*reinterpret_cast<const __half2*>(&word));
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

/// softcap(scale * dot), as the CPU engine rounds it.
__device__ inline float logit_of(const RowLook& look, float dot) {
  const float x = dot * look.scale;
  return look.softcap > 0 ? look.softcap * tanhf(x / look.softcap) : x;
}

}  // namespace detail

/// A warp's lane in a stream: which rows and channels it fetches, and its part of the queries and outputs. `width` is the
/// key and value dimension rounded up to 64 or 128.
template <bool half, int width>
class Stream {
 public:
  static constexpr int key_chunks = width / 32, value_chunks = width / 64;  // 16-byte loads of a lane per row

  __device__ Stream(const RowLook& look, const StreamMemory& memory)
      : look_(look),
        memory_(memory),
        warp_(static_cast<int>(threadIdx.x / 32)),
        lane_(static_cast<int>(threadIdx.x % 32)),
        row_(lane_ / 4),
        column_(lane_ % 4),
        keys_(memory.ring + warp_ * 512),
        values_(keys_ + 256) {}

  __device__ int first_tile() const { return warp_; }
  __device__ int tiles() const { return (look_.slots + stream_tile - 1) / stream_tile; }

  __device__ void fetch_keys(int tile) const {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int slot = tile * stream_tile + t * 8 + row_;
      const auto* row = static_cast<const std::uint16_t*>(look_.keys) + static_cast<long>(slot) * look_.key_dim;
#pragma unroll
      for (int j = 0; j < key_chunks; ++j) {
        const int chunk = column_ + 4 * j;
        const bool there = slot < look_.slots && chunk * 8 < look_.key_dim;
        detail::copy_async(keys_ + (t * key_chunks + j) * 32 + lane_, there ? row + chunk * 8 : look_.keys, there);
      }
    }
    detail::copies_end();
  }
  __device__ void fetch_values(int tile) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int slot = tile * stream_tile + (i / 2) * 8 + 2 * column_ + i % 2;
      const auto* row = static_cast<const std::uint16_t*>(look_.values) + static_cast<long>(slot) * look_.value_dim;
#pragma unroll
      for (int j = 0; j < value_chunks; ++j) {
        const int chunk = row_ + 8 * j;
        const bool there = slot < look_.slots && chunk * 8 < look_.value_dim;
        detail::copy_async(values_ + (i * value_chunks + j) * 32 + lane_, there ? row + chunk * 8 : look_.values, there);
      }
    }
    detail::copies_end();
  }

  /// The whole row. The warp's first tile must be under way (begin()). `next`: start the first tile again at the end, for
  /// the next row over the same cache.
  __device__ void run(bool next) {
    load_queries();
    const int tiles_here = tiles();
    for (int tile = first_tile(); tile < tiles_here; tile += team_warps) {
      const int after = tile + team_warps < tiles_here ? tile + team_warps : next ? first_tile() : -1;
      detail::copies_wait<1>();
      float logit[2][4] = {};
      dot_keys(logit);
      if (after >= 0)
        fetch_keys(after);
      else
        detail::copies_end();
      unsigned high[2], low[2];
      soften(tile, logit, high, low);
      detail::copies_wait<1>();
      add_values(high, low);
      if (after >= 0)
        fetch_values(after);
      else
        detail::copies_end();
    }
    store();
  }

  /// Starts the warp's first tile.
  __device__ void begin() const {
    if (first_tile() >= tiles()) return;
    fetch_keys(first_tile());
    fetch_values(first_tile());
  }

 private:
  __device__ void load_queries() {
    const auto* query = static_cast<const std::uint16_t*>(look_.query) + row_ * look_.query_stride;
#pragma unroll
    for (int j = 0; j < key_chunks; ++j) {
      const int chunk = column_ + 4 * j;
      uint4 words{};
      if (row_ < look_.group && chunk * 8 < look_.key_dim) words = *reinterpret_cast<const uint4*>(query + chunk * 8);
      query_[j] = words;
    }
  }

  __device__ void dot_keys(float (&logit)[2][4]) {
#pragma unroll
    for (int j = 0; j < key_chunks; ++j) {
      uint4 probe{};
      const int chunk = column_ + 4 * j;
      if (look_.probe_vector && row_ < 3 && chunk * 8 < look_.key_dim)
        probe = *reinterpret_cast<const uint4*>(memory_.probe + row_ * (look_.key_dim / 2) + chunk * 4);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const uint4 key = keys_[(t * key_chunks + j) * 32 + lane_];
        detail::mma<half>(logit[t], query_[j].x, probe.x, query_[j].y, probe.y, key.x, key.y);
        detail::mma<half>(logit[t], query_[j].z, probe.z, query_[j].w, probe.w, key.z, key.w);
      }
    }
  }

  /// Turns a tile's dots into logits, keeps them, moves the running maximum and gives probabilities as two words.
  __device__ void soften(int tile, float (&dots)[2][4], unsigned (&high)[2], unsigned (&low)[2]) {
    const bool is_head = row_ < look_.group;
    float x[4], most = -INFINITY;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int slot = tile * stream_tile + t * 8 + 2 * column_;
      float logit[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool there = slot + i < look_.slots && !(look_.masked && look_.hidden(slot + i));
        logit[i] = there ? detail::logit_of(look_, dots[t][i]) : -INFINITY;
        x[2 * t + i] = look_.bias && there ? logit[i] + look_.bias[slot + i] : logit[i];
        most = fmaxf(most, x[2 * t + i]);
      }
      if (look_.logits && is_head) {
        float* to = look_.logits + static_cast<long>(row_) * look_.logit_stride + slot;
        if (slot < look_.slots) to[0] = logit[0];
        if (slot + 1 < look_.slots) to[1] = logit[1];
      }
      if (look_.probe_vector) keep_probe(slot, dots[t]);
    }
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    if (__any_sync(~0u, is_head && most > most_)) rescale(most);
    const float base = most_ == -INFINITY ? 0.f : most_;
    float p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p[i] = is_head ? exp2f((x[i] - base) * log2_e) : 0.f;
      sum_ += p[i];
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      high[t] = detail::pack<half>(p[2 * t], p[2 * t + 1]);
      const float2 taken = detail::unpack<half>(high[t]);
      low[t] = detail::pack<half>(p[2 * t] - taken.x, p[2 * t + 1] - taken.y);
    }
  }

  /// Rows 8, 9 and 10 of the product are the probe's three parts.
  __device__ void keep_probe(int slot, const float (&dots)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float second = __shfl_down_sync(~0u, dots[2 + i], 4), third = __shfl_down_sync(~0u, dots[2 + i], 8);
      if (row_ == 0 && slot + i < look_.slots) look_.probe[slot + i] = dots[2 + i] + (second + third);
    }
  }

  __device__ void rescale(float most) {
    const float next = fmaxf(most_, most), factor = next == -INFINITY ? 1.f : exp2f((most_ - next) * log2_e);
    most_ = next, sum_ *= factor;
#pragma unroll
    for (auto& accumulator : output_)
#pragma unroll
      for (float& x : accumulator) x *= factor;
  }

  __device__ void add_values(const unsigned (&high)[2], const unsigned (&low)[2]) {
#pragma unroll
    for (int j = 0; j < value_chunks; ++j) {
      uint4 rows[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) rows[i] = values_[(i * value_chunks + j) * 32 + lane_];
      const auto add = [&](int word, unsigned a, unsigned b, unsigned c, unsigned d) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {  // pairs of slots side by side, channel by channel
          const unsigned pick = odd ? 0x7632 : 0x5410;
          detail::mma<half>(output_[j * 8 + word * 2 + odd], high[0], low[0], high[1], low[1],
                            __byte_perm(a, b, pick), __byte_perm(c, d, pick));
        }
      };
      add(0, rows[0].x, rows[1].x, rows[2].x, rows[3].x);
      add(1, rows[0].y, rows[1].y, rows[2].y, rows[3].y);
      add(2, rows[0].z, rows[1].z, rows[2].z, rows[3].z);
      add(3, rows[0].w, rows[1].w, rows[2].w, rows[3].w);
    }
  }

  /// The warp's part of every head's output, unnormalised.
  __device__ void store() {
    sum_ += __shfl_xor_sync(~0u, sum_, 1);
    sum_ += __shfl_xor_sync(~0u, sum_, 2);
    if (row_ >= look_.group) return;
    if (column_ == 0) memory_.parts[warp_ * look_.group + row_] = {most_, sum_};
    float* to = memory_.partial + static_cast<long>(warp_ * look_.group + row_) * stream_pitch(look_.value_dim);
#pragma unroll
    for (int j = 0; j < value_chunks; ++j)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int first = (2 * column_ + side + 8 * j) * 8;
        if (first >= look_.value_dim) continue;
#pragma unroll
        for (int e = 0; e < 8; ++e) to[first + e] = output_[j * 8 + e][side] + output_[j * 8 + e][side + 2];
      }
  }

  const RowLook look_;
  const StreamMemory memory_;
  int warp_, lane_, row_, column_;
  uint4 *keys_, *values_;
  uint4 query_[key_chunks];
  float output_[value_chunks * 8][4] = {};
  float most_ = -INFINITY, sum_ = 0;
};

/// Fills StreamMemory::probe: three words per pair of channels whose sum is the vector to 24 bits. All threads; a barrier
/// must follow.
template <bool half>
__device__ void split_probe(const float* vector, int key_dim, unsigned* words) {
  for (int i = static_cast<int>(threadIdx.x); i < key_dim / 2; i += team_threads) {
    float x = vector[2 * i], y = vector[2 * i + 1];
    for (int part = 0; part < 3; ++part) {
      const unsigned word = detail::pack<half>(x, y);
      const float2 taken = detail::unpack<half>(word);
      x -= taken.x, y -= taken.y;
      words[part * (key_dim / 2) + i] = word;
    }
  }
}

/// Streams the look's slots; `resume` when the warp's first tile is under way since the last row, `next` to start it again
/// for the next one. Leaves parts and partial sums in `memory`; a barrier must follow.
template <bool half, int width>
__device__ __noinline__ void stream_row(const RowLook& look, const StreamMemory& memory, bool resume, bool next) {
  Stream<half, width> stream(look, memory);
  if (!resume) {
    detail::copies_wait<0>();
    stream.begin();
  }
  stream.run(next);
}

}  // namespace kv
