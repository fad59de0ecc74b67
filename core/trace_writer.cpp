#include "core/trace_writer.hpp"

#include <fcntl.h>
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>

#include <map>
#include <optional>
#include <utility>

#include "core/error.hpp"
#include "core/hdf5.hpp"
#include "core/sha256.hpp"
#include "core/trace_schema.hpp"
#include "core/trace_words.hpp"

namespace kv {
namespace {

constexpr std::uint64_t chunk_bytes = 1 << 20;

/// Whole heads in pieces of at most 4096 tokens for [heads, tokens, dim]; rows of about 1 MiB for a matrix.
h5::Shape chunk_of(const h5::Shape& shape, std::size_t element_size) {
  if (shape.size() == 1) return shape;
  h5::Shape chunk(shape.size(), 1);
  chunk.back() = shape.back();
  const std::uint64_t rows = shape[shape.size() - 2];
  const std::uint64_t fitting = std::max<std::uint64_t>(1, chunk_bytes / (shape.back() * element_size));
  chunk[shape.size() - 2] = std::min<std::uint64_t>(rows, shape.size() == 2 ? fitting : 4096);
  return chunk;
}

std::string now_utc() {
  return fmt::format("{:%Y-%m-%dT%H:%M:%S+00:00}", fmt::gmtime(std::chrono::system_clock::now()));
}

void write_model(h5::Group group, const ModelInfo& model) {
  group.set_integer("layers", model.layers);
  group.set_integer("query_heads", model.query_heads);
  group.set_integer("kv_heads", model.kv_heads);
  group.set_integer("head_dim", model.head_dim);
  group.set_integer("value_dim", model.value_dim);
  group.set_integer("hidden_size", model.hidden_size);
  group.set_number("scale", model.scale);
  group.set_number("softcap", model.softcap);
  group.set_text("rope_type", model.rope_type);
  group.set_text("rope_style", model.rope_style == RopeStyle::half ? "half" : "interleaved");
  group.set_number("attention_scaling", model.attention_scaling);
  if (!model.inv_freq.empty()) group.create("inv_freq", std::span(model.inv_freq), {model.inv_freq.size()});
}

void write_tokens(h5::Group group, const TraceHeader& header) {
  const h5::Shape all{static_cast<std::uint64_t>(header.tokens)};
  if (!header.token_id.empty()) group.create("id", std::span(header.token_id), all);
  group.create("position", std::span(header.position), all);
  if (!header.segment.empty()) group.create("segment", std::span(header.segment), all).set_text("names", segment_names);
  if (!header.logprob.empty()) group.create("logprob", std::span(header.logprob), all);
}

void write_root(h5::File& file, const TraceHeader& header) {
  file.set_text("kvtrace_version", "1.0.0");
  file.set_flag("complete", false);
  file.set_text("created_utc", header.created_utc.empty() ? now_utc() : header.created_utc);
  file.set_text("producer", header.producer.empty() ? "kvreplay" : header.producer);
  file.set_text("framework", header.framework);
  file.set_text("model_id", header.model_id);
  file.set_text("dataset", header.dataset);
  file.set_text("license", header.license);
  file.set_integer("tokens", header.tokens);
  file.set_integer("prompt_tokens", header.prompt_tokens);
}

/// Forces what was written to the disk, so that a rename cannot outlive its content in a power cut.
void sync(const std::filesystem::path& path) {
  const int descriptor = open(path.c_str(), O_RDONLY);
  const bool synced = descriptor >= 0 && fsync(descriptor) == 0;
  const int error = errno;
  if (descriptor >= 0) close(descriptor);
  if (!synced) throw TraceError(fmt::format("{}: cannot be written out: {}", path.string(), std::strerror(error)));
}

}  // namespace

struct TraceWriter::Impl {
  std::filesystem::path final_path, part_path;
  TraceHeader header;
  std::optional<h5::File> file;
  Sha256 hash;
  int last_layer = -1;
  bool layer_failed = false;

