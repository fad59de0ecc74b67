// Small traces for tests: made in memory, written by TraceWriter or by hand.
#pragma once
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "core/hdf5.hpp"
#include "core/rounding.hpp"
#include "core/trace.hpp"
#include "core/trace_writer.hpp"

#ifndef KV_TEST_DATA
#define KV_TEST_DATA "tests/data"
#endif

namespace kv::test {

/// A folder that goes with the test.
class TempDir {
 public:
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "kvreplay-trace-XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline void write_file(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

struct SampleTrace {
  TraceHeader header;
  std::vector<LayerInfo> infos;
  std::vector<LayerTensors> tensors;
};

/// Values that `dtype` stores exactly.
inline std::vector<float> random_values(std::mt19937& random, Dtype dtype, std::size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = round_to(dtype, normal(random));
  return values;
}

/// q, k, v (and with `everything` all optional tensors) in the shapes of header and info.
inline LayerTensors random_tensors(const TraceHeader& header, const LayerInfo& info, bool everything) {
  std::mt19937 random(static_cast<unsigned>(info.index) + 1);
  const ModelInfo& m = header.model;
  const auto make = [&](Dtype dtype, int a, int b, int c) {
    return random_values(random, dtype,
                         static_cast<std::size_t>(a) * static_cast<std::size_t>(b) * static_cast<std::size_t>(c));
  };
  const int rows = info.q_index.empty() ? header.tokens : static_cast<int>(info.q_index.size());
  LayerTensors t;
  t.q = make(header.dtype, m.query_heads, rows, m.head_dim);
  t.k = make(header.dtype, m.kv_heads, header.tokens, m.head_dim);
  t.v = make(header.dtype, m.kv_heads, header.tokens, m.value_dim);
  if (!everything) return t;
  t.o = make(header.dtype, m.query_heads, rows, m.value_dim);
  t.wo = make(header.dtype, m.hidden_size, m.query_heads, m.value_dim);
  t.sink_logit = make(Dtype::float32, m.query_heads, 1, 1);
  t.e = make(header.dtype == Dtype::bfloat16 ? Dtype::bfloat16 : Dtype::float32, m.query_heads, rows, m.value_dim);
  return t;
}

/// 6 tokens, 4 query heads on 2 KV heads, dims 6 and 3, layers 2 (plain) and 5 (all options).
inline SampleTrace sample(Dtype dtype = Dtype::bfloat16) {
  SampleTrace s;
  TraceHeader& h = s.header;
  h.created_utc = "2026-01-01T00:00:00+00:00", h.producer = "test", h.framework = "none";
  h.model_id = "tiny", h.dataset = "noise", h.license = "CC0";
  h.tokens = 6, h.prompt_tokens = 4, h.dtype = dtype;
  h.model.layers = 8, h.model.query_heads = 4, h.model.kv_heads = 2, h.model.head_dim = 6, h.model.value_dim = 3;
  h.model.hidden_size = 5, h.model.scale = 0.25, h.model.softcap = 30, h.model.attention_scaling = 1.5;
  h.model.rope_type = "yarn", h.model.rope_style = RopeStyle::interleaved, h.model.inv_freq = {1.0f, 0.01f};
  h.token_id = {7, 8, 9, 10, 11, 12}, h.position = {0, 1, 2, 5, 6, 9};
  h.segment = {0, 1, 1, 2, 3, 3}, h.logprob = {0, -1, -2.5f, -0.25f, -3, -4};
  LayerInfo plain, full;
  plain.index = 2;
  full.index = 5, full.window = 4, full.rope_post = true, full.recipe = RopeRecipe::fp32, full.q_index = {1, 3, 5};
  s.infos = {plain, full};
  s.tensors = {random_tensors(h, plain, false), random_tensors(h, full, true)};
  return s;
}

inline void write(const std::filesystem::path& path, const SampleTrace& s) {
  TraceWriter writer(path, s.header);
  for (std::size_t i = 0; i < s.infos.size(); ++i) writer.write_layer(s.infos[i], s.tensors[i]);
  writer.close();
}

/// The least that a trace needs, in HDF5's oldest format without checksums, which other programs may write.
inline void write_plain(const std::filesystem::path& path) {
  h5::File file = h5::File::create(path, false);
  file.set_text("kvtrace_version", "1.7.3");
  file.set_flag("complete", true);
  file.set_integer("tokens", 5);
  file.set_integer("prompt_tokens", 0);
  h5::Group model = file.create_group("model");
  for (const char* name : {"layers", "query_heads", "kv_heads"}) model.set_integer(name, 2);
  for (const char* name : {"head_dim", "value_dim", "hidden_size"}) model.set_integer(name, 4);
  model.set_integer("scale", 1);
  model.set_text("rope_type", "none");
  h5::Group layer = file.create_group("layers").create_group("000");
  layer.set_integer("layer", 1);
  std::vector<float> values(40);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  layer.create("q", h5::Type::float32, {2, 5, 4}).write(std::span<const float>(values));
  layer.create("k", std::span<const float>(values), {2, 5, 4}, {1, 3, 4});
  layer.create("v", std::span<const float>(values), {2, 5, 4}, {2, 2, 2});
}

}  // namespace kv::test
