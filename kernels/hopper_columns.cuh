// Column sums on Hopper: key_dim = 128, 16-bit elements, no softcap. As many blocks as there is room for go through the
// work: runs of slots, of which four warpgroups own 64 each. Four warps copy ahead: each the keys of one warpgroup, and every
// tile of queries whose stage it owns. So the next run's keys and queries arrive under the present one's products.
#pragma once
#include "kernels/attention_launch.cuh"
#include "kernels/hopper.cuh"

namespace kv::blocks {

/// The query tiles that stream past some slots: rows of one head after the other, or, of windows of few rows, `paired` heads:
/// one in the upper half of a tile, the next in the lower.
struct QueryTiles {
  static constexpr int half = hopper_tile / 2;
  RowRange range;
  int first_head, heads;
  bool paired;

  __host__ __device__ QueryTiles(RowRange rows, int first, int count)
      : range(rows), first_head(first), heads(count), paired(count > 1 && rows.end - rows.begin <= half) {}
  __host__ __device__ int of_head() const { return (range.end - range.begin + hopper_tile - 1) / hopper_tile; }
  __host__ __device__ int count() const { return paired ? (heads + 1) / 2 * of_head() : heads * of_head(); }
  /// Of the i-th tile's upper half; from 0. An odd number of heads has no lower half in the last tile.
  __device__ int head(int i) const { return paired ? 2 * i : i / of_head(); }
  __device__ bool has_lower(int i) const { return !paired || head(i) + 1 < heads; }
  __device__ int row(int i) const { return range.begin + (paired ? 0 : i % of_head() * hopper_tile); }
  /// How far the lower half's rows are behind what follows the upper one's.
  __device__ int back() const { return paired ? half : 0; }
};

/// What a warpgroup has to know of a piece of work.
struct alignas(16) ColumnRun {
  AttentionTask task;
  QueryTiles tiles;
  int first;           // slot of the block; -1 when there is no more work
  bool other_queries;  // than of the piece before
  bool visible;        // to every row, as far as is known: of queries that stream, tiles know
  int token[64];
  float bias[64];
};

/// What is known of a tile's query rows: 128 of a head, or 64 of `head` and 64 of the next one.
struct alignas(16) ColumnRows {
  static constexpr int none = INT_MIN / 2;  // token of a row that does not count: it sees nothing
  float lse2[hopper_tile];                  // in units of log 2
  int token[hopper_tile];
  int head, after;   // the upper half's head; rows of the task that come after the first one
  unsigned visible;  // bit g: all rows count and see all slots of warpgroup g; of queries that stay: all rows count
  bool lower, last;  // has a lower half; is the head's last
};

/// Six buffers of 128 rows: keys of a run and four stages of queries that stream past; or, when the queries `stay`, keys of
/// two runs and the queries.
struct HopperColumns {
  static constexpr int groups = 4, slots = 64 * groups, threads = 128 * (groups + 1), buffers = 6;
  static constexpr int run_bytes = groups * bytes_64;
  static constexpr int stages = 4, staying = 2;
  // A query tile is free once its dots are there, what is known of its rows only after the next tile's dots. So it is with
  // the keys of a run and what is known of it.
  static constexpr int known = 2 * stages, known_runs = 4;
  static constexpr int rows = buffers * bytes_128, runs = rows + known * int{sizeof(ColumnRows)};
  static constexpr int bytes = runs + groups * known_runs * int{sizeof(ColumnRun)} + swizzle_bytes;

  static constexpr int keys_of(bool stay) { return stay ? 2 : 1; }
};

/// A launch's work: pieces of 256 slots of a task with `heads` query heads. Queries that `stay` are copied once for all slots
/// of a task: so blocks take pieces that follow one another. Else they take the longest first, in turns that go to and fro.
struct HopperColumnWork {
  int tasks, runs, heads, parts;  // runs of slots, and parts of a group
  bool stay;

  HopperColumnWork(const AttentionShape& shape, const AttentionBounds& bounds)
      : tasks(bounds.tasks),
        runs(tiles_of(bounds.slots, HopperColumns::slots)),
        heads(shape.group),
        stay(bounds.rows <= hopper_tile) {
    while (stay && QueryTiles({0, bounds.rows}, 0, heads).count() > HopperColumns::staying) --heads;
    heads = std::min(heads, heads_together(tasks * runs, shape.group, multiprocessors()));
    parts = tiles_of(shape.group, heads);
  }
  __host__ __device__ int pieces() const {
    return stay ? tasks * runs * parts : static_cast<int>(work_blocks(tasks, runs * parts));
  }

