// One query row per head of a group against a long cache, at the read bandwidth of the card: what a decode step is made
// of. Keys and values are read once, into a ring that is the warp's own: by copies of whole tiles on Hopper and later, else by
// 512 neighbouring bytes a warp (in any other order of lanes such a copy moves every sector twice). There is no barrier
// between memory and tensor cores, and rows are swizzled so that there is no bank conflict either. The ring goes on over
// rows: what a warp will need first for the next row is under way while hooks run, and a slot that changes meanwhile is
// patched in the ring. Behind the last slot a tile holds what was there before: numbers, which count nothing.
//
// Products are mma.m16n8k16: queries times keys, then values times probabilities. The order of channels inside a dot product
// is free: each lane takes 8 neighbouring channels of a row as one load. A policy's probe vector goes along as three more
// rows. Probabilities enter the second product as two 16-bit words.
#pragma once
#include "kernels/elements.cuh"
#include "kernels/tensor_words.cuh"
#include "kernels/tile_ring.cuh"

namespace kv {

/// A warp's lane in a stream: what it fetches, and its part of the outputs. `width` is the key and value dimension rounded
/// up to 64 or 128. Addresses in shared memory are 32-bit ones: generic ones cost an instruction each. `plain`: logits are
/// neither bent nor hidden, and biased where `biased` says so.
template <class Element, int width, Probing probing, bool plain = false, bool biased = false>
class Stream : TileRing<width> {
 public:
  using Base = TileRing<width>;
  using Base::box_bytes, Base::depth, Base::stage_bytes, Base::tile_bytes;
  static constexpr int key_chunks = width / 32, value_blocks = width / 16;
  static constexpr unsigned row_chunks = width / 8;
  static constexpr float headroom = 8;  // probabilities may grow to 2^8 before sums are scaled anew

  /// `kept_tiles`: look.kept_tiles, from where the compiler knows that all threads have the same; `from` as well.
  __device__ __forceinline__ Stream(const RowLook& look, const RowNow& now, StreamMemory& memory,
                                    const StreamSource& from, int kept_tiles)
      : look_(look),
        now_(now),
        memory_(memory),
        from_(from),
        unit_(same_in_warp(from.unit)),
        warp_(warp_of_team()),
        tiles_(same_in_warp(tiles_of(now.slots + stream_tile - 1))),
        changed_(same_in_warp(now.changed < 0 ? -1 : tiles_of(now.changed))),
        simple_tiles_(plain || (look.softcap == 0 && look.bias == nullptr && !look.masked) ? tiles_of(now.slots) : 0),
        kept_tiles_(kept_tiles),
        others_(kept_tiles >= 0 ? go_first : stay_as_usual),
        scale_(look.scale),
        logits_(look.logits && row() < look.group
                    ? look.logits + static_cast<long>(row()) * look.logit_stride + column()
                    : nullptr),
        ring_(shared_address(memory.ring) + static_cast<unsigned>(warp_ * stream_ring_bytes)),
        landed_(keep(landed_of(memory, warp_))),
        query_(
            keep(shared_address(now.queries) + static_cast<unsigned>(row() * query_pitch(width) + column() * 8) * 2)),
        key_at_(keep(ring_ + place(row_of(row()), static_cast<unsigned>(column())))),
        value_at_(keep(ring_ + tile_bytes + place(lane() / 16 * 8 + row_of(lane() % 8), lane() / 8 & 1))) {}

  /// Copies this warp's first tiles, unless they are on their way.
  __device__ __forceinline__ void start(const Ring& ring) const {
    if (ring.running) return;
    drain(memory_, ring);
#pragma unroll
    for (int i = 0; i < depth; ++i) {
      const unsigned stage = (same_in_warp(first_turn(ring)) + static_cast<unsigned>(i)) % depth;
      fetch<true>(warp_ + i * stream_warps, stage), fetch<false>(warp_ + i * stream_warps, stage);
    }
  }

