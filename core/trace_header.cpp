// Reads and checks everything of a trace but the values of its tensors.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>

#include "core/error.hpp"
#include "core/trace_schema.hpp"

namespace kv {
namespace {

int narrow_to_int(const h5::Object& object, const char* name, std::int64_t value) {
  if (value < std::numeric_limits<int>::min() || value > std::numeric_limits<int>::max())
    object.fail(fmt::format("{} = {} is out of any range", name, value));
  return static_cast<int>(value);
}

int read_int(const h5::Object& object, const char* name) { return narrow_to_int(object, name, object.integer(name)); }

/// Index of the text attribute's value among `choices`.
std::size_t read_choice(const h5::Object& object, const char* name, const std::vector<std::string>& choices) {
  const std::string value = object.text(name, choices.front());
  const auto found = std::find(choices.begin(), choices.end(), value);
  if (found == choices.end())
    object.fail(fmt::format("{} = {}, expected '{}'{}", name, h5::quoted(value), fmt::join(choices, "' or '"),
                            did_you_mean(value, choices)));
  return static_cast<std::size_t>(found - choices.begin());
}

void check_shape(const h5::Dataset& dataset, const h5::Shape& expected) {
  if (dataset.shape() != expected)
    dataset.fail(fmt::format("shape {} expected, found {}", h5::shape_text(expected), h5::shape_text(dataset.shape())));
}

/// A 1-D array of at most `most` values (of exactly as many where `least` says so too).
template <class T>
std::vector<T> read_array(const h5::Group& group, const char* name, std::uint64_t least, std::uint64_t most) {
  const h5::Dataset dataset = group.dataset(name);
  if (dataset.shape().size() != 1) dataset.fail(fmt::format("has {} axes, one expected", dataset.shape().size()));
  const std::uint64_t found = dataset.shape()[0];
  if (found < least || found > most)
    dataset.fail(least == most ? fmt::format("shape [{}] expected, found [{}]", most, found)
                               : fmt::format("has {} values, {} to {} expected", found, least, most));
  return dataset.read<T>();
}

Dtype dtype_of(const h5::Dataset& dataset, std::initializer_list<Dtype> allowed) {
  for (const Dtype dtype : allowed)
    if (stored_type(dtype) == dataset.type()) return dtype;
  std::vector<std::string> names;
  for (const Dtype dtype : allowed) names.emplace_back(name_of(dtype));
  dataset.fail(fmt::format("is {}, little-endian {} expected", dataset.type_text(), fmt::join(names, " or ")));
}

void read_root(const h5::File& file, TraceHeader& header) {
  header.version = file.text("kvtrace_version");
  if (header.version.substr(0, header.version.find('.')) != "1")
    file.fail(fmt::format("kvtrace_version = {}, this program reads version 1", h5::quoted(header.version)));
  if (file.integer("complete") != 1) file.fail("complete is not 1: the recording was not finished");
  header.tokens = read_int(file, "tokens");
  header.prompt_tokens = read_int(file, "prompt_tokens");
  header.content_sha256 = file.text("content_sha256", "");
  header.created_utc = file.text("created_utc", "");
  header.producer = file.text("producer", "");
  header.framework = file.text("framework", "");
  header.model_id = file.text("model_id", "");
  header.dataset = file.text("dataset", "");
  header.license = file.text("license", "");
}

void read_model(const h5::Group& group, ModelInfo& model) {
  model.layers = read_int(group, "layers");
  model.query_heads = read_int(group, "query_heads");
  model.kv_heads = read_int(group, "kv_heads");
  model.head_dim = read_int(group, "head_dim");
  model.value_dim = read_int(group, "value_dim");
  model.hidden_size = read_int(group, "hidden_size");
  model.scale = group.number("scale");
  model.softcap = group.number("softcap", 0);
  model.attention_scaling = group.number("attention_scaling", 1);
  model.rope_type = group.text("rope_type");
  model.rope_style =
      read_choice(group, "rope_style", {"half", "interleaved"}) == 0 ? RopeStyle::half : RopeStyle::interleaved;
  if (model.rope_type == "none") return;  // inv_freq would not be used
  const auto half = static_cast<std::uint64_t>(std::max(model.head_dim, 2)) / 2;
  model.inv_freq = read_array<float>(group, "inv_freq", 1, half);
}

void read_tokens(const h5::File& file, TraceHeader& header) {
  const auto count = static_cast<std::uint64_t>(header.tokens);
  header.position.clear();
  if (file.has("tokens")) {
    const h5::Group group = file.group("tokens");
    if (group.has("id")) header.token_id = read_array<std::int32_t>(group, "id", count, count);
    if (group.has("position")) header.position = read_array<std::int32_t>(group, "position", count, count);
    if (group.has("segment")) header.segment = read_array<std::uint8_t>(group, "segment", count, count);
    if (group.has("logprob")) header.logprob = read_array<float>(group, "logprob", count, count);
  }
  if (!header.position.empty()) return;
  header.position.resize(count);  // bounded by max_tokens: 512 MiB
  std::iota(header.position.begin(), header.position.end(), 0);
}

LayerInfo read_layer_info(const h5::Group& group, const TraceHeader& header) {
  LayerInfo info;
  info.path = group.path();
  info.index = read_int(group, "layer");
  info.window = narrow_to_int(group, "window", group.integer("window", 0));
  info.rope_post = read_choice(group, "rope", {"pre", "post"}) == 1;
  info.recipe = read_choice(group, "rope_recipe", {"model", "fp32"}) == 0 ? RopeRecipe::model : RopeRecipe::fp32;
  if (group.has("q_index")) {
    info.q_index = read_array<std::int32_t>(group, "q_index", 1, static_cast<std::uint64_t>(header.tokens));
    check_layer(header, info);
    if (info.q_index.size() == static_cast<std::size_t>(header.tokens))
      info.q_index.clear();  // then it is 0, 1, 2, ...
  }
  info.has_o = group.has("o");
  info.has_wo = group.has("wo");
  info.has_sink_logit = group.has("sink_logit");
  info.has_attention = group.has("attention");
  if ((info.has_e = group.has("e"))) info.e_dtype = dtype_of(group.dataset("e"), {Dtype::bfloat16, Dtype::float32});
  if ((info.has_g = group.has("g"))) {
    const h5::Dataset g = group.dataset("g");
    info.g_dtype = dtype_of(g, {Dtype::float16, Dtype::bfloat16, Dtype::float32});
    if (g.shape().size() != 4) g.fail(fmt::format("has {} axes, 4 expected", g.shape().size()));
    info.g_samples = narrow_to_int(g, "number of samples", static_cast<std::int64_t>(g.shape()[0]));
  }
  check_layer(header, info);
  return info;
}

void read_layers(const h5::File& file, TraceHeader& header) {
  const h5::Group layers = file.group("layers");
  const std::vector<std::string> names = layers.names();
  if (names.empty()) layers.fail("holds no layer");
  header.dtype = dtype_of(layers.group(names.front()).dataset("q"), {Dtype::float16, Dtype::bfloat16, Dtype::float32});
  for (const std::string& name : names) {
    const h5::Group group = layers.group(name);
    const LayerInfo info = read_layer_info(group, header);
    for (const LayerDataset& expected : layer_datasets(header, info)) {
      if (!expected.present) continue;
      const h5::Dataset dataset = group.dataset(expected.name);
      dtype_of(dataset, {expected.dtype});
      check_shape(dataset, expected.shape);
      dataset.check_stored();
    }
    header.layers.push_back(info);
  }
  std::sort(header.layers.begin(), header.layers.end(), [](const auto& a, const auto& b) { return a.index < b.index; });
  for (std::size_t i = 1; i < header.layers.size(); ++i)
    if (header.layers[i].index == header.layers[i - 1].index)
      layers.fail(fmt::format("{} and {} are both layer {}", header.layers[i - 1].path, header.layers[i].path,
                              header.layers[i].index));
}

}  // namespace

TraceHeader read_header(const h5::File& file) {
  TraceHeader header;
  header.file = file.file();
  read_root(file, header);
  read_model(file.group("model"), header.model);
  check_constants(header);
  read_tokens(file, header);
  check_tokens(header);
  read_layers(file, header);
  return header;
}

}  // namespace kv
