// A layer of a trace in device memory, and its full attention for measured queries.
#pragma once
#include <map>
#include <memory>

#include "core/session.hpp"
#include "kernels/block_attention.hpp"
#include "kernels/buffer.hpp"
#include "kernels/unit.hpp"

namespace kv {

/// What kernels know of a trace. `position` is the only array.
struct DeviceTrace {
  explicit DeviceTrace(const TraceHeader& header);
  TraceData data;
  AttentionShape shape() const;

 private:
  Buffer<int> position_;
};

/// Queries of some tokens over all keys of a layer: the tasks of block_attention, and where their results go.
struct FullLook {
  Buffer<int> token, query_row, query_token;
  Buffer<AttentionTask> tasks;  // [kv_heads]
  Buffer<float> output, lse,
      sums;  // [kv_heads][rows][group][value_dim], [kv_heads][rows][group], [kv_heads][tokens][group]
  AttentionBounds bounds;
};

/// One layer's tensors and, for each list of measured queries, full attention.
class DeviceLayer {
 public:
  /// `with_norms`: also what policies know of W_o. Throws CudaError.
  DeviceLayer(const DeviceTrace& trace, Session& session, int layer, bool with_norms);

  /// The layer for kernels, with full attention of these tokens' queries: computed at the first call and kept.
  LayerData measured(const DeviceTrace& trace, const std::vector<int>& tokens, cudaStream_t stream);

  /// `sums`: with room for column sums.
  FullLook full_look(const DeviceTrace& trace, const std::vector<int>& tokens, bool sums) const;

  const float* wo() const { return wo_.size() > 0 ? wo_.data() : nullptr; }  // [hidden][query_heads * value_dim]

  /// Bytes of device memory that a layer takes, full attention of `measured` queries included.
  static std::size_t bytes(const TraceHeader& header, int layer, Dtype elements, std::size_t measured);

 private:
  template <class T>
  const T* keep(const std::vector<T>& host);
  const void* keep_elements(const std::vector<float>& host, Dtype elements);

  struct FullAttention {
    Buffer<float> output, lse;
  };
  std::vector<Buffer<char>> kept_;
  Buffer<float> wo_;
  std::map<std::vector<int>, FullAttention> full_;
  LayerData data_;
  std::vector<int> row_of_token_;
};

}  // namespace kv