  /// The whole row: this warp's tiles, every stream_warps-th, after start(). `next`: start the first tiles again at the end, for
  /// the next row over the same cache. store() and advance() must follow.
  __device__ __forceinline__ void run(const Ring& ring, bool next) {
    unsigned turn = same_in_warp(first_turn(ring));
    const bool again = next && goes_on(tiles_);
    bool keys_there = Base::template has_landed<true>(landed_, turn);  // asked for early: the answer takes a while
#pragma unroll 1
    for (int tile = warp_; tile < tiles_; tile += stream_warps) {
      int after = tile + depth * stream_warps;
      if (after >= tiles_) after = again ? first_tiles(after) : tiles_;
      const unsigned stage = turn % depth, at = stage * stage_bytes;
      if (!keys_there) Base::template await<true>(landed_, turn);
      float dots[2][2];
      dot_keys(at, tile, dots);
      __syncwarp();  // every lane has read its keys
      const bool values_there = Base::template has_landed<false>(landed_, turn);
      fetch<true>(after, stage);
      if (!values_there) Base::template await<false>(landed_, turn);
      uint4 rows[4];
      read_values(at, 0, rows);  // before the branches of soften(), past which the compiler does not put them off
      unsigned high[2], low[2];
      soften(tile, dots, high, low);
      add_values(at, rows, high, low);
      __syncwarp();
      ++turn;
      keys_there = Base::template has_landed<true>(landed_, turn);
      fetch<false>(after, stage);
    }
  }

  /// The warp's part of every head's output, unnormalised; of all channels, there or not.
  __device__ __forceinline__ void store() {
    sum_ += __shfl_xor_sync(~0u, sum_, 1);
    sum_ += __shfl_xor_sync(~0u, sum_, 2);
    const int group = look_.group;
    constexpr unsigned pitch = stream_pitch(width) * 4;
    if (column() == 0 && row() < group) memory_.parts[row() * softmax_parts + warp_] = {most_, sum_};
    const unsigned head = 2 * static_cast<unsigned>(column());
    const unsigned to = shared_address(memory_.partial) + static_cast<unsigned>(warp_ * group) * pitch + head * pitch +
                        static_cast<unsigned>(row()) * 4;
#pragma unroll
    for (unsigned side = 0; side < 2; ++side)
      if (static_cast<int>(head + side) < group)
#pragma unroll
        for (unsigned b = 0; b < value_blocks; ++b) {
          store_shared(to + side * pitch + b * 64, output_[b][side]);
          store_shared(to + side * pitch + b * 64 + 32, output_[b][side + 2]);
        }
  }

 private:
  using Base::barrier_of, Base::drain, Base::first_turn, Base::goes_on, Base::landed_of, Base::place, Base::row_of;

  /// Whole tiles; one instruction, made again in every loop.
  __device__ static int tiles_of(int slots) { return static_cast<int>(static_cast<unsigned>(slots) / stream_tile); }
  __device__ static unsigned lane() { return threadIdx.x % 32; }
  __device__ static int row() { return static_cast<int>(lane() / 4); }     // of products: a head, a channel
  __device__ static int column() { return static_cast<int>(lane() % 4); }  // a pair of slots, a pair of heads

  /// A number that the compiler shall keep rather than compute again from the thread's index, tile after tile.
  __device__ static unsigned keep(unsigned x) { return __shfl_sync(~0u, x, static_cast<int>(lane())); }

  /// The tile of the next row that this warp's tile `beyond`, which is not there, stands for.
  __device__ int first_tiles(int beyond) const {
    if constexpr (depth == 1) return warp_;
    return beyond - (tiles_ - warp_ + stream_warps - 1) / stream_warps * stream_warps;
  }

  /// Starts copying a tile of keys or values to a stage; nothing beyond the last tile.
  template <bool keys>
  __device__ __forceinline__ void fetch(int tile, unsigned stage) const {
    const unsigned to = ring_ + stage * stage_bytes + (keys ? 0 : tile_bytes);
    if constexpr (copies_boxes) {
      if (keys) written_to_device(tile == changed_);
      if (is_elected() && tile < tiles_) {
        const uint64_t wish = tile < kept_tiles_ ? stay_long : others_;
        const TileMap* const map = keys ? from_.keys : from_.values;
        const unsigned barrier = Base::template barrier_of<keys>(landed_, stage);
        barrier_expect(barrier, tile_bytes);
#pragma unroll
        for (unsigned i = 0; i < tile_bytes / box_bytes; ++i)
          copy_box(to + i * box_bytes, map, static_cast<int>(i) * 64, tile * stream_tile, unit_, barrier, wish);
      }
    } else {
      fetch_by_lanes(static_cast<const char*>(keys ? look_.keys : look_.values), keys ? look_.key_dim : look_.value_dim,
                     tile, to);
    }
  }
  /// fetch() by every lane's copies of 16 bytes, 512 neighbouring ones a warp. Closes a group of copies in any case.
  __device__ void fetch_by_lanes(const char* rows, int dim, int tile, unsigned to) const {
    constexpr int copies = tile_bytes / 512, rows_a_copy = stream_tile / copies;
    const unsigned first = lane() / row_chunks, chunk = lane() % row_chunks;
#pragma unroll
    for (unsigned i = 0; i < copies && tile < tiles_; ++i) {
      const unsigned row = first + i * rows_a_copy;
      const int slot = tile * stream_tile + static_cast<int>(row), channel = static_cast<int>(chunk) * 8;
      const bool there = slot < now_.slots && channel < dim;
      copy_16(to + place(row, chunk), there ? rows + (static_cast<long>(slot) * dim + channel) * 2 : rows, there);
    }
    close_copies();
  }

