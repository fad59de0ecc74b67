// A warp's ring: a tile of keys and one of values, which go on over rows: where a tile lies in shared memory, what is under way,
// how a slot that changes meanwhile is patched.
#pragma once
#include "kernels/stream_look.cuh"
#include "kernels/team.cuh"

namespace kv {

/// Of tiles of 16-bit channels, whose rows lie as copies of boxes swizzle them: halves of 64 channels, one behind the other.
struct TileRing {
  __device__ static constexpr unsigned half_bytes(int tile) { return static_cast<unsigned>(tile) * 128; }
  __device__ static constexpr unsigned tile_bytes(int width, int tile) { return half_bytes(tile) * (width / 64); }

  /// Fills StreamMemory::lanes, by one warp; a barrier must follow. Numbers that follow from the thread's index would be computed
  /// again wherever they are used, what is read from memory is kept.
  __device__ static void fill_lanes(StreamMemory& memory, int width, int tile) {
    const unsigned lane = threadIdx.x % 32, half = half_bytes(tile);
    memory.lanes[lane] = {(lane % 8 * static_cast<unsigned>(query_pitch(width)) + lane / 8 * 8) * 2,
                          swizzled_place(lane % 16, lane / 16, half),
                          tile_bytes(width, tile) + swizzled_place(lane / 16 * 8 + lane % 8, lane / 8 % 2, half), 0};
  }

  /// Whether a row of so many tiles can start the next one's: every warp must have one.
  __device__ static bool goes_on(int tiles) { return tiles >= stream_warps; }

  /// The ring after Stream::run(ring, next) over `slots` slots; by all threads.
  __device__ __forceinline__ static void advance(Ring& ring, int tile, int slots, bool next) {
    const int tiles = tile_of(slots + tile - 1, tile), warp = static_cast<int>(threadIdx.x / 32) % stream_warps;
    ring.turns = first_turn(ring) + static_cast<unsigned>((tiles - warp + stream_warps - 1) / stream_warps);
    ring.running = ring.filled = next && goes_on(tiles), ring.tiles = tiles;
  }

  /// Waits for what is under way; by the warps that stream.
  __device__ static void drain(const StreamMemory& memory, const Ring& ring) {
    if constexpr (copies_boxes) {
      if (!ring.filled) return;
      const unsigned landed = landed_of(memory, warp_of_team());
      await<true>(landed, ring.turns), await<false>(landed, ring.turns);
    } else {
      await_copies<0>();
      __syncwarp();
    }
  }

  /// The turn of a row's first tile: what is under way without being wanted is taken out before.
  __device__ static unsigned first_turn(const Ring& ring) { return ring.turns + (!ring.running && ring.filled); }

  /// A row's new content where a running ring already holds the slot; by the warp that it belongs to. `key` and `value` are
  /// in shared or device memory.
  __device__ __forceinline__ static void patch(const StreamMemory& memory, const Ring& ring, int width, int tile,
                                               int slot, const RowLook& look, const void* key, const void* value) {
    const int of = tile_of(slot, tile);
    if (!ring.running || of >= stream_warps || of >= ring.tiles) return;
    drain(memory, ring);
    const unsigned bytes = tile_bytes(width, tile), chunk = threadIdx.x % 16;
    const unsigned base = shared_address(memory.ring) + static_cast<unsigned>(of) * 2 * bytes;
    const bool keys = threadIdx.x % 32 < 16;
    if (static_cast<int>(chunk) * 8 < (keys ? look.key_dim : look.value_dim)) {
      const uint4 words = static_cast<const uint4*>(keys ? key : value)[chunk];
      store_shared(
          base + (keys ? 0 : bytes) + swizzled_place(static_cast<unsigned>(slot % tile), chunk, half_bytes(tile)),
          words);
    }
    if constexpr (copies_boxes) written_to_shared();
    __syncwarp();
  }

  /// Starts copying a tile's rows from a slot on, zeros from slot `slots` on and beyond the dimension; by copies of 16 bytes, 512
  /// neighbouring ones a warp. Closes a group of copies.
  template <int width, int tile>
  __device__ static void copy_by_lanes(unsigned to, const char* rows, int dim, int first, int slots) {
    constexpr unsigned row_chunks = width / 8, copies = tile_bytes(width, tile) / 512, rows_a_copy = tile / copies;
    const unsigned lane = threadIdx.x % 32, chunk = lane % row_chunks;
#pragma unroll
    for (unsigned i = 0; i < copies && first < slots; ++i) {
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