  struct Piece {
    int task, run, part;
  };
  /// A block's k-th piece; its task may be past the last one, or end before its slots. False after the last piece.
  __device__ bool find(int k, Piece& piece) const {
    const int all = pieces();
    if (stay) {
      const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
      const long first = static_cast<long>(block) * all / blocks, end = static_cast<long>(block + 1) * all / blocks;
      const int i = static_cast<int>(first) + k;
      piece = {i / (runs * parts), i % runs, i / runs % parts};
      return i < end;
    }
    const int i = piece_of_turn(k);
    const WorkItem item = work_item(tasks, runs * parts, i);
    piece = {item.task, item.rank / parts, item.rank % parts};
    return i < all;
  }
};

#ifdef KV_HOPPER
/// The barriers of a block: full and free ones of query stages, and of keys by warpgroup and buffer.
struct ColumnBarriers {
  static constexpr int stages = HopperColumns::stages, keys = 2 * HopperColumns::groups, count = 2 * (stages + keys);
  uint32_t first;
  __device__ uint32_t full(unsigned stage) const { return first + 8 * stage; }
  __device__ uint32_t free(unsigned stage) const { return full(stages + stage); }
  __device__ uint32_t keys_full(int group, int buffer) const { return full(2 * stages + 2 * group + buffer); }
  __device__ uint32_t keys_free(int group, int buffer) const { return keys_full(group, buffer) + 8 * keys; }
};

/// A copying warp's work: the keys of the warpgroup of its number, and the query tiles of the stage of its number.
struct ColumnCopies {
  using Layout = HopperColumns;
  const AttentionShape& shape;
  const ColumnBarriers& barriers;
  char* const shared;
  const int mine, lane = static_cast<int>(threadIdx.x % 32);

  /// Of lane g: the slots of warpgroup g, tokens of the first and the last.
  struct Slots {
    int first, first_key, last_key;

    __device__ bool visible(const AttentionTask& task, int first_row, int last_row) const {
      return all_visible(task, first, 64, first_key, last_key, first_row, last_row);
    }
  };

  /// The i-th of `tiles` is the turn-th tile in this stage. Rows past the range are zeros.
  __device__ void copy_queries(const AttentionTask& task, const QueryTiles& tiles, int i, uint32_t stages, int turn,
                               bool stay, const Slots& slots, ColumnRows& known) const {
    const int row = tiles.row(i), first_head = tiles.first_head + tiles.head(i), end = tiles.range.end;
    int index[4], token[4];
    float lse2[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const bool lower = tiles.paired && part >= 2, there = !lower || tiles.has_lower(i);
      const int head = first_head + (lower && there ? 1 : 0);
      const int r = row + 32 * part + lane - (lower ? tiles.back() : 0), real = min(r, end - 1);
      index[part] = r < end && there ? static_cast<int>(head * task.query_stride) + task.query_row[real] : -1;
      lse2[part] = task.lse[static_cast<long>(real) * shape.group + head] * log2_e;
      token[part] = index[part] < 0 ? ColumnRows::none : task.query_token[real];
    }
    if (turn > 0) barrier_wait(barriers.free(mine), (turn - 1) & 1);
    copy_rows(stages + mine * bytes_128, task.queries, index);
#pragma unroll
    for (int part = 0; part < 4; ++part)
      known.lse2[32 * part + lane] = lse2[part], known.token[32 * part + lane] = token[part];
    const bool lower = tiles.has_lower(i), full = lower && row + hopper_tile - tiles.back() <= end;
    const int first_row = __shfl_sync(~0u, token[0], 0), last_row = __shfl_sync(~0u, token[3], 31);
    const unsigned visible = __ballot_sync(~0u, full && (stay || slots.visible(task, first_row, last_row)));
    if (lane == 0) {
      known.head = first_head, known.after = task.rows - 1 - row, known.visible = visible;
      known.lower = lower, known.last = row + hopper_tile >= end;
    }
    publish_copies();
    barrier_arrive(barriers.full(mine));
  }

