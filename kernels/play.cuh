// A unit under way, without its policy: rows come and go, keys turn to their places, one token's queries attend and are
// measured. core/head_replay.cpp and core/cache.cpp are the same on the CPU.
#pragma once
#include "kernels/comparison.cuh"
#include "kernels/rotation.cuh"
#include "kernels/token_attention.cuh"
#include "kernels/unit.hpp"

namespace kv {

/// What does not change while a unit is played, in shared memory, once. Local memory is no place for it: the first-level cache
/// has next to no room left beside the rings, so a spilt pointer is a trip to the second.
struct Fixed {
  /// Which measured query (-1: none) and which row of the layer's queries (-1: not recorded) a token's are, in turn.
  struct {
    int measured, row;
  } coming[4];
  Unit unit;
  LayerData layer;
  TraceData trace;
  PlaySettings settings;
  RowMemory row;
  RowLook look;  // of the row that attends
  TeamMemory team;
  const Unit* units;
  const TileMaps* maps;
  int unit_index;
  Progress progress;
  Fold plan;        // of the one victim of a step
  void* home[10];   // where StepRecords gives arrays back to; null for those that stayed or need not
  float* logits;    // [group][logit_stride] of the latest row, where anybody asks for them
  long long clock;  // when the phase under way began
  int logit_stride;
  bool keeps_logits;
  bool streamed;  // rows of this shape go over tensor cores
  int tile;       // slots of a tile of their streams
};
static_assert(sizeof(Fixed) + 1024 <= team_memory_bytes);

/// A unit under way. What moves is in registers, the same in every thread: functions that are not inlined take a copy.
struct Play {
  Fixed& fixed;
  const Unit& unit;
  const LayerData& layer;
  const TraceData& trace;
  const PlaySettings& settings;
  RowMemory& row;
  Progress& progress;
  BlockTeam team;

  const int warp = warp_of_team();
  int size, budget;  // slots
  int now = -1, block_first = 0, block = 0;
  Phase phase = Phase::prompt;
  Ring ring;         // what this warp holds for the next row
  int stale = -1;    // a slot whose row changed in memory since
  int changed = -1;  // RowNow::changed

  __device__ explicit Play(Fixed& f)
      : fixed(f),
        unit(f.unit),
        layer(f.layer),
        trace(f.trace),
        settings(f.settings),
        row(f.row),
        progress(f.progress),
        team{&f.team},
        size(f.progress.size),
        budget(f.unit.info.budget) {}

  /// What a function that worked on a copy left behind.
  __device__ void follow(const Play& copy) {
    size = copy.size, ring = copy.ring, stale = copy.stale, changed = copy.changed;
  }

  /// The first warp that does not stream keeps the books of a step: tokens, state, what became of them.
  __device__ bool is_clerk_warp() const { return warp == stream_warps; }
  __device__ bool is_clerk() const { return is_clerk_warp() && threadIdx.x % 32 == 0; }

  __device__ int compressions() const { return progress.compressions; }
  __device__ bool absolute() const { return settings.positions == Positions::absolute; }
  __device__ const void* attended_keys() const { return absolute() ? unit.keys : unit.rotated; }
  __device__ const char* at(const void* rows, long index, int dim) const {
    return static_cast<const char*>(rows) + index * dim * bytes_of(trace.elements);
  }
  __device__ int query_head(int g) const { return unit.info.kv_head * trace.group + g; }

  /// Records what went wrong first; false when something had before.
  __device__ bool fail(UnitError error, int a, int b = 0, int c = 0) const {
    return record_error(progress, error, a, b, c);
  }

  /// A slot's row was written in memory: a ring may not know it.
  __device__ void row_changed(int slot) {
    if (stale >= 0 && stale != slot) ring.running = false;
    stale = slot;
  }

  /// Tokens [first, last) as rows of slots [place, ...). State is the caller's.
  __device__ void append_rows(int first, int last, int place) {
    ring.running = false;
    const long from = static_cast<long>(unit.info.kv_head) * trace.tokens + first;
    const int n = last - first, element = bytes_of(trace.elements);
    copy_bytes(const_cast<char*>(at(unit.keys, place, trace.key_dim)),
               at(absolute() ? layer.k_rotated : layer.k, from, trace.key_dim),
               static_cast<long>(n) * trace.key_dim * element);
    copy_bytes(const_cast<char*>(at(unit.values, place, trace.value_dim)), at(layer.v, from, trace.value_dim),
               static_cast<long>(n) * trace.value_dim * element);
    for (int i = static_cast<int>(threadIdx.x); i < n; i += team_threads) {
      const int slot = place + i;
      unit.token[slot] = first + i, unit.multiplicity[slot] = 1;
      unit.order[slot] = unit.rank[slot] = slot;
      if (!absolute()) unit.rotated_at[slot] = -1;
    }
  }