  /// Queries are the left operand, heads its first rows: 16-byte loads hold the words of two products, one in the place of
  /// rows 0 to 7, one in that of rows 8 to 15, whose other halves are not looked at. In probing the same goes for three
  /// parts of the policy's vector in the rows of heads.
  __device__ __forceinline__ void dot_keys(unsigned stage_at, int tile, float (&dots)[2][2]) const {
    float first[2][4] = {}, second[2][4] = {}, probe_first[2][4] = {}, probe_second[2][4] = {};
    const unsigned probe_at =
        probing == Probing::apart
            ? shared_address(memory_.probe) + static_cast<unsigned>((row() % 4) * query_pitch(width) + column() * 8) * 2
            : 0;
#pragma unroll
    for (int j0 = 0; j0 < key_chunks; j0 += 2) {
      uint4 query[2], key[2][2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int j = j0 + k;
        query[k] = load_shared(query_ + static_cast<unsigned>(j) * 64);
        // Chunk column() + 4 j of the key.
        const unsigned at =
            (key_at_ ^ static_cast<unsigned>(j & 1) * 64) + stage_at + static_cast<unsigned>(j / 2) * box_bytes;
#pragma unroll
        for (int t = 0; t < 2; ++t) key[k][t] = load_shared(at + static_cast<unsigned>(t) * 8 * 128);
      }
      __syncwarp();  // or the compiler may load one by one, each into the registers of the last
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const uint32_t a[4] = {query[k].x, query[k].y, query[k].z, query[k].w};
          Words<Element>::mma(first[t], a, key[k][t].x, key[k][t].y);
          Words<Element>::mma(second[t], a, key[k][t].z, key[k][t].w);
          if constexpr (probing == Probing::apart) {
            const uint4 probe = load_shared(probe_at + static_cast<unsigned>(j0 + k) * 64);
            Words<Element>::mma(probe_first[t], {probe.x, probe.y, probe.z, probe.w}, key[k][t].x, key[k][t].y);
            Words<Element>::mma(probe_second[t], {probe.x, probe.y, probe.z, probe.w}, key[k][t].z, key[k][t].w);
          }
        }
    }
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        dots[t][i] = first[t][i] + second[t][2 + i];
        const int slot = tile * stream_tile + t * 8 + i * 4 + column();
        if constexpr (probing == Probing::among_queries) keep_probe(slot, dots[t][i], look_.group);
        if constexpr (probing == Probing::apart) keep_probe(slot, probe_first[t][i] + probe_second[t][2 + i], 0);
      }
  }

  /// Where this lane's row of the b-th block of 16 channels lies.
  __device__ unsigned value_place(unsigned stage_at, int b) const {
    return (value_at_ ^ static_cast<unsigned>(b % 4) * 32) + stage_at + static_cast<unsigned>(b / 4) * box_bytes;
  }

  /// Turns a tile's dots into logits, keeps them, moves the running maximum and gives probabilities as two words.
  __device__ __forceinline__ void soften(int tile, const float (&dots)[2][2], unsigned (&high)[2], unsigned (&low)[2]) {
    float x[4];  // in units of log 2
    if (tile < simple_tiles_) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = dots[i / 2][i % 2] * scale_;
      if (logits_) {
        float* const logits = logits_ + tile * stream_tile;
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[i * 4] = x[i];
      }
      if constexpr (plain && biased) {
        const float* const bias = look_.bias + tile * stream_tile + column();
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] += bias[i * 4];
      }
#pragma unroll
      for (float& each : x) each *= log2_e;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = bent_logit(tile * stream_tile + i * 4, dots[i / 2][i % 2]);
    }
    const float most = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
    if (__any_sync(~0u, most > most_ + headroom)) rescale(most);
    const float base = most_ == -INFINITY ? 0.f : most_;
    float p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = exp2_fast(x[i] - base);
    sum_ += (p[0] + p[1]) + (p[2] + p[3]);
