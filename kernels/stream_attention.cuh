// One query row per head of a group against a long cache, near the read bandwidth of the card: what a decode step is made
// of. Keys and values are read once, by asynchronous copies of 512 neighbouring bytes a warp (in any other order of lanes
// such a copy moves every sector twice), into a ring that is the warp's own: there is no barrier between memory and tensor
// cores, and rows are swizzled so that there is no bank conflict either.
//
// Products are mma.m16n8k16: queries times keys, then values times probabilities. The order of channels inside a dot
// product, and of output channels, is free: each lane takes 8 neighbouring channels of a row as one load. Of the 16 rows of
// the queries 8 are heads; the others hold the policy's probe vector in three parts (24 bits of it). Probabilities enter the
// second product as two 16-bit words.
#pragma once
#include "kernels/elements.cuh"
#include "kernels/team.cuh"
#include "kernels/tensor_words.cuh"

namespace kv {

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
  float* logits =
      nullptr;  // [group][logit_stride], null = not wanted; without bias, -infinity where hidden; pairs aligned
  int logit_stride = 0;
  const float* probe_vector = nullptr;  // [key_dim] or null
  float* probe = nullptr;               // [slots] key . probe_vector

  __device__ bool hidden(int slot) const {
    const int t = token[slot];
    return t > query_token || t > newest_key || (window > 0 && query_token - t >= window);
  }
};

/// Running maximum (in units of log 2) and sum of one warp's part of a softmax, for one head.
struct SoftmaxPart {
  float most, sum;
};

/// Shared memory of a stream.
struct StreamMemory {
  uint4* ring;             // [team_warps][2][8 * 32]: a tile of keys and one of values per warp
  SoftmaxPart* parts;      // [team_warps][group]
  float* partial;          // [team_warps][group][value_dim padded to stream_pitch]
  unsigned* probe;         // [4][query_pitch / 2] the probe vector's parts as elements, and zeros
  std::uint16_t* queries;  // [stream_heads][query_pitch] the group's queries, zeros beyond
};

namespace detail {

/// softcap(scale * dot), as the CPU engine rounds it.
__device__ inline float logit_of(const RowLook& look, float dot) {
  const float x = dot * look.scale;
  return look.softcap > 0 ? look.softcap * tanhf(x / look.softcap) : x;
}

}  // namespace detail

/// A warp's lane in a stream: what it fetches, and its part of the outputs. `width` is the key and value dimension rounded
/// up to 64 or 128. Addresses in shared memory are 32-bit ones: generic ones cost an instruction each.
template <class Element, int width, bool probing>
class Stream {
 public:
  static constexpr int key_chunks = width / 32, value_chunks = width / 64;  // 16-byte loads of a lane per row
  static constexpr unsigned row_bytes = width * 2, row_chunks = width / 8;
  static constexpr int copies = stream_tile * row_bytes / 512, rows_a_copy = stream_tile / copies;

  __device__ Stream(const RowLook& look, const StreamMemory& memory)
      : look_(look),
        memory_(memory),
        warp_(static_cast<int>(threadIdx.x / 32)),
        lane_(threadIdx.x % 32),
        row_(static_cast<int>(lane_ / 4)),
        column_(static_cast<int>(lane_ % 4)),
        slots_(look.slots),
        tiles_((look.slots + stream_tile - 1) / stream_tile),
        simple_(look.softcap == 0 && look.bias == nullptr && !look.masked),
        whole_(look.key_dim == width && look.value_dim == width),
        scale_(look.scale),
        logits_(look.logits && row_ < look.group ? look.logits + static_cast<long>(row_) * look.logit_stride : nullptr),
        ring_(shared_address(memory.ring + warp_ * 512)),
        query_(shared_address(memory.queries) + static_cast<unsigned>(row_ * query_pitch(width) + column_ * 8) * 2) {}

  __device__ int first_tile() const { return warp_; }