  /// Where each of the first n slots' keys are rotated to, in place[slot]; needs a barrier before and gives one.
  __device__ void find_places(int n, int* place) const {
    if (settings.positions == Positions::cache) {
      for (int s = static_cast<int>(threadIdx.x); s < n; s += team_threads) place[s] = unit.rank[s];
      __syncthreads();
      return;
    }
    const int first = unit.multiplicity[unit.order[0]];
    // A merged slot sits where the last token of its span was; the present block goes on where the cache ended.
    const int tokens = team.add_before(
        n,
        [&](int i) {
          const int slot = unit.order[i];
          return unit.token[slot] < block_first ? unit.multiplicity[slot] : 0;
        },
        [&](int i, int mine, int before) {
          if (mine > 0) place[unit.order[i]] = before + mine - first;
        });
    for (int s = static_cast<int>(threadIdx.x); s < n; s += team_threads)
      if (unit.token[s] >= block_first) place[s] = tokens + unit.token[s] - block_first;
    __syncthreads();
  }

  /// Row `in` rotated to a place, by one warp.
  __device__ void rotate(int place, const char* in, void* out) const {
    const Rotation rotation = rotation_of(trace, layer);
    const long angles = static_cast<long>(place) * trace.pairs;
    for (int piece = static_cast<int>(threadIdx.x % 32); piece < pieces_of_row(rotation, 1); piece += 32)
      rotate_piece<1>(rotation, layer.cos + angles, layer.sin + angles, in, out, piece);
  }

  /// Brings unit.rotated up to date for the first n slots; places are in unit.work[3]. Needs and gives a barrier.
  __device__ void rotate_keys(int n) const {
    int* place = unit.work[3];
    find_places(n, place);
    for (int s = static_cast<int>(threadIdx.x / 32); s < n; s += team_warps) {
      if (unit.rotated_at[s] == place[s]) continue;
      rotate(place[s], at(unit.keys, s, trace.key_dim), const_cast<char*>(at(unit.rotated, s, trace.key_dim)));
      __syncwarp();
      if (threadIdx.x % 32 == 0) unit.rotated_at[s] = place[s];
    }
    __syncthreads();
  }

  /// The slot that a query of `token` sits at: the newest of the first n that is not after it.
  __device__ int slot_of_query(int token, int n) const {
    const int newest = unit.order[n - 1], guess = n - 1 - (unit.token[newest] - token);
    if (guess >= 0 && guess < n)  // where it is, if nothing after it has gone
      if (const int slot = unit.order[guess]; unit.token[slot] == token) return slot;
    int low = 0, high = n;  // places: the first whose token is greater
    while (low < high) {
      const int middle = (low + high) / 2;
      if (unit.token[unit.order[middle]] <= token)
        low = middle + 1;
      else
        high = middle;
    }
    return unit.order[low > 0 ? low - 1 : 0];
  }

  /// unit.queries [group][count] = the group's queries of `tokens`, rotated to the places of slots [0, n); a warp a row.
  __device__ void rotate_queries(const int* tokens, int count, int n) const {
    for (int i = static_cast<int>(threadIdx.x / 32); i < count * trace.group; i += team_warps) {
      const int r = i / trace.group, g = i % trace.group, from = layer.row_of_token[tokens[r]];
      rotate(unit.work[3][slot_of_query(tokens[r], n)],
             at(layer.q, static_cast<long>(query_head(g)) * layer.query_rows + from, trace.key_dim),
             const_cast<char*>(at(unit.queries, static_cast<long>(g) * count + r, trace.key_dim)));
    }
  }

  /// Keys and the queries of `token` turned to their places. Needs and gives a barrier.
  static __device__ __noinline__ void turn(Play play, int token) {
    play.rotate_keys(play.size);
    play.rotate_queries(&token, 1, play.size);
    if (threadIdx.x == 0) play.progress.turned_rows = 0;
    if constexpr (copies_boxes) written_to_device();
    __syncthreads();
  }

  /// fixed.look = what one token's queries look at: all slots. Keys and queries turn to their places first, where they have
  /// some. Needs and gives a barrier.
  __device__ void look_at(int token, const float* bias, int newest_key = 0x7fffffff, float* probe = nullptr) const {
    if (!absolute()) turn(*this, token);
    if (threadIdx.x == 0) {
      RowLook& look = fixed.look;
      look.keys = attended_keys(), look.values = unit.values;
      look.from = {absolute() ? &fixed.maps->keys : &fixed.maps->rotated, &fixed.maps->values, fixed.unit_index};
      look.key_dim = trace.key_dim, look.value_dim = trace.value_dim, look.group = trace.group;
      look.scale = trace.scale, look.softcap = trace.softcap, look.bias = bias, look.token = unit.token;
      look.newest_key = newest_key, look.window = layer.window;
      look.masked = layer.window > 0 || newest_key < now || token < now;
      look.logits = fixed.keeps_logits ? fixed.logits : nullptr, look.logit_stride = fixed.logit_stride;
      look.kept_tiles = settings.kept_tiles;
      look.probe_vector = probe ? unit.vector : nullptr, look.probe = probe;
    }
    __syncthreads();
  }

