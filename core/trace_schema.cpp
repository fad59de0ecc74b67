#include "core/trace_schema.hpp"

#include <fmt/format.h>

#include <cmath>
#include <limits>

#include "core/error.hpp"

namespace kv {
namespace {

// Far beyond any model, near enough that a product of them fits 64 bits and a product of two dimensions an int.
constexpr int max_tokens = 1 << 27, max_layers = 1 << 14, max_heads = 1 << 14, max_dim = 1 << 14, max_hidden = 1 << 20;
constexpr int max_samples = 1 << 12;

[[noreturn]] void fail(const TraceHeader& header, const std::string& object, const std::string& problem) {
  throw TraceError(fmt::format("{}: {}: {}", header.file.string(), object, problem));
}

void check_range(const TraceHeader& header, const std::string& object, const char* name, int value, int low, int high) {
  if (value < low || value > high)
    fail(header, object, fmt::format("{} = {} is outside {} to {}", name, value, low, high));
}

void check_positive(const TraceHeader& header, const char* name, double value) {
  if (!(value > 0 && std::isfinite(value)))
    fail(header, "/model", fmt::format("{} = {} is not a positive number", name, value));
}

void check_finite(const TraceHeader& header, const std::string& object, const std::vector<float>& values) {
  for (std::size_t i = 0; i < values.size(); ++i)
    if (!std::isfinite(values[i]))
      fail(header, fmt::format("{}[{}]", object, i), fmt::format("{} is not finite", values[i]));
}

/// Every value at least 0 and above the one before.
void check_increasing(const TraceHeader& header, const std::string& object, const std::vector<std::int32_t>& values) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] < 0) fail(header, fmt::format("{}[{}]", object, i), fmt::format("{} is negative", values[i]));
    if (i > 0 && values[i] <= values[i - 1])
      fail(header, fmt::format("{}[{}]", object, i),
           fmt::format("{} does not increase over {}", values[i], values[i - 1]));
  }
}

template <class T>
void check_length(const TraceHeader& header, const std::string& object, const std::vector<T>& values, bool required) {
  if ((required || !values.empty()) && values.size() != static_cast<std::size_t>(header.tokens))
    fail(header, object, fmt::format("has {} values for {} tokens", values.size(), header.tokens));
}

}  // namespace

std::vector<LayerDataset> layer_datasets(const TraceHeader& header, const LayerInfo& info) {
  const auto count = [](int n) { return static_cast<std::uint64_t>(n); };
  const ModelInfo& model = header.model;
  const std::uint64_t query_heads = count(model.query_heads), kv_heads = count(model.kv_heads);
  const std::uint64_t dim = count(model.head_dim), value_dim = count(model.value_dim), tokens = count(header.tokens);
  const std::uint64_t rows = info.q_index.empty() ? tokens : info.q_index.size();
  const Dtype dt = header.dtype;
  return {
      {"q", {query_heads, rows, dim}, dt, true, true},
      {"k", {kv_heads, tokens, dim}, dt, true, true},
      {"v", {kv_heads, tokens, value_dim}, dt, true, true},
      {"o", {query_heads, rows, value_dim}, dt, info.has_o, false},
      {"wo", {count(model.hidden_size), query_heads * value_dim}, dt, info.has_wo, false},
      {"sink_logit", {query_heads}, Dtype::float32, info.has_sink_logit, false},
      {"e", {query_heads, rows, value_dim}, info.e_dtype, info.has_e, false},
      {"g", {count(info.g_samples), query_heads, rows, value_dim}, info.g_dtype, info.has_g, false},
      {"attention", {query_heads, rows, tokens}, Dtype::float16, info.has_attention, false},
  };
}

h5::Type stored_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::float16:
      return h5::Type::float16;
    case Dtype::bfloat16:
      return h5::Type::bfloat16;
    case Dtype::float32:
      break;
  }
  return h5::Type::float32;
}

void check_constants(const TraceHeader& header) {
  const ModelInfo& model = header.model;
  check_range(header, "/", "tokens", header.tokens, 1, max_tokens);
  check_range(header, "/", "prompt_tokens", header.prompt_tokens, 0, header.tokens);
  check_range(header, "/model", "layers", model.layers, 1, max_layers);
  check_range(header, "/model", "query_heads", model.query_heads, 1, max_heads);
  check_range(header, "/model", "kv_heads", model.kv_heads, 1, max_heads);
  if (model.query_heads % model.kv_heads != 0)
    fail(header, "/model",
         fmt::format("query_heads = {} is not a multiple of kv_heads = {}", model.query_heads, model.kv_heads));
  check_range(header, "/model", "head_dim", model.head_dim, 1, max_dim);
  check_range(header, "/model", "value_dim", model.value_dim, 1, max_dim);
  check_range(header, "/model", "hidden_size", model.hidden_size, 0, max_hidden);
  check_positive(header, "scale", model.scale);
  check_positive(header, "attention_scaling", model.attention_scaling);
  if (!(model.softcap >= 0 && std::isfinite(model.softcap)))
    fail(header, "/model", fmt::format("softcap = {} is not a number from 0 on", model.softcap));
  if (model.rope_type.empty()) fail(header, "/model", "rope_type is empty ('none' means no rotation)");
  if (model.rope_type == "none") {
    if (!model.inv_freq.empty()) fail(header, "/model/inv_freq", "is given although rope_type is 'none'");
    return;
  }
  if (model.inv_freq.empty())
    fail(header, "/model/inv_freq", fmt::format("is empty although rope_type is {}", h5::quoted(model.rope_type)));
  if (2 * model.inv_freq.size() > static_cast<std::size_t>(model.head_dim))
    fail(header, "/model/inv_freq",
         fmt::format("has {} values, more than half of head_dim = {}", model.inv_freq.size(), model.head_dim));
  check_finite(header, "/model/inv_freq", model.inv_freq);
}

void check_tokens(const TraceHeader& header) {
  check_length(header, "/tokens/position", header.position, true);
  check_length(header, "/tokens/id", header.token_id, false);
  check_length(header, "/tokens/segment", header.segment, false);
  check_length(header, "/tokens/logprob", header.logprob, false);
  check_increasing(header, "/tokens/position", header.position);
  check_finite(header, "/tokens/logprob", header.logprob);
}

void check_layer(const TraceHeader& header, const LayerInfo& info) {
  check_range(header, info.path, "layer", info.index, 0, header.model.layers - 1);
  check_range(header, info.path, "window", info.window, 0, std::numeric_limits<int>::max());
  if (info.has_wo && header.model.hidden_size == 0) fail(header, info.path + "/wo", "needs a hidden_size above 0");
  if (info.has_g) check_range(header, info.path + "/g", "number of samples", info.g_samples, 1, max_samples);
  check_increasing(header, info.path + "/q_index", info.q_index);
  if (!info.q_index.empty() && info.q_index.back() >= header.tokens)
    fail(header, fmt::format("{}/q_index[{}]", info.path, info.q_index.size() - 1),
         fmt::format("{} is not below tokens = {}", info.q_index.back(), header.tokens));
}

std::size_t TraceHeader::bytes(int layer, const std::string& name) const {
  KV_CHECK(layer >= 0 && static_cast<std::size_t>(layer) < layers.size());
  for (const LayerDataset& known : layer_datasets(*this, layers[static_cast<std::size_t>(layer)])) {
    if (known.name != name || !known.present) continue;
    std::size_t bytes = size_of(known.dtype);
    for (const std::uint64_t extent : known.shape) bytes *= extent;
    return bytes;
  }
  return 0;
}

}  // namespace kv
