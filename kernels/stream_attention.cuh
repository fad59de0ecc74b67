// One query row per head of a group against a long cache, at the read bandwidth of the card: what a decode step is made
// of. Keys and values are read once, into a ring that is the warp's own: by copies of whole tiles on Hopper and later, else by
// 512 neighbouring bytes a warp (in any other order of lanes such a copy moves every sector twice). There is no barrier
// between memory and tensor cores, and rows are swizzled so that there is no bank conflict either. The ring goes on over
// rows (tile_ring.cuh). Behind the last slot a tile holds what was there before: numbers, which count nothing.
//
// Products are mma.m16n8k16: keys times queries, then values times probabilities, whose right operands have room for eight
// heads. Probabilities enter as two 16-bit words: both at once where a group is of four heads or fewer. A policy's vector goes
// along as further columns, or as a right operand of its own (key_probe.cuh).
#pragma once
#include "kernels/stream_start.cuh"
#include "kernels/tensor_words.cuh"
#include "kernels/tile_ring.cuh"

namespace kv {

/// A warp's lane in a stream: what it fetches, and its part of the outputs. `width` is the key and value dimension rounded
/// up to 64 or 128, `tile` the slots of a tile. Addresses in shared memory are 32-bit ones: generic ones cost an instruction
/// each. `plain`: logits are neither bent nor hidden, and biased where `biased` says so.
template <class Element, int width, int tile, Probing probing, bool plain = false, bool biased = false>
class Stream : TileRing {
 public:
  static constexpr int row_blocks = tile / 16, channel_blocks = width / 16;
  static constexpr bool probes = probing != Probing::none;
  static constexpr unsigned half_bytes = TileRing::half_bytes(tile), tile_bytes = TileRing::tile_bytes(width, tile);
  static constexpr float headroom = 8 * ln_2;  // probabilities may grow to 2^8 before sums are scaled anew

  /// `kept_tiles`: look.kept_tiles, from where the compiler knows that all threads have the same; `from`, `group` and the thread's
  /// `warp` as well. `goes_on`: with the exponents' bases of the token before, where rows are plain.
  __device__ __forceinline__ Stream(const RowLook& look, const RowNow& now, StreamMemory& memory,
                                    const StreamSource& from, int kept_tiles, int group, int warp, bool goes_on = false)
      : Stream(look, now, memory, from, kept_tiles, group, warp,
               {look, memory, group, warp, both_at_once(group) ? head() % 4 : head(), probes, plain && goes_on}) {}

 private:
  __device__ static bool both_at_once(int group) {
    return probing == Probing::among_queries || group <= stream_heads / 2;
  }
  __device__ __forceinline__ Stream(const RowLook& look, const RowNow& now, StreamMemory& memory,
                                    const StreamSource& from, int kept_tiles, int group, int warp,
                                    const StreamStart& start)
      : look_(look),
        now_(now),
        memory_(memory),
        from_(from),
        unit_(same_in_warp(from.unit)),
        warp_(warp),
        group_(group),
        tiles_(same_in_warp(tiles_of_row(now.slots, tile))),
        changed_(same_in_warp(now.changed < 0 ? -1 : tile_of(now.changed, tile))),
        simple_tiles_(plain || (look.softcap == 0 && look.bias == nullptr && !look.masked) ? tile_of(now.slots, tile)
                                                                                           : 0),
        kept_tiles_(kept_tiles),
        others_(kept_tiles >= 0 ? go_first : stay_as_usual),
        both_at_once_(both_at_once(group)),
        scale_(start.scale),
        logits_(start.logits && head() < group ? start.logits + head() * start.logit_stride + row() : nullptr),
        next_logits_(head() + 1 < group ? start.logit_stride : 0),
        ring_(start.ring + static_cast<unsigned>(warp_) * 2 * tile_bytes),
        landed_(landed_of(memory, warp_)),
        most_{start.most.x, start.most.y} {
    const uint4& mine = start.lane;
    // The words of four heads' probabilities take the columns of eight, which see the same queries.
    const unsigned other_half = both_at_once_ && lane() % 8 >= 4 ? 4 * query_pitch(width) * 2 : 0;
    query_ = shared_address(now.queries) + mine.x - other_half, key_at_ = ring_ + mine.y, value_at_ = ring_ + mine.z;
    row_ = static_cast<int>(mine.w);
    if constexpr (probes) probe_row_ = probe_row_of_lane<width>(start.probe, now), product_ = product_of_lane();
    if (probing == Probing::among_queries && lane() % 8 >= 4) query_ = probe_row_;
  }