#pragma unroll
    for (int t = 0; t < 2; ++t) Words<Element>::split(p[2 * t], p[2 * t + 1], high[t], low[t]);
  }

  /// The logit of a slot, a column into the row of logits, under whatever bends or hides it, kept; and with its bias in
  /// units of log 2.
  __device__ float bent_logit(int at, float dot) const {
    const int slot = at + column();
    const bool there = slot < now_.slots && (plain || !(look_.masked && look_.hidden(slot, now_.query_token)));
    const float logit = !there ? -INFINITY : plain ? dot * scale_ : detail::logit_of(look_, dot);
    if (logits_ && slot < now_.slots) logits_[at] = logit;
    return ((!plain || biased) && look_.bias && there ? logit + look_.bias[slot] : logit) * log2_e;
  }

  /// Rows `first`, first + 1 and first + 2 of the product are the probe's three parts.
  __device__ void keep_probe(int slot, float dot, int first) const {
    const float second = __shfl_down_sync(~0u, dot, 4), third = __shfl_down_sync(~0u, dot, 8);
    if (row() == first && slot < now_.slots) look_.probe[slot] = dot + (second + third);
  }

  __device__ void rescale(float most) {
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    const float next = fmaxf(most_, most), factor = next == -INFINITY ? 1.f : exp2_fast(most_ - next);
    most_ = next, sum_ *= factor;
    const float one = __shfl_sync(~0u, factor, 8 * column()), other = __shfl_sync(~0u, factor, 8 * column() + 4);
#pragma unroll
    for (auto& part : output_) part[0] *= one, part[1] *= other, part[2] *= one, part[3] *= other;
  }

  /// Rows of four blocks of 16 channels.
  __device__ __forceinline__ void read_values(unsigned stage_at, int first, uint4 (&rows)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i] = load_turned(value_place(stage_at, first + i));
  }
  /// Values are the left operand, a channel a row; the probabilities of all heads are the right one, as they came out of
  /// the dots. `rows`: of the first four blocks.
  __device__ __forceinline__ void add_values(unsigned stage_at, uint4 (&rows)[4], const unsigned (&high)[2],
                                             const unsigned (&low)[2]) {
#pragma unroll
    for (int b = 0; b < value_blocks; b += 4) {
      if (b > 0) read_values(stage_at, b, rows);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        Words<Element>::mma(output_[b + i], {rows[i].x, rows[i].y, rows[i].z, rows[i].w}, high[0], high[1]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        Words<Element>::mma(output_[b + i], {rows[i].x, rows[i].y, rows[i].z, rows[i].w}, low[0], low[1]);
    }
  }

  const RowLook& look_;  // in shared memory: what is not of every tile is read there
  const RowNow& now_;
  StreamMemory& memory_;
  const StreamSource& from_;
  const int unit_, warp_, tiles_;
  const int changed_;       // a tile that the warp wrote to, or -1
  const int simple_tiles_;  // of logits neither bent, biased nor hidden
  const int kept_tiles_;    // that stay in the second-level cache; -1 = no wishes
  const uint64_t others_;   // the wish for the rest
  const float scale_;
  float* const logits_;  // of head row(), from slot column(); null beyond the group, or where nobody asks
  const unsigned ring_, landed_, query_;
  const unsigned key_at_, value_at_;  // this lane's in the first stage
  float output_[value_blocks][4] = {};
  float most_ = -INFINITY, sum_ = 0;
};

/// Streams a row, by the first stream_warps warps. Leaves parts and partial sums in `memory`; a barrier must follow.
template <class Element, int width, Probing probing>
__device__ __forceinline__ void stream_here(const RowLook& look, const RowNow& now, StreamMemory& memory,
                                            const Ring& ring, bool next) {
  Stream<Element, width, probing> stream(look, now, memory, look.from, look.kept_tiles);
  stream.start(ring);
  stream.run(ring, next);
  stream.store();
}

/// The same as a call, which has to save a register for each that it takes: for rows that are not the many.
template <class Element, int width>
__device__ __noinline__ void stream_row(const RowLook& look, const RowNow& now, StreamMemory& memory, const Ring& ring,
                                        bool next) {
  if (look.probe_vector)
    stream_here<Element, width, Probing::apart>(look, now, memory, ring, next);
  else
    stream_here<Element, width, Probing::none>(look, now, memory, ring, next);
}

/// stream_row() of rows stored as `elements`, 16 bits each.
__device__ __forceinline__ void stream_apart(Dtype elements, const RowLook& look, const RowNow& now,
                                             StreamMemory& memory, const Ring& ring, bool next) {
  const bool half = elements == Dtype::float16, wide = stream_width(look.key_dim, look.value_dim) > 64;
  if (half && wide)
    stream_row<__half, 128>(look, now, memory, ring, next);
  else if (half)
    stream_row<__half, 64>(look, now, memory, ring, next);
  else if (wide)
    stream_row<__nv_bfloat16, 128>(look, now, memory, ring, next);
  else
    stream_row<__nv_bfloat16, 64>(look, now, memory, ring, next);
}

}  // namespace kv
