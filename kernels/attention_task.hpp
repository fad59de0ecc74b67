// What the attention kernels work on: one task is one KV head's cache and the query rows that look at it.
#pragma once
#include "core/dtype.hpp"

namespace kv {

/// Common to all tasks of a launch. Queries, keys and values are stored as `elements`; arithmetic is float32.
struct AttentionShape {
  Dtype elements = Dtype::bfloat16;
  int key_dim = 0, value_dim = 0, group = 1;
  float scale = 1, softcap = 0;  // logit = softcap(scale * q.k), softcap 0 = none
  bool fast = false;             // see block_attention; nothing else looks at it
};

/// All pointers are to device memory; keys, values and queries are 16-byte aligned, output is 8-byte aligned. Slot s is
/// visible to row r when token[s] <= query_token[r], token[s] <= newest_key and, under a sliding window,
/// query_token[r] - token[s] < window. Slots [0, older) hold tokens that are older than every row's, in any order; slots
/// [older, slots) are in token order, and so are the rows. A row that sees nothing has output 0 and a log-sum-exp of
/// -infinity.
struct AttentionTask {
  const void *keys = nullptr, *values = nullptr;  // [slots][key_dim], [slots][value_dim]
  const int* token = nullptr;                     // [slots]
  const float* bias = nullptr;                    // [slots] added to the logit after the softcap, or null
  const float* sink_logit = nullptr;              // [group] joins the denominator only, or null
  const void* queries = nullptr;  // row r of head g: queries + (g * query_stride + query_row[r]) * key_dim
  const int *query_row = nullptr, *query_token = nullptr;  // [rows]
  long query_stride = 0;                                   // rows between the heads of a group
  float *output = nullptr, *lse = nullptr;                 // [rows][group][value_dim] or null, [rows][group]
  float* sums = nullptr;                                   // [slots][group], see column_sums
  int slots = 0, older = 0, rows = 0, window = 0, newest_key = 0x7fffffff;
  int none = 0;  // tasks are copied word by word: no word is left unset
};

}  // namespace kv
