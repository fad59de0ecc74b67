// Softmax attention of a few query rows over the slots of one KV head, in tiles: no rows x slots matrix is ever whole.
#pragma once
#include <Eigen/Core>
#include <cstddef>
#include <functional>
#include <limits>
#include <span>
#include <vector>

namespace kv {

/// What the queries look at. All pointers are borrowed.
struct AttentionKeys {
  const float* keys = nullptr;    // [slots][key_dim], rotated
  const float* values = nullptr;  // [slots][value_dim]
  const int* token = nullptr;     // [slots] decides who is visible
  int slots = 0, key_dim = 0, value_dim = 0;
  const float* bias = nullptr;  // [slots] added to the logits after the softcap; null = none
};

/// The model's attention arithmetic: logit = softcap(scale * q.k); a sink logit joins the denominator only.
struct AttentionRule {
  float scale = 1, softcap = 0;
  int window = 0;                     // token j is visible to token i when j <= i and (window == 0 or i - j < window)
  const float* sink_logit = nullptr;  // [group] or null
};

/// True when a query at token `query` may see a key of token `key`.
inline bool visible(const AttentionRule& rule, int query, int key) {
  return key <= query && (rule.window == 0 || query - key < rule.window);
}

/// The logit of one query and one key, in the rule's own arithmetic.
float logit(const AttentionRule& rule, const float* query, const float* key, int key_dim);

/// Query rows of the group's heads, rotated.
struct AttentionQueries {
  const float* queries = nullptr;  // [rows][group][key_dim]
  const int* token = nullptr;      // [rows]
  int rows = 0, group = 1;
  int newest_key = std::numeric_limits<int>::max();  // keys of later tokens are hidden from all rows
};

/// Softmax probabilities and final logits of a tile: [tile rows][group], `stride` floats apart, of slots [0, columns);
/// later slots are not visible to these rows. `logit` is without bias, and -infinity where masked. `output`
/// [tile rows][group][value_dim] is null when none was asked for.
struct AttentionTile {
  const float* probability;
  const float* logit;
  const float* output;
  int first_row, rows, columns;
  std::size_t stride;
};

class Attention {
 public:
  /// `plain` leading slots are visible to every row without looking at tokens (0 when unsure). Row i may see at most
  /// slots [0, columns_of_row0 + i): pass `slots` for all rows when order does not follow tokens. `output`
  /// [rows][group][value_dim] and `lse` [rows][group] (log of the denominator) may be null. `observe` may be empty.
  void run(const AttentionKeys& keys, const AttentionRule& rule, const AttentionQueries& queries, int plain,
           int columns_of_row0, float* output, double* lse, const std::function<void(const AttentionTile&)>& observe);

  std::size_t workspace_bytes() const { return sizeof(float) * (probability_.capacity() + logit_.capacity()); }

 private:
  // Workspace, kept between calls. Every row starts on a 64-byte boundary: Eigen's vector loops then cut all rows the
  // same way wherever the buffer lies, and the same inputs give the same bits.
  std::vector<float, Eigen::aligned_allocator<float>> probability_, logit_;
};

}  // namespace kv