  __device__ __forceinline__ void fetch_keys(int tile) const { fetch<true>(tile, look_.keys, look_.key_dim, ring_); }
  __device__ __forceinline__ void fetch_values(int tile) const {
    fetch<false>(tile, look_.values, look_.value_dim, ring_ + 4096);
  }

  /// Starts the warp's first tile.
  __device__ void begin() const {
    if (first_tile() >= tiles_) return;
    fetch_keys(first_tile());
    fetch_values(first_tile());
  }

  /// The whole row. The warp's first tile must be under way (begin()). `next`: start the first tile again at the end, for
  /// the next row over the same cache.
  __device__ __forceinline__ void run(bool next) {
#pragma unroll 1
    for (int tile = first_tile(); tile < tiles_; tile += team_warps) {
      const int after = tile + team_warps < tiles_ ? tile + team_warps : next ? first_tile() : -1;
      await_copies<1>();
      __syncwarp();  // every lane's copies are there
      float dots[2][4] = {};
      dot_keys(dots);
      __syncwarp();  // every lane has read its keys
      if (after >= 0)
        fetch_keys(after);
      else
        close_copies();
      unsigned high[2], low[2];
      soften(tile, dots, high, low);
      await_copies<1>();
      __syncwarp();
      add_values(high, low);
      __syncwarp();
      if (after >= 0)
        fetch_values(after);
      else
        close_copies();
    }
    store();
  }

 private:
  /// Where chunk `chunk` of row `row` of a tile lies. A quarter of a warp reads two rows of four neighbouring chunks of keys,
  /// or one pair of chunks of four rows of values, every other one: each must meet all eight groups of banks.
  template <bool keys>
  __device__ static constexpr unsigned place(unsigned row, unsigned chunk) {
    return row * row_bytes + (chunk ^ (keys ? (row & 1) << 2 : (row >> 1 & 3) << 1)) * 16;
  }

  /// A tile of rows, 512 bytes a copy.
  template <bool keys>
  __device__ __forceinline__ void fetch(int tile, const void* rows, int dim, unsigned to) const {
    const unsigned row = lane_ / row_chunks, chunk = lane_ % row_chunks;
    if (whole_ && (tile + 1) * stream_tile <= slots_) {  // neighbours in memory from the first row to the last
      const char* from =
          static_cast<const char*>(rows) + static_cast<long>(tile) * (stream_tile * row_bytes) + lane_ * 16;
#pragma unroll
      for (int i = 0; i < copies; ++i)
        copy_16(to + place<keys>(row + static_cast<unsigned>(i * rows_a_copy), chunk), from + i * 512);
    } else {
      const int first = tile * stream_tile;
#pragma unroll 1
      for (int i = 0; i < copies; ++i) {
        const int slot = first + i * rows_a_copy + static_cast<int>(row);
        const bool there = slot < slots_ && static_cast<int>(chunk) * 8 < dim;
        const char* from = static_cast<const char*>(rows) + (static_cast<long>(slot) * dim + chunk * 8) * 2;
        copy_16(to + place<keys>(row + static_cast<unsigned>(i * rows_a_copy), chunk),
                there ? from : static_cast<const char*>(rows), there);
      }
    }
    close_copies();
  }

