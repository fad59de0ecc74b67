// Sizes of what a thread block keeps in shared memory, known to host and device.
#pragma once
#include "core/dtype.hpp"

namespace kv {

constexpr int team_threads = 256, team_warps = team_threads / 32;
constexpr int stream_warps = 4;   // the first warps of a team: they stream the cache, while the others serve the step
constexpr int stream_heads = 8;   // most query heads of a group that can be streamed
constexpr int short_ring = 8192;  // bytes of a warp that streams: its tile of keys and that of values
constexpr int long_ring = 2 * short_ring;  // where the records of steps leave room
constexpr int softmax_parts =
    8;  // most parts that a head's softmax is put together from: a warp's each, the newest slot's, the sink's
static_assert(stream_warps + 2 <= softmax_parts);
constexpr int input_buffers =
    3;  // a step's inputs: of the one before or the one after next, the present one, and the next

constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

/// Slots that a warp takes at a time: 16, or 32.
constexpr int tile_slots(int width, int ring_bytes) { return ring_bytes / (4 * width); }
/// The tile of a slot; whole tiles in so many slots.
constexpr int tile_of(int slot, int tile) {
  return static_cast<int>(static_cast<unsigned>(slot) >> (tile > 16 ? 5 : 4));
}

/// Whether steps of such streams never decide with their layer's other heads: registers are short where tiles are long.
constexpr bool decides_alone(int width, int tile) { return width == 128 && tile == tile_slots(128, long_ring); }

/// Floats between the heads of a warp's partial outputs: apart by a bank's worth, so that stores do not collide.
constexpr int stream_pitch(int width) { return width + 4; }

/// Elements between the heads' queries in shared memory: so that eight rows are read at once.
constexpr int query_pitch(int width) { return width + 8; }

/// Floats between the heads' logits: even, so that two neighbours are stored at once.
constexpr int logit_stride(int slots) { return (slots + 3) / 4 * 4; }

/// The width of the streams that rows of these shapes go through: what a lane's loads are laid out for.
constexpr int stream_width(int key_dim, int value_dim) { return key_dim > 64 || value_dim > 64 ? 128 : 64; }

/// Whether rows of these shapes go over tensor cores (stream_attention.cuh).
constexpr bool streams(Dtype elements, int key_dim, int value_dim, int group) {
  return elements != Dtype::float32 && key_dim % 8 == 0 && value_dim % 8 == 0 && key_dim <= 128 && value_dim <= 128 &&
         group <= stream_heads;
}

/// Rows that a token's queries take in shared memory: those of four heads serve both words of their probabilities.
constexpr int query_rows(int group) { return group > stream_heads / 2 ? stream_heads : stream_heads / 2; }

/// Whether a probe's operand has room beside the queries of a group (key_probe.cuh).
constexpr bool probe_fits(int group) { return group <= stream_heads / 2; }

/// Where rows of a probe's operand lie, in bytes: so that they are read at once with four queries, which have the first four of the
/// eight places in every 128 bytes. The vector's parts have the next two, of tokens in turn, the newest key the seventh, the one
/// that went last the eighth.
constexpr int bank_bytes = 128, place_of_parts = 64, place_of_newest = 96, place_of_gone = 112, probe_parts = 2;
constexpr int up_to_banks(int bytes) { return (bytes + bank_bytes - 1) / bank_bytes * bank_bytes; }
/// From one token's parts to the next one's; to the key that went, its value, and the vector that the latest parts are of.
constexpr int probe_turn(int width) { return up_to_banks(probe_parts * query_pitch(width) * 2); }
constexpr int probe_gone(int width) { return 2 * probe_turn(width) + place_of_gone - place_of_parts; }
constexpr int probe_value(int width) { return probe_gone(width) + width * 2; }
constexpr int probe_vector(int width) { return probe_value(width) + width * 2; }
constexpr int probe_row_bytes(int width) { return probe_vector(width) + width * 4; }
/// What the keys of a tile give with that operand; of every warp's last two.
constexpr int probe_tile_bytes(int tile) { return tile * 4 * 4; }
constexpr int probe_product_bytes(int width, int ring_bytes) {
  return stream_warps * 2 * probe_tile_bytes(tile_slots(width, ring_bytes));
}

/// Rows of outputs: of a group, and what a late fold needs in their place (late_fold.cuh).
constexpr int output_rows(int group) { return group > 2 ? group : 2; }

/// Bytes of RowMemory (token_attention.cuh) in shared memory, with rings of so many bytes. `probes`: rows may have a policy's vector
/// beside their queries.
constexpr int row_memory_bytes(bool streamed, int key_dim, int value_dim, int group, bool probes,
                               int ring_bytes = short_ring) {
  int bytes = output_rows(group) * value_dim * 4 + group * 4;
  if (streamed) {
    const int width = stream_width(key_dim, value_dim);
    // Rings and parts of outputs; queries, the probe's rows and products; keys and values, full outputs.
    bytes += stream_warps * (ring_bytes + 2 * group * stream_pitch(width) * 4) +
             2 * query_rows(group) * query_pitch(width) * 2 +
             (probes ? probe_row_bytes(width) + probe_product_bytes(width, ring_bytes) + 5 * bank_bytes : 0) +
             input_buffers * (2 * width * 2 + group * value_dim * 4);
  }
  return (bytes + 15) / 16 * 16 + 12 * 16;  // every part begins at a multiple of 16
}

/// Bytes of shared memory that a team's own data and the runtime take beside it, at most.
constexpr int team_memory_bytes = 7168;

}  // namespace kv
