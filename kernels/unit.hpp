// What kernels know: a trace, its layers, and units. A unit is one KV head of one layer replayed at one point; one thread
// block plays it. All pointers are to device memory.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "core/replay.hpp"
#include "core/spec.hpp"
#include "kernels/attention_task.hpp"
#include "kernels/row_memory.hpp"
#include "kernels/tile_map.hpp"

namespace kv {

constexpr int never_lost = 0x7fffffff;

/// What all layers of a trace share.
struct TraceData {
  int tokens = 0, prompt_tokens = 0, kv_heads = 0, group = 1, key_dim = 0, value_dim = 0;
  Dtype dtype = Dtype::bfloat16;     // of the trace: what folded rows are rounded to
  Dtype elements = Dtype::bfloat16;  // what rows are stored as: dtype, or float32 where rotated keys need it
  float scale = 1, softcap = 0;
  double attention_scaling = 1;
  int pairs = 0;                  // rotated channel pairs
  bool half_style = true;         // pairs (i, i + pairs) or (2i, 2i + 1)
  const int* position = nullptr;  // [tokens]
};

/// Tokens [first, last) of a prompt's first block whose queries look at a cache that still holds every token before them: their
/// log-sum-exps are those of full attention, which a prefill keeps.
struct Prefill {
  int first = 0, last = 0;
  constexpr int rows() const { return last - first; }
  auto operator<=>(const Prefill&) const = default;
};

/// Arrays of rows, for streams by tiles of one size. `rotated` is used where rows of a cache turn to their places.
struct TileMaps {
  TileMap keys{}, rotated{}, values{};
};

/// One layer's tensors, as elements.
struct LayerData {
  const void *q = nullptr, *k = nullptr, *v = nullptr;    // [query_heads][query_rows][key_dim], [kv_heads][tokens][...]
  const void *q_rotated = nullptr, *k_rotated = nullptr;  // at their own positions
  const float *cos = nullptr, *sin = nullptr;             // [tokens][pairs] rotations to positions 0, 1, 2, ...
  const float* inv_freq = nullptr;                        // [pairs]
  const int* row_of_token = nullptr;                      // [tokens] row in q, -1 = not recorded
  const float* sink_logit = nullptr;                      // [query_heads] or null
  const float* e = nullptr;                               // [query_heads][query_rows][value_dim] or null
  const float* norms = nullptr;                           // [kv_heads][tokens] output norms, for policies that ask
  const float* full_output = nullptr;                     // [kv_heads][measured][group][value_dim]
  const float* full_lse = nullptr;                        // [kv_heads][measured][group]
  const float* prefill_lse = nullptr;                     // [kv_heads][prefill rows][group] of the launch's batch
  const TileMaps* maps = nullptr;                         // of k_rotated and v, a unit a KV head
  Dtype rope_step = Dtype::float32;                       // what every product and sum of a rotation is rounded to
  int query_rows = 0, window = 0;
};

/// What went wrong first in a unit; 0 = nothing.
enum class UnitError : int { none, nan_score, bad_plan, bad_divisor, not_finite };

/// What a unit has done so far; downloaded at the end.
struct Progress {
  int size = 0;      // slots in the cache
  int attended = 0;  // slots that the present queries look at: more than `size` while a block is probed
  int compressions = 0, notes = 0;
  int queries = 0;           // that query statistics have seen
  int past = 0;              // tokens whose queries are no longer to come, for oracles
  int turned_rows = 0;       // of the look that turned the queries
  bool compressing = false;  // takes part in the compression under way
  bool more = false;         // another round of it is needed
  int lost = 0;  // lost_mass cannot come from log-sum-exps alone: positions are not absolute, or something merged
  UnitError error = UnitError::none;
  int error_at[3] = {};  // slot, token, other
  float error_weights[4] = {};
  long long evictions = 0, merges = 0, lost_in_folds = 0, lost_by_clip = 0, weights_outside = 0, unbalanced = 0;
};

/// One unit. Arrays of [capacity] are by slot unless said.
struct Unit {
  HeadInfo info;  // info.budget may change once, by an adaptive allocation
  Protect protect;
  int point = 0, layer = 0;             // of the launch's points and layers
  int first_head = 0, layer_heads = 1;  // units of the same layer and point: they share selections under layer scope
  int capacity = 0;

