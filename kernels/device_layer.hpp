// A layer of a trace in device memory, and its full attention for measured queries.
#pragma once
#include <map>
#include <memory>

#include "core/replay.hpp"
#include "kernels/block_attention.hpp"
#include "kernels/buffer.hpp"
#include "kernels/unit.hpp"
#include "kernels/upload.hpp"

namespace kv {

/// Cosines and sines of one recipe's rotations, [tokens][pairs].
struct DeviceRotations {
  Buffer<float> own_cos, own_sin;    // to the tokens' own positions
  Buffer<float> slot_cos, slot_sin;  // to positions 0, 1, 2, ...
  Dtype step = Dtype::float32;       // what every product and sum is rounded to
};

/// What kernels know of a trace, and what its layers share.
struct DeviceTrace {
  explicit DeviceTrace(const TraceHeader& header);
  TraceData data;
  AttentionShape shape() const;
  const DeviceRotations& rotations(RopeRecipe recipe) const { return rotations_.at(recipe); }
  const float* inv_freq() const { return inv_freq_.data(); }
  std::size_t bytes() const;  // of device memory

 private:
  Buffer<int> position_;
  Buffer<float> inv_freq_;
  std::map<RopeRecipe, DeviceRotations> rotations_;
};

/// Tokens [first, last), one by one.
std::vector<int> tokens_between(int first, int last);

/// Queries of some tokens over all keys of a layer: the tasks of block_attention, and where their results go.
struct FullLook {
  Buffer<int> token, query_row, query_token;
  Buffer<AttentionTask> tasks;  // [kv_heads]
  // [kv_heads][rows][group][value_dim], [kv_heads][rows][group], [kv_heads][tokens][group]; the first and last where asked for
  Buffer<float> output, lse, sums;
  AttentionBounds bounds;
};

/// Queries of which a layer keeps full attention, or its log-sum-exps only.
struct FullRows {
  std::size_t measured = 0, prefilled = 0;
};

/// One layer's tensors and, for each list of measured queries, full attention.
class DeviceLayer {
 public:
  /// Reads the layer and waits until it is there. `norms`: what policies know of W_o, or null. Throws CudaError, TraceError.
  DeviceLayer(const DeviceTrace& trace, const Session& session, int layer, const std::vector<float>* norms,
              Upload& upload);

  /// The layer for kernels, with full attention of the measured tokens' queries and the log-sum-exps of a prefill's: computed at
  /// the first call and kept.
  LayerData seen(const DeviceTrace& trace, const std::vector<int>& measured, Prefill prefill, cudaStream_t stream);

  /// Reads the model's own outputs of these lists of tokens' queries, for add_floor. The layer has `o`.
  void read_outputs(const Session& session, int layer, const std::vector<std::vector<int>>& lists);

  /// Full attention of floor.measured against what read_outputs read: the error fields of layer `layer`. Throws CudaError.
  void add_floor(const DeviceTrace& trace, int layer, ReplayResult& floor, cudaStream_t stream);

  /// `outputs`: with outputs beside log-sum-exps; `sums`: with room for column sums.
  FullLook full_look(const DeviceTrace& trace, const std::vector<int>& tokens, bool outputs, bool sums) const;

  const float* wo() const { return wo_; }  // [hidden][query_heads * value_dim]

  /// Bytes of device memory that a layer takes, full attention of so many rows included.
  static std::size_t bytes(const TraceHeader& header, int layer, Dtype elements, const FullRows& rows);

 private:
  template <class T>
  const T* keep(const std::vector<T>& host);
  char* keep(std::size_t bytes);

  struct FullAttention {
    Buffer<float> output, lse;
  };
  std::vector<Buffer<char>> kept_;
  Buffer<TileMaps> maps_;
  const float* wo_ = nullptr;
  std::map<std::vector<int>, FullAttention> full_;
  std::map<Prefill, Buffer<float>> prefill_lse_;
  std::map<std::vector<int>, std::vector<float>> outputs_;  // recorded: [kv_heads][rows][group][value_dim]
  LayerData data_;
  std::vector<int> row_of_token_;
};

}  // namespace kv