  /// The n-th piece's keys and what is known of it; first = -1 for the end of work.
  __device__ void copy_run(const AttentionTask* task, const QueryTiles& tiles, int first, bool other_queries, int n,
                           bool stay, const Slots& slots) const {
    const int buffers = Layout::keys_of(stay), buffer = n % buffers, turn = n / buffers;
    if (turn > 0) barrier_wait(barriers.keys_free(mine, buffer), (turn - 1) & 1);
    const int at = Layout::runs + (mine * Layout::known_runs + n % Layout::known_runs) * int{sizeof(ColumnRun)};
    ColumnRun* const run = reinterpret_cast<ColumnRun*>(shared + at);
    if (lane == 0) run->tiles = tiles, run->first = first, run->other_queries = other_queries;
    if (first >= 0) {
      const int rows = task->rows;
      const bool visible =
          !stay || (rows > 0 && slots.visible(*task, task->query_token[0], task->query_token[rows - 1]));
      if (lane == mine) run->visible = visible;
      const uint32_t base = shared_address(shared);
      const int slot = min(first + 64 * mine, task->slots);
      copy_tile<64>(base + buffer * Layout::run_bytes + mine * bytes_64,
                    static_cast<const char*>(task->keys) + static_cast<long>(slot) * 256, task->slots - slot);
      static_assert(sizeof(AttentionTask) <= 32 * 4);
      if (lane < static_cast<int>(sizeof(AttentionTask) / 4))
        copy_4(base + at + 4 * lane, reinterpret_cast<const int*>(task) + lane, true);
#pragma unroll
      for (int i = lane; i < 64; i += 32) {
        const int real = min(slot + i, task->slots - 1);
        copy_4(base + at + int{offsetof(ColumnRun, token)} + 4 * i, task->token + real, true);
        if (task->bias) copy_4(base + at + int{offsetof(ColumnRun, bias)} + 4 * i, task->bias + real, true);
      }
    }
    publish_copies();
    barrier_arrive(barriers.keys_full(mine, buffer));
  }

  __device__ void run(const AttentionTask* tasks, const HopperColumnWork& work) const {
    const uint32_t stages = shared_address(shared) + Layout::keys_of(work.stay) * Layout::run_bytes;
    ColumnRows* const known = reinterpret_cast<ColumnRows*>(shared + Layout::rows);
    int n = 0, streamed = 0, stays = -1;  // pieces, tiles that streamed, sets of queries that stayed
    int last_task = -1, last_part = -1;
    HopperColumnWork::Piece piece;
    for (int k = 0; work.find(k, piece); ++k) {
      const int first = piece.run * Layout::slots, first_head = piece.part * work.heads;
      if (piece.task >= work.tasks || first >= tasks[piece.task].slots) continue;
      const AttentionTask& task = tasks[piece.task];
      RowRange range{0, task.rows};
      if (!work.stay && task.rows > 0) range = rows_that_see(task, first, Layout::slots);
      const QueryTiles tiles(range, first_head, min(work.heads, shape.group - first_head));
      const int count = tiles.count(), mine_first = first + 64 * (lane % 4), last_slot = task.slots - 1;
      const Slots slots{mine_first, task.token[min(mine_first, last_slot)],
                        task.token[min(mine_first + 63, last_slot)]};
      for (int i = lane; i < 128; i += 32) {  // two lines a key
        const int slot = min(first + 64 * mine + i / 2, last_slot);
        prefetch_line(static_cast<const char*>(task.keys) + static_cast<long>(slot) * 256 + i % 2 * 128);
      }
      const bool other = piece.task != last_task || piece.part != last_part;
      last_task = piece.task, last_part = piece.part;
      if (other) ++stays;
      const int end = !work.stay ? count : other ? Layout::staying : 0;
      bool keys_there = false;
      for (int i = work.stay ? mine : (mine - streamed) & (Layout::stages - 1); i < end; i += Layout::stages) {
        // Three stages of four are free before the keys of the piece before are.
        if (!keys_there && (work.stay || i + 1 >= Layout::stages))
          copy_run(&task, tiles, first, other, n, work.stay, slots), keys_there = true;
        const int turn = work.stay ? stays : (streamed + i) / Layout::stages;
        const int at = work.stay ? stays % 2 * Layout::staying + i : (streamed + i) % Layout::known;
        if (i < count) {
          copy_queries(task, tiles, i, stages, turn, work.stay, slots, known[at]);
          continue;
        }
        if (turn > 0) barrier_wait(barriers.free(mine), (turn - 1) & 1);
        barrier_arrive(barriers.full(mine));  // stages that stay are counted alike
      }
      if (!keys_there) copy_run(&task, tiles, first, other, n, work.stay, slots);
      ++n, streamed += count;
    }
    copy_run(nullptr, QueryTiles({0, 0}, 0, 0), -1, false, n, work.stay, {});
  }
};

/// A thread's two slots.
struct ColumnSums {
  int token[2];
  float bias2[2], weight[2], sum[2] = {0, 0};
  float* to;  // sums of the slot, and the head from a tile's first on, that the lane writes; null of no slot

