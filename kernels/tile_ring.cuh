// A warp's ring: a tile of keys and one of values, which stay over rows: where a tile lies in shared memory, which way a row goes
// through them, how a slot that changes meanwhile is patched.
#pragma once
#include "kernels/stream_look.cuh"
#include "kernels/team.cuh"

namespace kv {

/// Of tiles of 16-bit channels, whose rows lie as copies of boxes swizzle them: halves of 64 channels, one behind the other.
struct TileRing {
  __device__ static constexpr unsigned half_bytes(int tile) { return static_cast<unsigned>(tile) * 128; }
  __device__ static constexpr unsigned tile_bytes(int width, int tile) { return half_bytes(tile) * (width / 64); }

  /// Where a lane's row of the b-th block of 16 channels lies, in the m-th of 16 slots, of a tile whose first one is at `first`.
  template <int tile>
  __device__ static unsigned place(unsigned first, int b, int m) {
    return (first ^ static_cast<unsigned>(b % 4) * 32) + static_cast<unsigned>(b / 4) * half_bytes(tile) +
           static_cast<unsigned>(m) * 16 * 128;
  }

  /// Fills StreamMemory::lanes, by one warp; a barrier must follow. Numbers that follow from the thread's index would be computed
  /// again wherever they are used, what is read from memory is kept.
  __device__ static void fill_lanes(StreamMemory& memory, int width, int tile) {
    const unsigned lane = threadIdx.x % 32, half = half_bytes(tile);
    memory.lanes[lane] = {(lane % 8 * static_cast<unsigned>(query_pitch(width)) + lane / 8 * 8) * 2,
                          swizzled_place(lane % 16, lane / 16, half),
                          tile_bytes(width, tile) + swizzled_place(lane / 16 * 8 + lane % 8, lane / 8 % 2, half),
                          lane / 4};
  }

  // A warp goes through its tiles of a row, every stream_warps-th, up, or down where its ring holds the last of them: so rows of
  // the same cache read one tile a warp less. Every warp has a tile, if only of slots that are none: with a way around the loop
  // ptxas may make a second copy of what follows, its barrier included.

  /// Tiles of a row over so many slots.
  __device__ static int tiles_of_row(int slots, int tile) { return max(tile_of(slots + tile - 1, tile), stream_warps); }
  /// Whether a row of so many tiles begins with the tile that the ring holds.
  __device__ static bool holds_first(const Ring& ring, int tiles) { return ring.running && ring.tiles == tiles; }
  /// A row's first tile of a warp.
  __device__ static int first_tile(bool down, int tiles, int warp) {
    return down ? tiles - 1 - static_cast<int>(static_cast<unsigned>(tiles - 1 - warp) % stream_warps) : warp;
  }

  /// The ring after Stream::run over so many tiles; by all threads. `stays`: the next row is of the same cache; `warp`: the thread's.
  __device__ __forceinline__ static void advance(Ring& ring, int tiles, bool stays, int warp) {
    warp %= stream_warps;
    const bool held = holds_first(ring, tiles);
    ring.turns += static_cast<unsigned>(tiles - warp + stream_warps - 1) / stream_warps - (held ? 1 : 0);
    ring.down = !(held && ring.down), ring.running = stays, ring.tiles = tiles;
  }

  /// Whether a ring holds a tile, of the warp that it belongs to.
  __device__ static bool holds(const Ring& ring, int tile) {
    return ring.running && tile == first_tile(ring.down, ring.tiles, tile % stream_warps);
  }
  /// A row's new content where a ring holds the slot; by the warp that it belongs to: a lane has eight channels of the key, or of
  /// the value, if they are `there`. `rings`: where StreamMemory::ring is.
  __device__ __forceinline__ static void patch(unsigned rings, const Ring& ring, int width, int tile, int slot,
                                               const uint4& words, bool there) {
    const int of = tile_of(slot, tile);
    if (!holds(ring, of)) return;
    const unsigned bytes = tile_bytes(width, tile), half = threadIdx.x / 16 % 2;  // of values
    const unsigned at = rings + (static_cast<unsigned>(of % stream_warps) * 2 + half) * bytes;
    if (there)
      store_shared(at + swizzled_place(static_cast<unsigned>(slot % tile), threadIdx.x % 16, half_bytes(tile)), words);
    if constexpr (copies_boxes) written_to_shared();
    __syncwarp();
  }

  /// Starts copying a tile's rows from a slot on, zeros from slot `slots` on and beyond the dimension, none where there are -1; by
  /// copies of 16 bytes, 512 neighbouring ones a warp. Closes a group of copies.
  template <int width, int tile>
  __device__ static void copy_by_lanes(unsigned to, const char* rows, int dim, int first, int slots) {
    constexpr unsigned row_chunks = width / 8, copies = tile_bytes(width, tile) / 512, rows_a_copy = tile / copies;
    const unsigned lane = threadIdx.x % 32, chunk = lane % row_chunks;
#pragma unroll
    for (unsigned i = 0; i < copies && slots >= 0; ++i) {
      const unsigned row = lane / row_chunks + i * rows_a_copy;
      const int slot = first + static_cast<int>(row), channel = static_cast<int>(chunk) * 8;
      const bool there = slot < slots && channel < dim;
      copy_16(to + swizzled_place(row, chunk, half_bytes(tile)),
              there ? rows + (static_cast<long>(slot) * dim + channel) * 2 : rows, there);
    }
    close_copies();
  }

  /// The warp's barriers: of its keys, its values.
  __device__ static unsigned landed_of(const StreamMemory& memory, int warp) {
    return shared_address(memory.landed) + static_cast<unsigned>(warp) * 16;
  }
  template <bool keys>
  __device__ static unsigned barrier_of(unsigned landed) {
    return landed + (keys ? 0 : 8);
  }
  /// Waits until the keys or values of the warp's `turn`-th tile are there, for all lanes.
  template <bool keys>
  __device__ __forceinline__ static void await(unsigned landed, unsigned turn) {
    if constexpr (copies_boxes) {
      barrier_wait(barrier_of<keys>(landed), static_cast<int>(turn & 1));
    } else {
      await_copies<1>();
      __syncwarp();
    }
  }
  /// Whether they are there already; where that cannot be asked, no.
  template <bool keys>
  __device__ __forceinline__ static bool has_landed(unsigned landed, unsigned turn) {
    if constexpr (!copies_boxes) return false;
    return barrier_passed(barrier_of<keys>(landed), static_cast<int>(turn & 1));
  }
};

}  // namespace kv
