// A warp's ring of tiles, which goes on over rows: where a tile lies in shared memory, what is under way, how a slot that changes
// meanwhile is patched.
#pragma once
#include "kernels/stream_look.cuh"
#include "kernels/team.cuh"

namespace kv {

/// Of tiles whose rows are `width` (64 or 128) channels of 16 bits.
template <int width>
struct TileRing {
  static constexpr unsigned row_bytes = width * 2, tile_bytes = stream_tile * row_bytes;
  static constexpr unsigned box_bytes = stream_tile * 128;  // 64 channels of a tile
  static constexpr unsigned stage_bytes = 2 * tile_bytes;
  static constexpr int depth = stream_ring_bytes / static_cast<int>(stage_bytes);

  /// Where chunk `chunk` of row `row` of a tile lies: as a copy of a box swizzles 128-byte rows.
  __device__ static constexpr unsigned place(unsigned row, unsigned chunk) {
    return swizzled_place(row, chunk, box_bytes);
  }
  /// The row of a tile's half that is the n-th in products: a quarter of a warp reads two neighbours' four chunks of keys, which
  /// must meet all eight groups of banks. Elements 2c and 2c + 1 of a product are thus rows c and c + 4.
  template <class T>
  __device__ static constexpr unsigned row_of(T n) {
    return static_cast<unsigned>(n) / 2 | (static_cast<unsigned>(n) & 1) << 2;
  }

  /// Whether a row of so many tiles can start the next one's: every warp must have that many.
  __device__ static bool goes_on(int tiles) { return tiles >= depth * stream_warps; }

  /// The ring after run(ring, next) over `slots` slots; by all threads.
  __device__ static void advance(Ring& ring, int slots, bool next) {
    const int tiles = (slots + stream_tile - 1) / stream_tile, warp = static_cast<int>(threadIdx.x / 32) % stream_warps;
    ring.turns = first_turn(ring) + static_cast<unsigned>((tiles - warp + stream_warps - 1) / stream_warps);
    ring.running = ring.filled = next && goes_on(tiles), ring.tiles = tiles;
  }

  /// Waits for what is under way; by the warps that stream.
  __device__ static void drain(const StreamMemory& memory, const Ring& ring) {
    if constexpr (copies_boxes) {
      if (!ring.filled) return;
      const unsigned landed = landed_of(memory, warp_of_team());
#pragma unroll
      for (unsigned i = 0; i < depth; ++i) await<true>(landed, ring.turns + i), await<false>(landed, ring.turns + i);
    } else {
      await_copies<0>();
      __syncwarp();
    }
  }

  /// The turn of a row's first tile: what is under way without being wanted is taken out before.
  __device__ static unsigned first_turn(const Ring& ring) {
    return ring.turns + (!ring.running && ring.filled ? depth : 0);
  }

  /// A row's new content where a running ring already holds the slot; by the warp that it belongs to. `key` and `value` are
  /// in shared or device memory.
  __device__ static void patch(const StreamMemory& memory, const Ring& ring, int slot, const RowLook& look,
                               const void* key, const void* value) {
    const int tile = slot / stream_tile, turn = tile / stream_warps;
    if (!ring.running || turn >= depth || tile >= ring.tiles) return;
    drain(memory, ring);
    const unsigned stage = (ring.turns + static_cast<unsigned>(turn)) % depth, row = slot % stream_tile;
    const unsigned base = shared_address(memory.ring) + static_cast<unsigned>(tile % stream_warps * stream_ring_bytes) +
                          stage * stage_bytes;
    const unsigned chunk = threadIdx.x % 16;
    const bool keys = threadIdx.x % 32 < 16;
    if (static_cast<int>(chunk) * 8 < (keys ? look.key_dim : look.value_dim)) {
      const uint4 words = static_cast<const uint4*>(keys ? key : value)[chunk];
      store_shared(base + (keys ? 0 : tile_bytes) + place(row, chunk), words);
    }
    if constexpr (copies_boxes) written_to_shared();
    __syncwarp();
  }

  /// The warp's barriers: a stage's keys, its values.
  __device__ static unsigned landed_of(const StreamMemory& memory, int warp) {
    return shared_address(memory.landed) + static_cast<unsigned>(warp * 2 * most_stream_depth) * 8;
  }
  template <bool keys>
  __device__ static unsigned barrier_of(unsigned landed, unsigned stage) {
    return landed + stage * 16 + (keys ? 0 : 8);
  }
  /// Waits until the keys or values of the warp's `turn`-th tile are there, for all lanes.
  template <bool keys>
  __device__ __forceinline__ static void await(unsigned landed, unsigned turn) {
    if constexpr (copies_boxes) {
      barrier_wait(barrier_of<keys>(landed, turn % depth), static_cast<int>(turn / depth & 1));
    } else {
      await_copies<2 * depth - 1>();
      __syncwarp();
    }
  }

  /// Whether they are there already; where that cannot be asked, no.
  template <bool keys>
  __device__ __forceinline__ static bool has_landed(unsigned landed, unsigned turn) {
    if constexpr (!copies_boxes) return false;
    return barrier_passed(barrier_of<keys>(landed, turn % depth), static_cast<int>(turn / depth & 1));
  }
};

/// advance() of a ring whose rows are `width` channels wide; and drain().
__device__ __forceinline__ void advance_ring(int width, Ring& ring, int slots, bool next) {
  if (width > 64)
    TileRing<128>::advance(ring, slots, next);
  else
    TileRing<64>::advance(ring, slots, next);
}
__device__ __forceinline__ void drain_ring(int width, const StreamMemory& memory, const Ring& ring) {
  if (width > 64)
    TileRing<128>::drain(memory, ring);
  else
    TileRing<64>::drain(memory, ring);
}

}  // namespace kv