  __device__ __forceinline__ void dot_keys(float (&dots)[2][4]) const {
#pragma unroll
    for (int j = 0; j < key_chunks; ++j) {
      const uint4 query = load_shared(query_ + j * 64);
      uint4 probe{};
      if constexpr (probing)
        probe =
            load_shared(shared_address(memory_.probe) +
                        static_cast<unsigned>((row_ < 3 ? row_ : 3) * query_pitch(width) + column_ * 8) * 2 + j * 64);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const uint4 key = load_shared(
            ring_ + place<true>(static_cast<unsigned>(t * 8 + row_), static_cast<unsigned>(column_ + 4 * j)));
        Words<Element>::mma(dots[t], {query.x, probe.x, query.y, probe.y}, key.x, key.y);
        Words<Element>::mma(dots[t], {query.z, probe.z, query.w, probe.w}, key.z, key.w);
      }
    }
  }

  /// Turns a tile's dots into logits, keeps them, moves the running maximum and gives probabilities as two words.
  __device__ __forceinline__ void soften(int tile, float (&dots)[2][4], unsigned (&high)[2], unsigned (&low)[2]) {
    const int slot = tile * stream_tile + 2 * column_;
    if constexpr (probing) keep_probe(slot, dots[0]), keep_probe(slot + 8, dots[1]);
    float x[4];  // in units of log 2
    if (simple_ && (tile + 1) * stream_tile <= slots_) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = dots[i / 2][i % 2] * scale_;
      if (logits_) {
        *reinterpret_cast<float2*>(logits_ + slot) = {x[0], x[1]};
        *reinterpret_cast<float2*>(logits_ + slot + 8) = {x[2], x[3]};
      }
#pragma unroll
      for (float& each : x) each *= log2_e;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = bent_logit(slot + i / 2 * 8 + i % 2, dots[i / 2][i % 2]);
    }
    float most = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    if (__any_sync(~0u, most > most_)) rescale(most);
    const float base = most_ == -INFINITY ? 0.f : most_;
    float p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p[i] = exp2_fast(x[i] - base);
      sum_ += p[i];
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) Words<Element>::split(p[2 * t], p[2 * t + 1], high[t], low[t]);
  }

  /// The logit of one slot under whatever bends or hides it, kept, and with its bias in units of log 2.
  __device__ float bent_logit(int slot, float dot) const {
    const bool there = slot < slots_ && !(look_.masked && look_.hidden(slot));
    const float logit = there ? detail::logit_of(look_, dot) : -INFINITY;
    if (logits_ && slot < slots_) logits_[slot] = logit;
    return (look_.bias && there ? logit + look_.bias[slot] : logit) * log2_e;
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
    const float next = fmaxf(most_, most), factor = next == -INFINITY ? 1.f : exp2_fast(most_ - next);
    most_ = next, sum_ *= factor;
    const float one = __shfl_sync(~0u, factor, 8 * column_), other = __shfl_sync(~0u, factor, 8 * column_ + 4);
#pragma unroll
    for (auto& part : output_) part[0] *= one, part[1] *= other, part[2] *= one, part[3] *= other;
  }

  /// Values are the left operand, a channel a row; the probabilities of all heads are the right one, as they came out of
  /// the dots. A word of a value holds two channels: rows r and r + 8 of a product.
  __device__ __forceinline__ void add_values(const unsigned (&high)[2], const unsigned (&low)[2]) {
#pragma unroll
    for (int j = 0; j < value_chunks; ++j) {
      uint4 rows[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned slot = static_cast<unsigned>(i / 2 * 8 + 2 * column_ + i % 2);
        rows[i] = load_shared(ring_ + 4096 + place<false>(slot, static_cast<unsigned>(row_ + 8 * j)));
      }
      const auto add = [&](float(&part)[4], unsigned a, unsigned b, unsigned c, unsigned d) {
        const unsigned near = __byte_perm(a, b, 0x5410),
                       next = __byte_perm(a, b, 0x7632);  // pairs of slots side by side
        const unsigned far = __byte_perm(c, d, 0x5410), last = __byte_perm(c, d, 0x7632);
        Words<Element>::mma(part, {near, next, far, last}, high[0], high[1]);
        Words<Element>::mma(part, {near, next, far, last}, low[0], low[1]);
      };
      add(output_[j * 4], rows[0].x, rows[1].x, rows[2].x, rows[3].x);
      add(output_[j * 4 + 1], rows[0].y, rows[1].y, rows[2].y, rows[3].y);
      add(output_[j * 4 + 2], rows[0].z, rows[1].z, rows[2].z, rows[3].z);
      add(output_[j * 4 + 3], rows[0].w, rows[1].w, rows[2].w, rows[3].w);
    }
  }

  /// The warp's part of every head's output, unnormalised.
  __device__ void store() {
    sum_ += __shfl_xor_sync(~0u, sum_, 1);
    sum_ += __shfl_xor_sync(~0u, sum_, 2);
    const int group = look_.group, value_dim = look_.value_dim, pitch = stream_pitch(value_dim);
    if (column_ == 0 && row_ < group) memory_.parts[warp_ * group + row_] = {most_, sum_};
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int head = 2 * column_ + side;
      if (head >= group) continue;
      float* to = memory_.partial + static_cast<long>(warp_ * group + head) * pitch + row_ * 8;
#pragma unroll
      for (int i = 0; i < 4 * value_chunks; ++i)
        if ((row_ + i / 4 * 8) * 8 < value_dim)
          *reinterpret_cast<float2*>(to + i / 4 * 64 + i % 4 * 2) = {output_[i][side], output_[i][side + 2]};
    }
  }

  const RowLook& look_;  // in shared memory: what is needed once a tile is read there
  const StreamMemory& memory_;
  const int warp_;
  const unsigned lane_;
  const int row_, column_, slots_, tiles_;
  const bool simple_;  // logits are neither bent, biased nor hidden
  const bool whole_;   // rows are as wide as the lanes' constants say
  const float scale_;
  float* const logits_;  // of head row_; null beyond the group, or where nobody asks
  const unsigned ring_, query_;
  float output_[value_chunks * 4][4] = {};
  float most_ = -INFINITY, sum_ = 0;
};