  __device__ TokenAttention attention() const {
    return {team, trace.elements, layer.sink_logit ? layer.sink_logit + query_head(0) : nullptr};
  }

  /// Where a token's queries lie when fixed.look is of the cache, head by head.
  __device__ Queries queries_of(int token) const {
    if (!absolute()) return {unit.queries, trace.key_dim};
    const long rows = layer.query_rows, first = query_head(0) * rows + layer.row_of_token[token];
    return {at(layer.q_rotated, first, trace.key_dim), rows * trace.key_dim};
  }

  /// Attends as fixed.look says, over `slots` slots and a newest one; results are in `row` and the look's logits, what rings
  /// hold is lost. Gives a barrier. `width` and `tile` as TokenAttention::streamed has them.
  template <int width, int tile = 0>
  static __device__ __noinline__ void attend(Play& play, const Queries& queries, int token, int slots) {
    const RowLook& look = play.fixed.look;
    const void* const key = play.at(look.keys, slots, look.key_dim);
    const void* const value = play.at(look.values, slots, look.value_dim);
    const RowNow mine{slots, token, play.row.queries[play.now & 1], key, value, play.changed};
    if (width == 0 && !play.fixed.streamed) return play.attention().plain(look, queries, mine, play.row);
    stage_queries(look, queries, play.row.queries[play.now & 1], play.row.query_rows);
    play.attention().streamed<width, tile>(look, mine, play.row, play.ring);
  }
  template <int width = 0, int tile = 0>
  __device__ void attend_apart(int token) {
    Play copy = *this;
    attend<width, tile>(copy, queries_of(token), token, size - 1);
    follow(copy);
  }

  /// A row's new content where the ring holds it already; by the warp that streams the slot. `tile`: fixed.tile, which steps know.
  __device__ __forceinline__ void patch(int slot, const void* key, const void* value, int tile) const {
    if (!fixed.streamed) return;
    const int chunk = static_cast<int>(threadIdx.x % 16);
    const bool keys = threadIdx.x % 32 < 16, there = chunk * 8 < (keys ? trace.key_dim : trace.value_dim);
    const uint4 words = there ? static_cast<const uint4*>(keys ? key : value)[chunk] : uint4{};
    TileRing::patch(shared_address(row.stream.ring), ring, stream_width(trace.key_dim, trace.value_dim), tile, slot,
                    words, there);
  }
  /// Whether this warp streams a slot.
  __device__ bool streams_slot(int slot, int tile) const { return warp == tile_of(slot, tile) % stream_warps; }

  /// order and rank without the victim, whose place was `gap`; by `threads` threads. Needs a barrier before, one must follow.
  __device__ void close_gap(int victim, int gap, int thread, int threads) const {
    const int last = size - 1;
    int *rank = unit.rank, *order = unit.order;  // they may lie in device memory
    team.for_each_read_by(
        thread, threads, size,
        [&](int s) { return s == victim ? gap : rank[s]; },  // which the last slot's owner writes
        [&](int s, int old) {
          const int place = old > gap ? old - 1 : old, slot = s == last ? victim : s;
          if (s != victim) rank[slot] = place, order[place] = slot;
        });
  }
  /// The books of the same; by the clerk, who knows all that he books. `merges`: tokens may stand for others; `adopted`: the victim
  /// has joined one; `turns`: keys turn to their places.
  __device__ void book_removal(int victim, bool merges, bool adopted, bool turns) const {
    const int last = size - 1, gone = unit.token[victim], token = unit.token[last];
    int *const token_at = unit.token + victim, *const parent_at = unit.parent + gone;  // all before the first store
    int* const multiplicity_at = unit.multiplicity + victim;
    int* const rotated_at = turns ? unit.rotated_at + victim : nullptr;
    const int multiplicity = merges ? unit.multiplicity[last] : 1;
    if (!adopted) *parent_at = -2 - now;  // lost
    if (victim == last) return;
    *token_at = token;
    if (merges) *multiplicity_at = multiplicity;
    if (rotated_at) *rotated_at = -1;
  }
  /// A slot's rows, by one warp.
  __device__ __forceinline__ void write_rows_of(int slot, const void* key, const void* value) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (fixed.streamed) {  // half a warp a row
      const bool keys = lane < 16;
      const int dim = keys ? trace.key_dim : trace.value_dim, chunk = lane % 16;
      uint4* const rows = reinterpret_cast<uint4*>(keys ? unit.keys : unit.values);
      if (chunk * 8 < dim) rows[slot * (dim / 8) + chunk] = static_cast<const uint4*>(keys ? key : value)[chunk];
      return;
    }
    copy_row(unit.keys, trace.elements, trace.key_dim, slot, key, 0, lane, 32);
    copy_row(unit.values, trace.elements, trace.value_dim, slot, value, 0, lane, 32);
  }
  /// The last slot's rows, `key` and `value`, take the victim's place: known to the warp that streams it, others need a barrier.
  __device__ __forceinline__ void take_place(int victim, const void* key, const void* value, int tile) {
    if (victim != size - 1 && streams_slot(victim, tile)) {
      write_rows_of(victim, key, value);
      __syncwarp();
      patch(victim, key, value, tile);
    }
    changed = victim, --size;
  }

