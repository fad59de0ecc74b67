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
  std::uint16_t* queries;  // [stream_heads][query_pitch] the group's queries, zeros beyond
};

namespace detail {

__device__ inline void copy_async(uint4* to, const void* from, bool there = true) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there ? 16 : 0) : "memory");
}
/// `slots` rows, `row_step` elements apart, of which those at 0, slot_step, ... below `slots_left` are there; of each
/// `chunks` chunks, `chunk_step` elements apart, of which those at 0, left_step, ... below `chunks_left` are. Zeros for
/// what is not. Loops, since most tiles are whole and registers are short.
template <int slots, int chunks>
__device__ inline void copy_some(uint4* to, const std::uint16_t* rows, long row_step, int slot_step, int chunk_step,
                                       int slots_left, int chunks_left, int left_step) {
#pragma unroll 1
  for (int s = 0; s < slots; ++s)
#pragma unroll 1
    for (int j = 0; j < chunks; ++j) {
      const bool there = s * slot_step < slots_left && j * left_step < chunks_left;
      copy_async(to + (s * chunks + j) * 32, there ? rows + s * row_step + j * chunk_step : rows, there);
    }
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
        slots_(look.slots),
        key_dim_(look.key_dim),
        value_dim_(look.value_dim),
        key_rows_(static_cast<const std::uint16_t*>(look.keys)),
        value_rows_(static_cast<const std::uint16_t*>(look.values)),
        keys_(memory.ring + warp_ * 512 + lane_),
        values_(keys_ + 256) {}

  __device__ int first_tile() const { return warp_; }
  __device__ int tiles() const { return (slots_ + stream_tile - 1) / stream_tile; }

  /// A tile's keys: two halves of 8 slots, this lane the chunks column_, column_ + 4, ... of slot row_ of each.
  __device__ void fetch_keys(int tile) const {
    const std::uint16_t* rows = key_rows_ + static_cast<long>(tile * stream_tile + row_) * key_dim_ + column_ * 8;
    if (key_dim_ == width && (tile + 1) * stream_tile <= slots_) {  // offsets are constants
#pragma unroll
      for (int i = 0; i < 2 * key_chunks; ++i)
        detail::copy_async(keys_ + i * 32, rows + i / key_chunks * 8 * width + i % key_chunks * 32);
    } else {
      detail::copy_some<2, key_chunks>(keys_, rows, 8L * key_dim_, 8, 32, slots_ - tile * stream_tile - row_,
                                       key_dim_ / 8 - column_, 4);
    }
    detail::copies_end();
  }
  /// A tile's values: four slots, two of each half, this lane the chunks row_, row_ + 8 of each.
  __device__ void fetch_values(int tile) const {
    const int slot = tile * stream_tile + 2 * column_;
    const std::uint16_t* rows = value_rows_ + static_cast<long>(slot) * value_dim_ + row_ * 8;
    if (value_dim_ == width && (tile + 1) * stream_tile <= slots_) {
#pragma unroll
      for (int i = 0; i < 4 * value_chunks; ++i)
        detail::copy_async(values_ + i * 32, rows + (i / value_chunks / 2 * 8 + i / value_chunks % 2) * width +
                                                 i % value_chunks * 64);
    } else {
#pragma unroll 1
      for (int side = 0; side < 2; ++side)
        detail::copy_some<2, value_chunks>(values_ + side * 2 * value_chunks * 32, rows + side * 8L * value_dim_, value_dim_,
                                           1, 64, slots_ - slot - side * 8, value_dim_ / 8 - row_, 8);
    }
    detail::copies_end();
  }

  /// The whole row. The warp's first tile must be under way (begin()). `next`: start the first tile again at the end, for
  /// the next row over the same cache.
  __device__ void run(bool next) {
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
  __device__ void dot_keys(float (&logit)[2][4]) {
#pragma unroll
    for (int j = 0; j < key_chunks; ++j) {
      uint4 probe{}, query{};
      const int chunk = column_ + 4 * j;
      if (chunk * 8 < key_dim_)
        query = *reinterpret_cast<const uint4*>(memory_.queries + row_ * query_pitch(key_dim_) + chunk * 8);
      if (look_.probe_vector && row_ < 3 && chunk * 8 < key_dim_)
        probe = *reinterpret_cast<const uint4*>(memory_.probe + row_ * (key_dim_ / 2) + chunk * 4);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const uint4 key = keys_[(t * key_chunks + j) * 32];
        detail::mma<half>(logit[t], query.x, probe.x, query.y, probe.y, key.x, key.y);
        detail::mma<half>(logit[t], query.z, probe.z, query.w, probe.w, key.z, key.w);
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
        const bool there = slot + i < slots_ && !(look_.masked && look_.hidden(slot + i));
        logit[i] = there ? detail::logit_of(look_, dots[t][i]) : -INFINITY;
        x[2 * t + i] = look_.bias && there ? logit[i] + look_.bias[slot + i] : logit[i];
        most = fmaxf(most, x[2 * t + i]);
      }
      if (look_.logits && is_head) {
        float* to = look_.logits + static_cast<long>(row_) * look_.logit_stride + slot;
        if (slot < slots_) to[0] = logit[0];
        if (slot + 1 < slots_) to[1] = logit[1];
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
      if (row_ == 0 && slot + i < slots_) look_.probe[slot + i] = dots[2 + i] + (second + third);
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
      for (int i = 0; i < 4; ++i) rows[i] = values_[(i * value_chunks + j) * 32];
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
    float* to = memory_.partial + static_cast<long>(warp_ * look_.group + row_) * stream_pitch(value_dim_);
#pragma unroll
    for (int j = 0; j < value_chunks; ++j)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int first = (2 * column_ + side + 8 * j) * 8;
        if (first >= value_dim_) continue;
#pragma unroll
        for (int e = 0; e < 8; ++e) to[first + e] = output_[j * 8 + e][side] + output_[j * 8 + e][side + 2];
      }
  }

  const RowLook& look_;  // in shared memory: what is needed once a tile is read there
  const StreamMemory& memory_;
  const int warp_, lane_, row_, column_, slots_, key_dim_, value_dim_;
  const std::uint16_t *const key_rows_, *const value_rows_;
  uint4 *const keys_, *const values_;
  float output_[value_chunks * 8][4] = {};
  float most_ = -INFINITY, sum_ = 0;
};

/// Fills StreamMemory::queries. All threads; a barrier must follow.
__device__ inline void stage_queries(const RowLook& look, std::uint16_t* queries) {
  const int chunks = look.key_dim / 8, pitch = query_pitch(look.key_dim);
  for (int i = static_cast<int>(threadIdx.x); i < stream_heads * chunks; i += team_threads) {
    const int head = i / chunks, chunk = i % chunks;
    uint4 words{};
    if (head < look.group)
      words = *reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(look.query) + head * look.query_stride +
                                              chunk * 8);
    *reinterpret_cast<uint4*>(queries + head * pitch + chunk * 8) = words;
  }
}

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
__device__ __forceinline__ void stream_here(const RowLook& look, const StreamMemory& memory, bool resume, bool next) {
  Stream<half, width> stream(look, memory);
  if (!resume) {
    detail::copies_wait<0>();
    stream.begin();
  }
  stream.run(next);
}

/// The same as a call, which has to save a register for each that it takes: for rows that are not the many.
template <bool half, int width>
__device__ __noinline__ void stream_row(const RowLook& look, const StreamMemory& memory, bool resume, bool next) {
  stream_here<half, width>(look, memory, resume, next);
}

}  // namespace kv