  __device__ ColumnSums(const ColumnRun& run, int warpgroup, int group) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32 % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = 16 * warp + lane / 4 + 8 * r;
      token[r] = run.token[at], bias2[r] = run.task.bias ? run.bias[at] * log2_e : 0.f;
      weight[r] = weight_of(bias2[r]);
    }
    const int slot = run.first + 64 * warpgroup + 16 * warp + lane / 4 + 8 * (lane % 2);
    to = slot < run.task.slots ? run.task.sums + static_cast<long>(slot) * group + lane / 2 % 2 : nullptr;
  }

  /// Whether what is summed without biases may be weighed afterwards: for whole warps.
  __device__ bool weights_do() const { return !__any_sync(~0u, isnan(weight[0]) || isnan(weight[1])); }

  /// What the halves of a tile of 128 rows add.
  template <class Weigh, bool biased, bool masked>
  __device__ __forceinline__ void add(float (&added)[2][2], const Accumulators& s, const LogitRule& rule,
                                      const AttentionTask& task, const ColumnRows& rows, int back) const {
    const int lane = static_cast<int>(threadIdx.x % 32), after = rows.after;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      const int at = 8 * n + 2 * (lane % 4), column = n < 8 ? at : at - back;
      const float2 lse = *reinterpret_cast<const float2*>(rows.lse2 + at);
      [[maybe_unused]] RowSight sight[2];
      if constexpr (masked) {
        const int2 tokens = *reinterpret_cast<const int2*>(rows.token + at);
        sight[0] = sight_of(task, tokens.x), sight[1] = sight_of(task, tokens.y);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = e / 2;
        float offset = -(e % 2 ? lse.y : lse.x);
        if constexpr (biased) offset += bias2[r];
        const float p = exp2_fast(__fmaf_rn(s[n][e], rule.factor2, offset));
        const float weighed = Weigh::weigh(p, s[n][e] * rule.factor, after - column - e % 2);
        if constexpr (masked)
          added[n / 8][r] += sight[e % 2].sees(token[r]) ? weighed : 0.f;
        else
          added[n / 8][r] += weighed;
      }
    }
  }

  /// Writes a head's sums and, if there are `two`, the next one's: four threads share two slots, each ends with one sum.
  __device__ __forceinline__ void store(const float (&first)[2], const float (&second)[2], int head, bool two) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const bool odd = lane % 2, lower = lane / 2 % 2;
    const float a = (odd ? first[1] : first[0]) + __shfl_xor_sync(~0u, odd ? first[0] : first[1], 1);
    const float b = (odd ? second[1] : second[0]) + __shfl_xor_sync(~0u, odd ? second[0] : second[1], 1);
    const float all = (lower ? b : a) + __shfl_xor_sync(~0u, lower ? a : b, 2);
    if (to && (two || !lower)) to[head] = all;
  }
};
#endif