  /// order and rank from the slots' tokens: all tokens so far are looked at. Needs and gives a barrier.
  static __device__ __noinline__ void find_order(const Fixed& f, int size, int newest) {
    const Unit& unit = f.unit;
    const BlockTeam team{const_cast<TeamMemory*>(&f.team)};
    int* slot_of = unit.lost_at;  // not needed before the end
    team.for_each(newest + 1, [&](int t) { slot_of[t] = -1; });
    __syncthreads();
    team.for_each(size, [&](int s) { slot_of[unit.token[s]] = s; });
    __syncthreads();
    team.number(
        newest + 1, [&](int t) { return slot_of[t] >= 0; },
        [&](int t, bool there, int before) {
          if (there) unit.order[before] = slot_of[t], unit.rank[slot_of[t]] = before;
        });
    __syncthreads();
  }

  /// The slot of a place in token order, and whether it is one that stays, or goes.
  struct Place {
    int slot;
    bool is;
    __device__ explicit operator bool() const { return is; }
  };
  __device__ Place place(int i, bool stays) const {
    const int slot = unit.order[i];
    return {slot, (unit.stays[slot] != 0) == stays};
  }

  /// The `gone` slots with stays[slot] == 0 go; survivors from the end fill the holes, in any order. `move(from, to)` takes
  /// along what else belongs to a slot; one thread a move. Needs and gives a barrier.
  template <class Move>
  __device__ void remove_many(int gone, Move move) {
    const int n = size, kept = n - gone;
    int *place_of = unit.work[1], *hole = unit.work[2];
    team.number<16>(
        n, [&](int i) { return place(i, true); },
        [&](int, const Place& stays, int before) {
          if (stays) place_of[stays.slot] = before;
        });
    struct Victim {
      int token, parent;
      bool stays;
    };
    const int* const tokens = unit.token;  // read once: stores would make the compiler read pointers again each time
    int* const parents = unit.parent;
    const int lost = -2 - now;
    team.for_each_read<16>(
        n,
        [&](int s) {
          const int token = tokens[s];
          return Victim{token, parents[token], unit.stays[s] != 0};
        },
        [&](int, const Victim& v) {
          if (!v.stays && v.parent == v.token) parents[v.token] = lost;
        });
    __syncthreads();
    team.number<16>(
        kept, [&](int s) { return unit.stays[s] == 0; },
        [&](int s, bool is_hole, int before) {
          if (is_hole) hole[before] = s;
        });
    int* from = unit.work[3];  // the survivor that fills each hole
    const int moves = team.number<16>(
        n - kept, [&](int i) { return unit.stays[kept + i] != 0; },
        [&](int i, bool survives, int before) {
          if (survives) from[before] = kept + i;
        });
    __syncthreads();
    move_rows(unit.keys, trace.key_dim * bytes_of(trace.elements), moves, from, hole);
    move_rows(unit.values, trace.value_dim * bytes_of(trace.elements), moves, from, hole);
    struct Survivor {
      int to, slot, token, multiplicity, place;
    };
    team.for_each_read(
        moves,
        [&](int m) {
          const int slot = from[m];
          return Survivor{hole[m], slot, unit.token[slot], unit.multiplicity[slot], place_of[slot]};
        },
        [&](int, const Survivor& s) {
          unit.token[s.to] = s.token, unit.multiplicity[s.to] = s.multiplicity;
          if (!absolute()) unit.rotated_at[s.to] = -1;
          place_of[s.to] = s.place;
          move(s.slot, s.to);
        });
    __syncthreads();
    team.for_each_read(
        kept, [&](int s) { return place_of[s]; },
        [&](int s, int place) { unit.rank[s] = place, unit.order[place] = s, unit.stays[s] = 1; });
    __syncthreads();
    size = kept, ring.running = false;
  }
};

}  // namespace kv
