// What a stream of slots looks at, what it leaves, and where its ring stands.
#pragma once
#include <cstdint>

#include "kernels/gates.cuh"
#include "kernels/key_probe.cuh"
#include "kernels/tile_map.hpp"

namespace kv {

/// Where a stream's tiles come from: a unit's rows.
struct StreamSource {
  const TileMap *keys = nullptr, *values = nullptr;
  int unit = 0;
};

/// What a token's queries look at, apart from what moves from token to token.
struct RowLook {
  const void *keys = nullptr, *values = nullptr;
  StreamSource from;  // the same rows
  int key_dim = 0, value_dim = 0, group = 1;
  float scale = 1, softcap = 0;
  const float* bias = nullptr;  // [slots] or null
  const int* token = nullptr;   // [slots], read only when `masked`
  int newest_key = 0x7fffffff, window = 0;
  bool masked = false;
  // Logits without bias, -infinity where hidden; null = not wanted. [group][logit_stride], pairs aligned.
  float* logits = nullptr;
  int logit_stride = 0;
  int kept_tiles = -1;  // tiles that shall stay in the second-level cache while the others pass through; -1 = no wishes
  const float* probe_vector = nullptr;  // [key_dim] or null
  float* probe = nullptr;               // [slots] key . probe_vector

  __device__ bool hidden(int slot, int query_token) const {
    const int t = token[slot];
    return t > query_token || t > newest_key || (window > 0 && query_token - t >= window);
  }
};

/// A token's queries in device memory: head g's row is g * stride elements further.
struct Queries {
  const void* first;
  long stride;
};

/// What moves from token to token: slots [0, slots) are streamed, the newest one is looked at by itself.
struct RowNow {
  int slots, query_token;
  // [query_rows][query_pitch] in shared memory, zeros beyond the group and the dimension
  const std::uint16_t* queries;
  const void *newest_key, *newest_value;  // rows of slot `slots`
  int changed = -1;                       // a slot whose row in memory the warp that streams it has just written, or -1
};

/// Maximum (in units of log 2) and sum of a part of a head's softmax, or of the whole.
struct alignas(8) SoftmaxPart {
  float most, sum;
};

/// Shared memory of a stream: what is of one size for all shapes lies here.
struct StreamMemory {
  uint4* ring;  // a tile of keys and one of values of each warp that streams, at a multiple of 1024 bytes
  uint64_t landed[stream_warps * 2];  // barriers of a warp: of its keys, its values
  // Of tokens in turn, of every head: one of each warp that streams, the newest slot's, the sink's.
  alignas(16) SoftmaxPart parts[2][stream_heads * softmax_parts];
  // What each warp's exponents of a head were relative to in its last row.
  alignas(8) float bases[stream_warps * stream_heads];
  // [2][stream_warps][group][stream_pitch], of tokens in turn: outputs may be made of one's while the next one is streamed.
  float* partial;
  // Where each lane's part lies: of queries, of a tile of keys, of one of values; and its row of products.
  uint4 lanes[32];
  Gates gates;
  KeyProbe probe;  // where policies ask for one

  __device__ SoftmaxPart* parts_of(int token) { return parts[token & 1]; }
  __device__ const SoftmaxPart* parts_of(int token) const { return parts[token & 1]; }
  __device__ float* partial_of(int token, int group, int width) const {
    return partial + (token & 1) * stream_warps * group * stream_pitch(width);
  }
};

/// Where a warp's ring stands between rows: nothing is under way.
struct Ring {
  bool running = false;  // it holds the last tile of the latest row, as memory does
  bool down = false;     // which is the last of the warp's tiles, not the first one
  int tiles = 0;         // of that row
  unsigned turns = 0;    // tiles that have come
};

namespace detail {

/// softcap(scale * dot), as the CPU engine rounds it.
__device__ inline float logit_of(const RowLook& look, float dot) {
  const float x = dot * look.scale;
  return look.softcap > 0 ? look.softcap * tanhf(x / look.softcap) : x;
}

}  // namespace detail

/// Fills `rows` rows of RowNow::queries from device memory, with zeros beyond the group and the dimension. All threads; a barrier must
/// follow.
__device__ inline void stage_queries(const RowLook& look, const Queries& from, std::uint16_t* queries, int rows) {
  const int width = stream_width(look.key_dim, look.value_dim), chunks = width / 8, pitch = query_pitch(width);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < rows * chunks; i += team_threads) {
    const int head = i / chunks, chunk = i % chunks;
    uint4 words{};
    if (head < look.group && chunk * 8 < look.key_dim)
      words = *reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(from.first) + head * from.stride +
                                              chunk * 8);
    *reinterpret_cast<uint4*>(queries + head * pitch + chunk * 8) = words;
  }
}

}  // namespace kv