 public:
  /// Copies this warp's first tile, unless its ring holds it.
  __device__ __forceinline__ void start(const Ring& ring) const {
    if (holds_first(ring, tiles_)) return;
    if constexpr (copies_boxes) written_to_device(warp_ == changed_);
    fetch<true>(warp_), fetch<false>(warp_);
  }

  /// The whole row: this warp's tiles, after start(). TileRing::advance() must follow.
  __device__ __forceinline__ void run(const Ring& ring) {
    const bool down = add_tiles(ring);
    if constexpr (probes) {
      const int step = down ? -stream_warps : stream_warps, last = first_tile(!down, tiles_, warp_);
      if (plain && !is_tile(last - 2 * step)) memory_.gates.pass(Gate::weights_known);
      keep_probes(last - step, last);
    }
    store();
  }

 private:
  __device__ static unsigned lane() { return threadIdx.x % 32; }
  __device__ static int row() { return static_cast<int>(lane() / 4); }  // of products: a slot, a channel
  __device__ static int column() { return static_cast<int>(lane() % 4); }
  __device__ static int head() { return 2 * column(); }  // of products' columns, this and the next

  /// Returns whether tiles went down.
  __device__ __forceinline__ bool add_tiles(const Ring& ring) {
    const int way = same_in_warp(!holds_first(ring, tiles_) ? 0 : ring.down ? 2 : 1);
    unsigned turn = same_in_warp(ring.turns);
    const bool down = way == 2;
    bool first = true, held = way > 0;
    bool keys_there = held || has_landed<true>(landed_, turn);  // asked for early: the answer takes a while
    int at = first_tile(down, tiles_, warp_);
#pragma unroll 1
    do {
      int after = at + (down ? -stream_warps : stream_warps);
      if (static_cast<unsigned>(after) >= static_cast<unsigned>(tiles_)) after = tiles_;  // none
      if constexpr (probes) keep_probe(at - 2 * (down ? -stream_warps : stream_warps), first_tile(down, tiles_, warp_));
      if (!keys_there) await<true>(landed_, turn);
      float dots[row_blocks][4];
      dot_keys(at, dots);
      __syncwarp();  // every lane has read its keys
      const bool values_there = held || has_landed<false>(landed_, turn);
      // A tile that this warp wrote to will be read again, in two rows if it lies here.
      if constexpr (copies_boxes) written_to_device(after == changed_ || (held && at == changed_));
      fetch<true>(after);
      if (!values_there) await<false>(landed_, turn);
      uint4 rows[4];
      read_values(0, 0, rows);  // before the branches of soften(), past which the compiler does not put them off
      unsigned high[row_blocks][2], low[row_blocks][2];
      soften(at, first, dots, high, low);
      add_values<true>(rows, high);
      if (!both_at_once_) add_values<false>(rows, low);
      __syncwarp();
      if (!held) ++turn;
      first = held = false;
      keys_there = has_landed<true>(landed_, turn);
      fetch<false>(after);
      at = after;
    } while (at < tiles_);
    return down;
  }

