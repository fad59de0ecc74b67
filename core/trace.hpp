// The trace `kvtrace/1`: what one forward pass of a model recorded. Reading and checking; writing is trace_writer.hpp.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.hpp"

namespace kv {

enum class RopeStyle { half, interleaved };  // pairs (i, i + rope_dim/2) or (2i, 2i + 1)
enum class RopeRecipe { model, fp32 };       // every step rounded to the trace dtype, as model code does, or none

/// Shapes and constants that all layers share (`/model`).
struct ModelInfo {
  int layers = 0;  // of the model, not of the trace
  int query_heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0, hidden_size = 0;
  double scale = 0;                // softmax logit = scale * q.k
  double softcap = 0;              // logit -> softcap * tanh(logit / softcap); 0 = none
  std::string rope_type = "none";  // "none": stored queries and keys need no rotation
  RopeStyle rope_style = RopeStyle::half;
  double attention_scaling = 1;  // factor on cos and sin (YaRN)
  std::vector<float> inv_freq;   // [rope_dim / 2], empty for "none"; rope_dim <= head_dim (partial rotary)
  int group() const { return query_heads / kv_heads; }
};

/// What one recorded layer is and holds (`/layers/NNN`).
struct LayerInfo {
  int index = 0;           // in the model
  std::string path;        // "/layers/009"
  int window = 0;          // sliding window: token j is visible to token i when i - j < window; 0 = full attention
  bool rope_post = false;  // q and k are stored rotated: their unrotated form is unknown
  RopeRecipe recipe = RopeRecipe::model;
  std::vector<int> q_index;  // token of each stored query row, ascending; empty = every token has one
  bool has_o = false, has_wo = false, has_sink_logit = false, has_e = false, has_g = false, has_attention = false;
  Dtype e_dtype = Dtype::float32, g_dtype = Dtype::float32;
  int g_samples = 0;  // labels sampled for g
};

/// Everything but the tensors. Small enough to keep for the life of a sweep.
struct TraceHeader {
  std::filesystem::path file;
  std::string version, content_sha256, created_utc, producer, framework, model_id, dataset, license;
  int tokens = 0, prompt_tokens = 0;
  Dtype dtype = Dtype::float32;  // of q, k and v
  ModelInfo model;
  std::vector<LayerInfo> layers;                 // ascending by index
  std::vector<std::int32_t> token_id, position;  // [tokens]; position strictly increases. token_id may be empty
  std::vector<std::uint8_t> segment;             // [tokens]; may be empty
  std::vector<float> logprob;                    // [tokens]; may be empty

  /// Bytes of one dataset as stored values (before HDF5's compression), e.g. "k" of layers[layer]; 0 when absent.
  std::size_t bytes(int layer, const std::string& name) const;
};

/// The tensors of one layer widened to float32, row-major; the innermost axis is the head dimension.
struct LayerTensors {
  std::vector<float> q;           // [query_heads][rows][head_dim], rows = q_index.size() or tokens
  std::vector<float> k;           // [kv_heads][tokens][head_dim]
  std::vector<float> v;           // [kv_heads][tokens][value_dim]
  std::vector<float> o;           // [query_heads][rows][value_dim], empty when not recorded
  std::vector<float> wo;          // [hidden_size][query_heads * value_dim], empty when not recorded
  std::vector<float> sink_logit;  // [query_heads], empty when not recorded
  std::vector<float> e;           // [query_heads][rows][value_dim], gradient of the loss by o; empty when not recorded
};

/// Takes words of a dataset as they are stored.
using WordSink = std::function<void(std::uint64_t first, std::span<const std::byte> words)>;

/// A validated trace file, open for reading. Layers are read one at a time.
class Trace {
 public:
  /// Opens `file` read-only and checks all of design section 3: version, `complete`, shapes against the header,
  /// monotone positions, finite values. A forked child with a time limit walks the file first, since HDF5 itself can
  /// crash on corrupt files. Throws TraceError naming file, dataset and first bad index.
  static Trace open(const std::filesystem::path& file);

  ~Trace();
  Trace(Trace&&) noexcept;
  Trace& operator=(Trace&&) noexcept;

  const TraceHeader& header() const;

  /// Reads and widens layer `layer` (index into header().layers). Throws TraceError when the file fails underneath.
  LayerTensors read_layer(int layer) const;

  /// Reads one dataset of a layer, such as "k", as it is stored: `sink(index of the first word, words)` for pieces in
  /// row-major order; nothing when it was not recorded. Any thread may, several at once. Throws as read_layer does.
  void stream(int layer, const std::string& name, const WordSink& sink) const;

 private:
  struct Impl;
  explicit Trace(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kv