/// Fills StreamMemory::queries, with zeros beyond the group and the dimension. All threads; a barrier must follow.
__device__ inline void stage_queries(const RowLook& look, std::uint16_t* queries) {
  const int width = stream_width(look.key_dim, look.value_dim), chunks = width / 8, pitch = query_pitch(width);
  for (int i = static_cast<int>(threadIdx.x); i < stream_heads * chunks; i += team_threads) {
    const int head = i / chunks, chunk = i % chunks;
    uint4 words{};
    if (head < look.group && chunk * 8 < look.key_dim)
      words = *reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(look.query) + head * look.query_stride +
                                              chunk * 8);
    *reinterpret_cast<uint4*>(queries + head * pitch + chunk * 8) = words;
  }
}

/// Fills StreamMemory::probe: three rows of elements whose sum is the vector to 24 bits, and one of zeros. All threads; a
/// barrier must follow.
template <class Element>
__device__ void split_probe(const RowLook& look, unsigned* words) {
  const int width = stream_width(look.key_dim, look.value_dim), pitch = query_pitch(width) / 2;
  for (int i = static_cast<int>(threadIdx.x); i < width / 2; i += team_threads) {
    float x = 2 * i < look.key_dim ? look.probe_vector[2 * i] : 0.f,
          y = 2 * i < look.key_dim ? look.probe_vector[2 * i + 1] : 0.f;
    for (int part = 0; part < 3; ++part) {
      const unsigned word = Words<Element>::pack(x, y);
      const float2 taken = Words<Element>::unpack(word);
      x -= taken.x, y -= taken.y;
      words[part * pitch + i] = word;
    }
    words[3 * pitch + i] = 0;
  }
}

/// Streams the look's slots; `resume` when the warp's first tile is under way since the last row, `next` to start it again
/// for the next one. Leaves parts and partial sums in `memory`; a barrier must follow.
template <class Element, int width, bool probing>
__device__ __forceinline__ void stream_here(const RowLook& look, const StreamMemory& memory, bool resume, bool next) {
  Stream<Element, width, probing> stream(look, memory);
  if (!resume) {
    await_copies<0>();
    stream.begin();
  }
  stream.run(next);
}

/// The same as a call, which has to save a register for each that it takes: for rows that are not the many.
template <class Element, int width>
__device__ __noinline__ void stream_row(const RowLook& look, const StreamMemory& memory, bool resume, bool next) {
  if (look.probe_vector)
    stream_here<Element, width, true>(look, memory, resume, next);
  else
    stream_here<Element, width, false>(look, memory, resume, next);
}

}  // namespace kv