  /// The warp's part of every head's output, unnormalised; of all channels, there or not.
  __device__ __forceinline__ void store() {
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int k = 4; k < 32; k *= 2) sum_[e] += __shfl_xor_sync(~0u, sum_[e], k);
    constexpr unsigned pitch = stream_pitch(width) * 4;
    const unsigned to = shared_address(memory_.partial_of(now_.query_token, group_, width)) +
                        static_cast<unsigned>(warp_ * group_) * pitch + static_cast<unsigned>(row()) * 4;
    if (both_at_once_) {
      // A lane has high words' products, the one two further low words'. Each keeps the sums of every other block.
      const bool lower = column() < 2;
#pragma unroll
      for (int b = 0; b < channel_blocks; b += 2) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float even = output_[b][e], odd = output_[b + 1][e];
          output_[b][e] = (lower ? even : odd) + __shfl_xor_sync(~0u, lower ? odd : even, 2);
        }
        store_block(to + (lower ? 0 : 64), head() % 4, group_, b, output_[b]);
      }
    } else {
#pragma unroll
      for (int b = 0; b < channel_blocks; ++b) store_block(to, head(), group_, b, output_[b]);
    }
    if (row() != 0 || head() >= group_) return;
    SoftmaxPart* const part = memory_.parts_of(now_.query_token) + head() * softmax_parts + warp_;
    *reinterpret_cast<float2*>(memory_.bases + warp_ * stream_heads + head()) = {most_[0], most_[1]};
    part[0] = {most_[0] * log2_e, sum_[0]}, part[softmax_parts] = {most_[1] * log2_e, sum_[1]};  // even of no head
  }

  /// Starts copying a tile of keys or values; nothing beyond the last tile.
  template <bool keys>
  __device__ __forceinline__ void fetch(int which) const {
    const unsigned to = ring_ + (keys ? 0 : tile_bytes);
    if constexpr (copies_boxes) {
      if (is_elected() && which < tiles_) {
        const uint64_t wish = which < kept_tiles_ ? stay_long : others_;
        const TileMap* const map = keys ? from_.keys : from_.values;
        const unsigned barrier = barrier_of<keys>(landed_);
        barrier_expect(barrier, tile_bytes);
#pragma unroll
        for (unsigned i = 0; i < width / 64; ++i)
          copy_box(to + i * half_bytes, map, static_cast<int>(i) * 64, which * tile, unit_, barrier, wish);
      }
    } else {
      copy_by_lanes<width, tile>(to, static_cast<const char*>(keys ? look_.keys : look_.values),
                                 keys ? look_.key_dim : look_.value_dim, which * tile,
                                 which < tiles_ ? now_.slots : -1);
    }
  }

  /// Keys are the left operand, a slot a row; all heads' queries are the right one. Where nothing else stands between products that
  /// wait for one another, even and odd blocks of channels are added up apart.
  __device__ __forceinline__ void dot_keys(int which, float (&dots)[row_blocks][4]) const {
    constexpr int apart = probing == Probing::apart, sums = apart ? 1 : 2, ahead = 2;
    float sum[sums][row_blocks][4] = {}, probe[row_blocks][4] = {};
    const auto multiply = [](float(&to)[4], const uint4& keys, const uint4& right, int k) {
      Words<Element>::mma(to, {keys.x, keys.y, keys.z, keys.w}, k == 0 ? right.x : right.z, k == 0 ? right.y : right.w);
    };
    uint4 query[2], operand, key[ahead + 1][row_blocks];
    const auto read = [&](int b) __attribute__((always_inline)) {
      if (b % 2 == 0) query[b / 2 % 2] = load_matrices(query_ + static_cast<unsigned>(b) * 32);
#pragma unroll
      for (int m = 0; m < row_blocks; ++m) key[b % (ahead + 1)][m] = load_matrices(place<tile>(key_at_, b, m));
    };
#pragma unroll
    for (int b = 0; b < ahead; ++b) read(b);
#pragma unroll
    for (int b = 0; b < channel_blocks; ++b) {
      if (apart && b % 2 == 0) operand = load_matrices(probe_row_ + static_cast<unsigned>(b) * 32);
      if (b + ahead < channel_blocks) read(b + ahead);
      __syncwarp();  // or the compiler may load one by one, each into the registers of the last
#pragma unroll
      for (int m = 0; m < row_blocks; ++m) multiply(sum[b % sums][m], key[b % (ahead + 1)][m], query[b / 2 % 2], b % 2);
      if constexpr (apart)
#pragma unroll
        for (int m = 0; m < row_blocks; ++m) multiply(probe[m], key[b % (ahead + 1)][m], operand, b % 2);
    }
#pragma unroll
    for (int m = 0; m < row_blocks; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) dots[m][e] = apart ? sum[0][m][e] : sum[0][m][e] + sum[sums - 1][m][e];
    if constexpr (probing == Probing::among_queries)
#pragma unroll
      for (int m = 0; m < row_blocks; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {  // all lanes get both: of heads, and of the probe
          const float mine = dots[m][e], theirs = __shfl_xor_sync(~0u, mine, 2);
          dots[m][e] = column() < 2 ? mine : theirs, probe[m][e] = column() < 2 ? theirs : mine;
        }
    if constexpr (probes) store_products(products_of(which) + product_, probe);
  }

  /// Where a tile's products with the probe's operand lie: behind the rings, of a warp's last two tiles.
  __device__ unsigned products_of(int which) const {
    const int of_warp = 2 * warp_ + static_cast<int>(static_cast<unsigned>(which) / stream_warps % 2);
    return ring_ + static_cast<unsigned>(stream_warps - warp_) * 2 * tile_bytes +
           static_cast<unsigned>(of_warp * probe_tile_bytes(tile));
  }
  __device__ bool is_tile(int which) const { return static_cast<unsigned>(which) < static_cast<unsigned>(tiles_); }
  /// What the last two tiles' keys give with the vector as hooks have made it; a lane a slot. Nothing beyond the row.
  __device__ __forceinline__ void keep_probes(int before, int last) const {
    const int mine = static_cast<int>(lane()), slots[2] = {before * tile + mine, last * tile + mine};
    const float probes_of[2] = {probe_of_lane<tile>(memory_.probe, products_of(before)),
                                probe_of_lane<tile>(memory_.probe, products_of(last))};
    float* const probe = look_.probe;
    const bool there = mine < tile;
    if (there && is_tile(before) && slots[0] < now_.slots) probe[slots[0]] = probes_of[0];
    if (there && slots[1] < now_.slots) probe[slots[1]] = probes_of[1];
  }
  /// The same of one that is not among the last two, which a row's first one waits for.
  __device__ __forceinline__ void keep_probe(int which, int first = -1) const {
    if (!is_tile(which)) return;
    if (plain && which == first) memory_.gates.pass(Gate::weights_known);
    const int mine = static_cast<int>(lane()), slot = which * tile + mine;
    if (mine < tile && slot < now_.slots) look_.probe[slot] = probe_of_lane<tile>(memory_.probe, products_of(which));
  }

  /// Turns a tile's dots into logits, keeps them, moves the running maximum and gives probabilities as two words: as right
  /// operands, those of heads from 4 on the low ones where both go at once. `first`: of the row's tiles.
  __device__ __forceinline__ void soften(int which, bool first, float (&x)[row_blocks][4],
                                         unsigned (&high)[row_blocks][2], unsigned (&low)[row_blocks][2]) {
    if (which < simple_tiles_) {
#pragma unroll
      for (auto& of_block : x)
#pragma unroll
        for (float& each : of_block) each *= scale_;
      if (logits_) {
#pragma unroll
        for (int m = 0; m < row_blocks; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) keep_logits(which * tile + m * 16 + h * 8, x[m][2 * h], x[m][2 * h + 1]);
      }
      if constexpr (plain && biased) {
        const float* const bias = look_.bias + which * tile + row_;
#pragma unroll
        for (int m = 0; m < row_blocks; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float theirs = bias[m * 16 + h * 8];
            x[m][2 * h] += theirs, x[m][2 * h + 1] += theirs;
          }
      }
    } else {
#pragma unroll
      for (int m = 0; m < row_blocks; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) bend(which * tile + m * 16 + h * 8, x[m][2 * h], x[m][2 * h + 1]);
    }
    float most[2] = {x[0][0], x[0][1]};
#pragma unroll
    for (int m = 0; m < row_blocks; ++m)
#pragma unroll
      for (int e = m == 0 ? 2 : 0; e < 4; ++e) most[e % 2] = fmaxf(most[e % 2], x[m][e]);
    if (__any_sync(~0u, most[0] > most_[0] + headroom || most[1] > most_[1] + headroom) ||
        (first && !is_near(most, most_)))
      rescale(most, first);
    const float base[2] = {base_of(most_[0]), base_of(most_[1])};
#pragma unroll
    for (int m = 0; m < row_blocks; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[m][e] = exp2_fast(__fmaf_rn(x[m][e], log2_e, -base[e % 2]));
      sum_[0] += x[m][0] + x[m][2], sum_[1] += x[m][1] + x[m][3];
#pragma unroll
      for (int h = 0; h < 2; ++h) Words<Element>::split(x[m][2 * h], x[m][2 * h + 1], high[m][h], low[m][h]);
    }
#pragma unroll
    for (int m = 0; m < row_blocks; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) high[m][h] = turn_matrix(both_at_once_ && column() >= 2 ? low[m][h] : high[m][h]);
    if (!both_at_once_)
#pragma unroll
      for (int m = 0; m < row_blocks; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) low[m][h] = turn_matrix(low[m][h]);
  }

  /// The logits of this lane's two heads, `at` columns into their rows.
  __device__ void keep_logits(int at, float left, float right) const {
    logits_[at] = left;
    if (next_logits_ > 0) logits_[at + next_logits_] = right;
  }
  /// The logits of a slot, a row on from `at`, under whatever bends or hides them, kept; and with its bias.
  __device__ void bend(int at, float& left, float& right) const {
    const int slot = at + row();
    const bool there = slot < now_.slots && (plain || !(look_.masked && look_.hidden(slot, now_.query_token)));
    const auto logit = [&](float dot) {
      return !there ? -INFINITY : plain ? dot * scale_ : detail::logit_of(look_, dot);
    };
    left = logit(left), right = logit(right);
    if (logits_ && slot < now_.slots) keep_logits(at, left, right);
    if ((!plain || biased) && look_.bias && there) left += look_.bias[slot], right += look_.bias[slot];
  }

  /// `first`: of a row's tiles, before which nothing has been added up.
  __device__ void rescale(const float (&most)[2], bool first) {
    float factor[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float next = first ? most[e] : fmaxf(most[e], most_[e]);
#pragma unroll
      for (int k = 4; k < 32; k *= 2) next = fmaxf(next, __shfl_xor_sync(~0u, next, k));
      factor[e] = next == -INFINITY ? 1.f : exp2_fast(most_[e] * log2_e - next * log2_e);
      most_[e] = next;
    }
    if (first) return;
    sum_[0] *= factor[0], sum_[1] *= factor[1];
#pragma unroll
    for (auto& part : output_)
#pragma unroll
      for (int e = 0; e < 4; ++e) part[e] *= factor[e % 2];
  }

  /// Rows of four blocks of 16 channels, from the first-th on, in the m-th of 16 slots.
  __device__ __forceinline__ void read_values(int first, int m, uint4 (&rows)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i] = load_turned(place<tile>(value_at_, first + i, m));
  }
  /// Values are the left operand, a channel a row. `rows`: of the first four blocks, where they are `there`.
  template <bool there>
  __device__ __forceinline__ void add_values(uint4 (&rows)[4], const unsigned (&words)[row_blocks][2]) {
#pragma unroll
    for (int m = 0; m < row_blocks; ++m)
#pragma unroll
      for (int b = 0; b < channel_blocks; b += 4) {
        if (!there || m > 0 || b > 0) read_values(b, m, rows);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          Words<Element>::mma(output_[b + i], {rows[i].x, rows[i].y, rows[i].z, rows[i].w}, words[m][0], words[m][1]);
      }
  }

  /// Sums of the b-th block of 16 channels, of a head and the next, to where they are of use.
  __device__ __forceinline__ void store_block(unsigned to, int first_head, int group, int b,
                                              const float (&sum)[4]) const {
    constexpr unsigned pitch = stream_pitch(width) * 4;
    const unsigned at = to + static_cast<unsigned>(first_head) * pitch + static_cast<unsigned>(b) * 64;
#pragma unroll
    for (unsigned e = 0; e < 4; ++e)
      if (first_head + static_cast<int>(e % 2) < group) store_shared(at + e % 2 * pitch + e / 2 * 32, sum[e]);
  }

  const RowLook& look_;  // in shared memory: what is not of every tile is read there
  const RowNow& now_;
  StreamMemory& memory_;
  const StreamSource& from_;
  const int unit_, warp_, group_, tiles_;
  const int changed_;        // a tile that the warp wrote to, or -1
  const int simple_tiles_;   // of logits neither bent, biased nor hidden
  const int kept_tiles_;     // that stay in the second-level cache; -1 = no wishes
  const uint64_t others_;    // the wish for the rest
  const bool both_at_once_;  // both words of probabilities, in the columns of four heads each
  const float scale_;
  float* const logits_;    // of head(), from slot row(); null beyond the group, or where nobody asks
  const int next_logits_;  // from there to the next head's; 0 beyond the group
  const unsigned ring_, landed_;
  unsigned query_, key_at_, value_at_;  // where this lane's rows begin
  int row_;                             // row(), for what is done in every tile
  unsigned probe_row_, product_;        // where this lane's row of a probe's operand begins, and product_of_lane()
  float output_[channel_blocks][4] = {};
  // What exponents are relative to: in a plain row what they were before, others begin anew: as oracles take a row back, it gives
  // the same numbers.
  float most_[2], sum_[2] = {0, 0};
};

}  // namespace kv
