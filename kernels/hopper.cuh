// What Hopper's attention kernels share: tiles in swizzled shared memory, from warps that copy to warpgroups that multiply.
// Tiles have 128 elements a row, in two halves of 64: a half is rows of 128 bytes whose 16-byte chunks are exchanged within
// every 8 rows ("128-byte swizzle").
#pragma once
#include "kernels/hopper_instructions.cuh"
#include "kernels/launch.cuh"
#include "kernels/tensor_tiles.cuh"

namespace kv::blocks {

constexpr int hopper_dim = 128, hopper_tile = 128;               // elements a row, rows of a streamed tile
constexpr int half_64 = 64 * 128, half_128 = 128 * 128;          // bytes of a half of 64 or 128 rows
constexpr int bytes_64 = 2 * half_64, bytes_128 = 2 * half_128;  // bytes of a tile
constexpr int swizzle_bytes = 1024;                              // alignment of tiles

/// What a bias (in units of log 2) weighs where probabilities are only summed: 2^bias, or no number where it is too far from 1,
/// since the probabilities without it may be out of range.
__device__ inline float weight_of(float bias2) { return fabsf(bias2) <= 64 ? exp2_fast(bias2) : NAN; }

/// A shuffle's result: so the compiler knows that all of a warp have the same, and what follows from it needs no lanes.
__device__ inline int warpgroup_of_warp() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0); }

/// Every lane arrives after its last read: a single arrival a warpgroup would let the copies overtake its slower warps, and one a
/// warp speaks for its lane alone, as far as compute-sanitizer knows.
__device__ inline void release(uint32_t barrier) { barrier_arrive(barrier); }

/// Byte offset of a chunk (of 16) of a row in a tile whose halves are `half_bytes` apart.
__device__ inline uint32_t half_offset(int row, int chunk, int half_bytes) {
  return swizzled_place(static_cast<uint32_t>(row), static_cast<uint32_t>(chunk), static_cast<uint32_t>(half_bytes));
}

/// A warpgroup starts copying 64 rows of its own, of these indices.
__device__ inline void copy_own_rows(uint32_t tile, const void* rows, const int* index) {
  const int thread = static_cast<int>(threadIdx.x % 128), chunk = thread % 16;
  const char* const from = static_cast<const char*>(rows) + chunk * 16;
#pragma unroll 4
  for (int row = thread / 16; row < 64; row += 8)
    copy_16(tile + half_offset(row, chunk, half_64), from + long{index[row]} * 256);
}

/// A warp starts copying a tile's rows that follow one another; rows from `count` on are zeros.
template <int height = hopper_tile>
__device__ void copy_tile(uint32_t tile, const void* rows, int count) {
  constexpr int half_bytes = height * 128;
  const int lane = static_cast<int>(threadIdx.x % 32), odd = lane / 16, chunk = lane % 16;
  const char* from = static_cast<const char*>(rows) + odd * 256 + chunk * 16;
  uint32_t to[4];  // two rows a step: the exchange repeats after four
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = tile + half_offset(2 * i + odd, chunk, half_bytes);
  if (count >= height) {
#pragma unroll 1
    for (int i = 0; i < height / 32; ++i, from += 8192) {  // all at once would not fit the registers
      copy_four<0>(to, from), copy_four<1>(to, from), copy_four<2>(to, from), copy_four<3>(to, from);
#pragma unroll
      for (uint32_t& address : to) address += 4096;
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < height / 2; ++i) {
      const bool real = 2 * i + odd < count;
      const uint32_t step_to = tile + half_offset(2 * i + odd, chunk, half_bytes);
      copy_16(step_to, real ? from + i * 512 : rows, real);
    }
  }
}

/// A warp starts copying 128 rows of 256 bytes; lane l knows the indices of rows l, l + 32, l + 64, l + 96, -1 for zeros.
__device__ inline void copy_rows(uint32_t tile, const void* rows, const int (&index)[4]) {
  const int lane = static_cast<int>(threadIdx.x % 32), odd = lane / 16, chunk = lane % 16;
  const int first = __shfl_sync(~0u, index[0], 0);
  bool in_order = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) in_order = in_order && index[i] == first + 32 * i + lane;
  if (__all_sync(~0u, in_order)) return copy_tile(tile, static_cast<const char*>(rows) + long{first} * 256, 128);
#pragma unroll
  for (int part = 0; part < 4; ++part)
#pragma unroll 2
    for (int i = 0; i < 16; ++i) {
      const int at = __shfl_sync(~0u, index[part], 2 * i + odd);
      const char* const from = static_cast<const char*>(rows) + (at < 0 ? 0 : long{at} * 256 + chunk * 16);
      copy_16(tile + half_offset(32 * part + 2 * i + odd, chunk, half_128), from, at >= 0);
    }
}

#ifdef KV_HOPPER
/// Starts d = A B^T for a tile of 64 rows and one of 128.
template <class Element>
__device__ __forceinline__ void start_dots(Accumulators& d, uint32_t a, uint32_t b) {
  // Made once: what makes an operand of an address would stand between the products.
  const uint64_t first_a = operand(a, 16, 1024), first_b = operand(b, 16, 1024);
  pin(d);
  products_begin();
#pragma unroll
  for (int k = 0; k < 8; ++k)
    product<Element>(d, further(first_a, k / 4 * half_64 + k % 4 * 32), further(first_b, k / 4 * half_128 + k % 4 * 32),
                     k > 0);
  products_end();
}

/// Warpgroups that start their dots one after another, so that one's softmax runs under the others' dots.
template <int groups>
struct Turns {
  const int mine, next = (mine + 1) % groups;

  __device__ explicit Turns(int warpgroup) : mine(warpgroup) {
    if (next == 0) pass();
  }
  __device__ void wait() const { named_wait(1 + mine, 256); }
  __device__ void pass() const { named_arrive(1 + next, 256); }
  /// After the last turn: nobody arrives at a barrier that nobody waits for.
  __device__ void end() const {
    if (mine == 0) wait();
  }
};

/// Probabilities of 64 x 128 as operands, both words of each, or, `fast`, each rounded to one.
template <bool fast>
struct SplitTile {
  uint32_t high[8][4], low[fast ? 1 : 8][4];

  template <class Element>
  __device__ __forceinline__ void split(const Accumulators& p) {
#pragma unroll
    for (int k = 0; k < 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if constexpr (fast)
          high[k][i] = Words<Element>::pack(p[2 * k + i / 2][i % 2 * 2], p[2 * k + i / 2][i % 2 * 2 + 1]);
        else
          Words<Element>::split(p[2 * k + i / 2][i % 2 * 2], p[2 * k + i / 2][i % 2 * 2 + 1], high[k][i], low[k][i]);
  }
};

/// Starts o += P V for a tile of 128 slots.
template <class Element, bool fast>
__device__ __forceinline__ void start_values(Accumulators& o, const SplitTile<fast>& p, uint32_t v) {
  const uint64_t first = operand(v, half_128, 1024);
  pin(o);
  products_begin();
#pragma unroll
  for (int k = 0; k < 8; ++k) product<Element>(o, p.high[k], further(first, k * 2048));
#pragma unroll
  for (int k = 0; !fast && k < 8; ++k) product<Element>(o, p.low[k], further(first, k * 2048));
  products_end();
}
#endif

}  // namespace kv::blocks
