// One trace, opened for many points: its layers in compute form and its full attention, computed once and shared.
#pragma once
#include <cstddef>
#include <memory>
#include <vector>

#include "core/rope.hpp"
#include "core/trace.hpp"

namespace kv {

/// One layer ready to replay: float32 tensors, with queries and keys also rotated at their own positions.
struct PreparedLayer {
  LayerInfo info;
  LayerTensors tensors;
  std::vector<float> q_rotated, k_rotated;   // as tensors.q and tensors.k
  std::vector<int> row_of_token;             // [tokens] row in q, or -1 when the query was not recorded
  std::shared_ptr<const RopeTable> by_slot;  // rotates to position 0, 1, 2, ...: positions `cache`
  std::size_t bytes() const;
};

/// Full attention of one layer for chosen queries.
struct FullAttention {
  std::vector<int> tokens;    // [M] measured tokens
  std::vector<float> output;  // [query_heads][M][value_dim]
  std::vector<double> lse;    // [query_heads][M] log of the softmax denominator, sink logits included
};

class Session {
 public:
  /// Layers are kept in memory up to `memory_limit` bytes together, least recently used first out. Throws TraceError.
  explicit Session(const std::filesystem::path& file, std::size_t memory_limit = std::size_t{2} << 30);
  ~Session();

  const TraceHeader& header() const;

  /// Layer `layer` of header().layers. Not thread-safe: called between parallel sections.
  std::shared_ptr<const PreparedLayer> layer(int layer);

  /// One dataset of a layer as it is stored, kept nowhere: Trace::stream. Any thread may, beside one in the other functions.
  void stream(int layer, const std::string& name, const WordSink& sink) const;

  /// How many layers fit into memory together: what a parallel section may hold at once.
  int layers_at_once();

  /// Full attention of that layer for `measured` tokens, computed at the first call and kept while all of them fit into
  /// the memory limit.
  std::shared_ptr<const FullAttention> reference(int layer, const std::vector<int>& measured);

  /// output_norms of that layer, which has `wo`; computed at the first call and kept.
  std::shared_ptr<const std::vector<float>> norms(int layer);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kv