  Impl() = default;
  ~Impl() {  // not TraceWriter's, which does not run when its constructor throws
    if (!file) return;
    file.reset();
    std::error_code ignored;
    std::filesystem::remove(part_path, ignored);
  }
  void write_tensor(h5::Group& group, const LayerDataset& tensor, const std::vector<float>& values);
};

TraceWriter::TraceWriter(const std::filesystem::path& file, const TraceHeader& header)
    : impl_(std::make_unique<Impl>()) {
  impl_->final_path = file;
  impl_->part_path = file.string() + ".part";
  impl_->header = header;
  impl_->header.file = file;
  if (impl_->header.position.empty()) {
    const int tokens = std::max(0, header.tokens);
    for (int i = 0; i < tokens; ++i) impl_->header.position.push_back(i);
  }
  check_constants(impl_->header);
  check_tokens(impl_->header);
  impl_->file = h5::File::create(impl_->part_path);
  write_root(*impl_->file, impl_->header);
  write_model(impl_->file->create_group("model"), impl_->header.model);
  write_tokens(impl_->file->create_group("tokens"), impl_->header);
  impl_->file->create_group("layers");
}

TraceWriter::~TraceWriter() = default;

void TraceWriter::Impl::write_tensor(h5::Group& group, const LayerDataset& tensor, const std::vector<float>& values) {
  std::uint64_t expected = 1;
  for (const std::uint64_t extent : tensor.shape) expected *= extent;
  const std::string where = fmt::format("{}: {}/{}", final_path.string(), group.path(), tensor.name);
  if (values.size() != expected)
    throw TraceError(fmt::format("{}: {} values given, shape {} needs {}", where, values.size(),
                                 h5::shape_text(tensor.shape), expected));
  const std::vector<std::byte> words = narrow(tensor.dtype, values);
  if (const auto bad = first_not_finite(tensor.dtype, words))
    throw TraceError(
        fmt::format("{}: value {} (number {}) is not finite in {}", where, values[*bad], *bad, name_of(tensor.dtype)));
  const h5::Shape chunk = chunk_of(tensor.shape, size_of(tensor.dtype));
  group.create(tensor.name, stored_type(tensor.dtype), tensor.shape, chunk).write_bytes(words);
  if (tensor.hashed) hash.update(words);
}

void TraceWriter::write_layer(const LayerInfo& given, const LayerTensors& tensors) {
  KV_CHECK(impl_->file);
  const TraceHeader& header = impl_->header;
  LayerInfo info = given;
  info.path = fmt::format("/layers/{:03}", info.index);
  info.has_o = !tensors.o.empty();
  info.has_wo = !tensors.wo.empty();
  info.has_sink_logit = !tensors.sink_logit.empty();
  info.has_e = !tensors.e.empty();
  info.e_dtype = header.dtype == Dtype::bfloat16 ? Dtype::bfloat16 : Dtype::float32;
  info.has_g = info.has_attention = false;
  check_layer(header, info);
  if (info.index <= impl_->last_layer)
    throw TraceError(fmt::format("{}: {}: comes after layer {}, layers must ascend", impl_->final_path.string(),
                                 info.path, impl_->last_layer));
  const bool failed_before = std::exchange(impl_->layer_failed, true);  // until this one is whole
  h5::Group group = impl_->file->group("layers").create_group(fmt::format("{:03}", info.index));
  group.set_integer("layer", info.index);
  group.set_integer("window", info.window);
  group.set_text("rope", info.rope_post ? "post" : "pre");
  group.set_text("rope_recipe", info.recipe == RopeRecipe::model ? "model" : "fp32");
  const std::map<std::string, const std::vector<float>*> values{
      {"q", &tensors.q}, {"k", &tensors.k},   {"v", &tensors.v},
      {"o", &tensors.o}, {"wo", &tensors.wo}, {"sink_logit", &tensors.sink_logit},
      {"e", &tensors.e},
  };
  for (const LayerDataset& tensor : layer_datasets(header, info))
    if (tensor.present) impl_->write_tensor(group, tensor, *values.at(tensor.name));
  if (!info.q_index.empty()) group.create("q_index", std::span<const int>(info.q_index), {info.q_index.size()});
  impl_->last_layer = info.index;
  impl_->layer_failed = failed_before;
}

void TraceWriter::close() {
  KV_CHECK(impl_->file);
  const std::string name = impl_->final_path.string();
  if (impl_->last_layer < 0) throw TraceError(fmt::format("{}: /layers: holds no layer", name));
  if (impl_->layer_failed) throw TraceError(fmt::format("{}: /layers: a layer was not written completely", name));
  impl_->file->set_text("content_sha256", impl_->hash.hex());
  impl_->file->set_flag("complete", true);
  impl_->file->close();
  sync(impl_->part_path);
  std::error_code error;
  std::filesystem::rename(impl_->part_path, impl_->final_path, error);
  if (error) throw TraceError(fmt::format("{}: cannot be renamed from its .part: {}", name, error.message()));
  impl_->file.reset();
}

}  // namespace kv