template <class Weigh, class Element>
__global__ __launch_bounds__(HopperColumns::threads,
                             1) void hopper_column_kernel(AttentionShape shape, LogitRule rule,
                                                          const AttentionTask* tasks,
                                                          const __grid_constant__ HopperColumnWork work) {
#ifdef KV_HOPPER
  using Layout = HopperColumns;
  char* const unaligned = launch_memory<swizzle_bytes>();
  __shared__ uint64_t barrier_memory[ColumnBarriers::count];
  char* const shared = unaligned + (-shared_address(unaligned) & (swizzle_bytes - 1));
  const uint32_t base = shared_address(shared);
  const ColumnBarriers barriers{shared_address(barrier_memory)};
  if (threadIdx.x == 0) {
    for (int b = 0; b < Layout::stages; ++b)
      barrier_init(barriers.full(b), 32), barrier_init(barriers.free(b), 128 * Layout::groups);
    for (int g = 0; g < Layout::groups; ++g)
      for (int b = 0; b < 2; ++b)
        barrier_init(barriers.keys_full(g, b), 32), barrier_init(barriers.keys_free(g, b), 128);
    barriers_ready();
  }
  __syncthreads();

  const int warpgroup = warpgroup_of_warp();
  if (warpgroup == 0) {
    ColumnCopies{shape, barriers, shared, static_cast<int>(threadIdx.x / 32)}.run(tasks, work);
    return;
  }
  const int mine = warpgroup - 1;
  const int key_buffers = Layout::keys_of(work.stay);
  const uint32_t stages = base + key_buffers * Layout::run_bytes;
  const ColumnRun* const runs = reinterpret_cast<const ColumnRun*>(shared + Layout::runs) + mine * Layout::known_runs;
  const ColumnRows* const known = reinterpret_cast<const ColumnRows*>(shared + Layout::rows);
  Accumulators s;
  const Turns<Layout::groups> turns(mine);
  unsigned streamed = 0;  // as the copying warps count
  int stays = -1;
  for (int n = 0;; ++n) {
    const int buffer = n % key_buffers;
    barrier_wait(barriers.keys_full(mine, buffer), n / key_buffers & 1);
    const ColumnRun& run = runs[n % Layout::known_runs];
    if (run.first < 0) break;
    const AttentionTask& task = run.task;
    const int tiles = run.tiles.count(), back = run.tiles.back();
    const bool paired = run.tiles.paired, biased = task.bias != nullptr, slots_visible = run.visible;
    ColumnSums sums(run, mine, shape.group);
    constexpr bool in_proportion = requires { Weigh::in_proportion; };
    const bool weighed = in_proportion && biased && sums.weights_do();
    if (run.other_queries) {
      for (int b = 0; work.stay && stays >= 0 && b < Layout::staying; ++b) release(barriers.free(b));
      ++stays;
      for (int b = tiles; work.stay && b < Layout::staying; ++b) barrier_wait(barriers.full(b), stays & 1);
    }
    for (int i = 0; i < tiles; ++i) {
      const unsigned tile = work.stay ? stays % 2 * Layout::staying + i : streamed + i;
      const unsigned stage = work.stay ? i : tile % Layout::stages;
      barrier_wait(barriers.full(stage), (work.stay ? stays : tile / Layout::stages) & 1);
      turns.wait();
      start_dots<Element>(s, base + buffer * Layout::run_bytes + mine * bytes_64, stages + stage * bytes_128);
      turns.pass();
      const ColumnRows& rows = known[tile % Layout::known];
      const bool plain = slots_visible && (rows.visible >> mine & 1), last = rows.last, lower = rows.lower;
      const int head = rows.head;
      await_products<0>();
      pin(s);
      if (!work.stay) release(barriers.free(stage));
      if (i + 1 == tiles) release(barriers.keys_free(mine, buffer));
      float added[2][2] = {};
      if (!plain)
        sums.add<Weigh, true, true>(added, s, rule, task, rows, back);
      else if (biased && !weighed)
        sums.add<Weigh, true, false>(added, s, rule, task, rows, back);
      else
        sums.add<Weigh, false, false>(added, s, rule, task, rows, back);
      if (plain && weighed)
        for (int r = 0; r < 2; ++r) added[0][r] *= sums.weight[r], added[1][r] *= sums.weight[r];
      if (paired) {
        sums.store(added[0], added[1], head, lower);
        continue;
      }
      sums.sum[0] += added[0][0] + added[1][0], sums.sum[1] += added[0][1] + added[1][1];
      pin(sums.sum);
      if (!last) continue;
      sums.store(sums.sum, sums.sum, head, false);
      sums.sum[0] = sums.sum[1] = 0;
    }
    streamed += tiles;
    if (tiles > 0) continue;
    release(barriers.keys_free(mine, buffer));
    for (int h = 0; h < run.tiles.heads; ++h)  // nobody sees these slots
      sums.store(sums.sum, sums.sum, run.tiles.first_head + h, false);
  }
  turns.end();
#endif
}

}  // namespace kv::blocks