  void *keys = nullptr, *values = nullptr;  // [capacity][dim]
  void* rotated = nullptr;                  // [capacity][key_dim] keys at their places, unless positions are absolute
  int* rotated_at = nullptr;                // the place they are rotated to, -1 = stale
  int *token = nullptr, *multiplicity = nullptr, *order = nullptr, *rank = nullptr;
  char *state = nullptr, *head_state = nullptr, *scratch = nullptr;
  float *vector = nullptr, *value_vector = nullptr, *probe = nullptr, *bias = nullptr, *score = nullptr;
  float* sums = nullptr;           // [capacity][group] of the latest look
  float* logits = nullptr;         // [group][logit_stride] of the latest row, where shared memory does not hold them
  float* probabilities = nullptr;  // the same shape, or [group][tokens], for rows that are not streamed
  float* score_at[2] = {};         // by place; two, so that a fast head does not overwrite what a slow one reads
  std::uint8_t* safety_at[2] = {};
  float* all_score = nullptr;  // by place: summed over the heads of the layer
  std::uint8_t* all_safety = nullptr;
  std::uint8_t* stays = nullptr;
  int* target = nullptr;
  float *similarity = nullptr, *norm = nullptr, *gradient = nullptr, *future = nullptr;
  int* work[5] = {};
  int* list = nullptr;  // [list_size] victims by target
  int list_size = 0;
  Fold* plans = nullptr;          // by victim
  FoldTarget* targets = nullptr;  // by kept place
  int* parent = nullptr;          // [tokens] itself, the token it was folded into, or -2 - now when it was lost
  int* lost_at = nullptr;         // [tokens] see LostMassTask
  float* notes = nullptr;         // [tokens]
  double *query_sum = nullptr, *query_outer = nullptr;  // [group][key_dim], [group][key_dim][key_dim]
  float *query_mean = nullptr, *query_covariance = nullptr;
  double* rotation = nullptr;                            // [2][pairs]
  double *future_all = nullptr, *future_left = nullptr;  // [tokens]
  float* full_logits = nullptr;                          // [group][tokens] of full attention, where it is asked for
  const int* every_token = nullptr;                      // 0, 1, 2, ...
  long long* slot_mass = nullptr;                        // [capacity + 1], see measure_mass
  // Block looks: queries at their places, what came of them.
  void* queries = nullptr;       // [group][block rows][key_dim], unless positions are absolute
  int* query_row = nullptr;      // [block rows]
  int* query_place = nullptr;    // [block rows] where queries turn to, or -1 = they stand there; where they turn at all
  int2* query_turned = nullptr;  // [block rows] whose they are, by token, and where they stand
  int* measured_row = nullptr;   // [measured] rows of the measured queries
  float *block_output = nullptr, *block_lse = nullptr;
  // Results, [group][measured].
  double* compared[4] = {};  // |o' - o|^2, |o|^2, |o'|^2, and o . o', which `finish` makes the cosine distance
  double *lost_mass = nullptr, *mass_tv = nullptr;  // until `finish`, lost_mass holds the log-sum-exp of o'
  float* delta = nullptr;                           // [measured][group][value_dim] o' - o, for W_o; or null
  int* slots_at = nullptr;                          // [steps]
  unsigned* clocks = nullptr;                       // [steps][timed_phases], or null
};

/// How rows turn.
struct Rotation {
  Dtype elements = Dtype::bfloat16, step = Dtype::float32;  // step: what every product and sum is rounded to
  int dim = 0, pairs = 0;
  bool half_style = true;  // pairs (i, i + pairs) or (2i, 2i + 1)
};

/// What a launch does with every unit.
enum class Stage {
  begin,     // before the first token
  look,      // says in a task what queries look at
  probe,     // on_probe, from the sums
  append,    // a block becomes slots
  measure,   // a block's masses against full attention
  observe,   // on_attention, from the sums
  score,     // scores become candidates
  compress,  // a round: choose, fold, drop
  future,    // adds the mass that the queries of tokens [first, last) will give, for oracles
  steps,     // tokens that come alone, one after the other
  finish     // measures that single queries did not need; which tokens nothing stands for any more
};

/// Whether a compression may take several rounds.
constexpr bool in_rounds(const Traits& traits) {
  return traits.select == Select::links && traits.picks == Picks::disjoint;
}

/// Settings that all points of a launch share.
struct PlaySettings {
  Positions positions = Positions::absolute;
  Compress compress = Compress::always;
  bool mass = false;
  int measured_count = 0;
  const int* measured = nullptr;           // tokens, ascending
  const int* measured_of_token = nullptr;  // [tokens] index in `measured`, or -1
  int kept_tiles = -1;                     // RowLook::kept_tiles
};

/// One launch of a policy's kernel. Numbers are the same for all units.
struct Launch {
  TileMaps maps;  // of all units' rows, by the tiles of ring_bytes
  const Unit* units = nullptr;
  Progress* progress = nullptr;
  const LayerData* layers = nullptr;
  TraceData trace;
  PlaySettings settings;
  int unit_count = 0;
  Stage stage = Stage::begin;
  Phase phase = Phase::prompt;
  int first = 0, last = 0;    // tokens of the block, or of the steps
  int block = 0;              // index of the block, or of the first step
  const int* rows = nullptr;  // tokens whose queries look
  int row_count = 0, newest_key = 0x7fffffff;
  bool outputs = false, sums = false;    // what the look is for
  bool probing = false, window = false;  // who looks: a block that is to come, or the last queries
  Prefill prefill;                       // not empty: the rows are among them, and nothing is left to attend
  bool first_round = true;               // of a compression
  bool last_compresses = true;           // the last step ends with its compression
  bool together = false;                 // layers decide as one within the launch; meeting[first head] counts arrivals
  int* meeting = nullptr;
  AttentionTask* tasks = nullptr;  // [units]
  int step_slots = 0;              // most slots of a unit during the steps
  int record_bytes = 0;            // of shared memory for StepRecords
  int ring_bytes = short_ring;     // of shared memory for a warp's ring
  bool probes = false;             // rows may have the policy's vector beside their queries
  int plain_width = 0;             // of steps over plain rows (step_row.cuh): of their streams; 0 = other rows
  bool timed = false;
};

}  // namespace kv
