#include "core/trace.hpp"

#include <fmt/format.h>

#include <map>

#include "core/child.hpp"
#include "core/error.hpp"
#include "core/hdf5.hpp"
#include "core/sha256.hpp"
#include "core/trace_schema.hpp"
#include "core/trace_words.hpp"

namespace kv {
namespace {

/// "1, 17, 3": the element's place along each axis.
std::string place(const h5::Shape& shape, std::uint64_t element) {
  std::string text;
  for (std::size_t axis = shape.size(); axis-- > 0; element /= shape[axis])
    text = fmt::format("{}{}{}", element % shape[axis], text.empty() ? "" : ", ", text);
  return text;
}

void check_finite(const h5::Dataset& dataset, Dtype dtype, std::uint64_t first, std::span<const std::byte> words) {
  const std::optional<std::uint64_t> bad = first_not_finite(dtype, words);
  if (!bad) return;
  float value = 0;
  widen(dtype, words.subspan(*bad * size_of(dtype), size_of(dtype)), &value);
  throw TraceError(fmt::format("{}: {}[{}]: {} is not finite", dataset.file(), dataset.path(),
                               place(dataset.shape(), first + *bad), value));
}

/// Walks the whole file in a child, for HDF5 1.10 crashes on some damaged files. Returns the hash of its content.
std::string check_in_child(const std::filesystem::path& path) {
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  const double seconds = 60 + (error ? 0 : static_cast<double>(size) / 20e6);
  const auto walk = [&path] {
    const h5::File file = h5::File::open(path);
    return check_content(file, read_header(file));
  };
  const ChildOutcome outcome = run_in_child(walk, std::chrono::milliseconds(static_cast<long long>(1000 * seconds)));
  switch (outcome.kind) {
    case ChildOutcome::returned:
      return outcome.text;
    case ChildOutcome::threw:
      throw TraceError(outcome.text);
    case ChildOutcome::died:
      break;
  }
  throw TraceError(fmt::format("{}: HDF5 {} while walking the file: it is damaged", path.string(), outcome.text));
}

}  // namespace

std::string check_content(const h5::File& file, const TraceHeader& header) {
  Sha256 hash;
  for (const LayerInfo& info : header.layers) {
    const h5::Group group = file.group(info.path);
    for (const LayerDataset& expected : layer_datasets(header, info)) {
      if (!expected.present) continue;
      const h5::Dataset dataset = group.dataset(expected.name);
      dataset.stream([&](std::uint64_t first, std::span<const std::byte> words) {
        check_finite(dataset, expected.dtype, first, words);
        if (expected.hashed) hash.update(words);
      });
    }
  }
  const std::string found = hash.hex();
  if (!header.content_sha256.empty() && header.content_sha256 != found)
    file.fail(fmt::format("content_sha256 = {}, but the values of q, k and v have {}: they were changed",
                          h5::quoted(header.content_sha256), found));
  return found;
}

struct Trace::Impl {
  h5::File file;
  TraceHeader header;
};

Trace::Trace(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Trace::~Trace() = default;
Trace::Trace(Trace&&) noexcept = default;
Trace& Trace::operator=(Trace&&) noexcept = default;

Trace Trace::open(const std::filesystem::path& file) {
  const std::string hash = check_in_child(file);
  auto impl = std::make_unique<Impl>(Impl{h5::File::open(file), {}});
  impl->header = read_header(impl->file);
  if (!impl->header.content_sha256.empty() && impl->header.content_sha256 != hash)
    impl->file.fail("changed while it was being opened");
  impl->header.content_sha256 = hash;
  return Trace(std::move(impl));
}

const TraceHeader& Trace::header() const { return impl_->header; }

LayerTensors Trace::read_layer(int layer) const {
  const TraceHeader& header = impl_->header;
  KV_CHECK(layer >= 0 && static_cast<std::size_t>(layer) < header.layers.size());
  LayerTensors tensors;
  const std::map<std::string, std::vector<float>*> wanted{
      {"q", &tensors.q}, {"k", &tensors.k},   {"v", &tensors.v},
      {"o", &tensors.o}, {"wo", &tensors.wo}, {"sink_logit", &tensors.sink_logit},
      {"e", &tensors.e},
  };
  for (const LayerDataset& dataset : layer_datasets(header, header.layers[static_cast<std::size_t>(layer)])) {
    const auto target = wanted.find(dataset.name);
    if (!dataset.present || target == wanted.end()) continue;
    std::vector<float>& values = *target->second;
    values.resize(header.bytes(layer, dataset.name) / size_of(dataset.dtype));
    stream(layer, dataset.name, [&](std::uint64_t first, std::span<const std::byte> words) {
      widen(dataset.dtype, words, values.data() + first);
    });
  }
  return tensors;
}

void Trace::stream(int layer, const std::string& name, const WordSink& sink) const {
  KV_CHECK(layer >= 0 && static_cast<std::size_t>(layer) < impl_->header.layers.size());
  const LayerInfo& info = impl_->header.layers[static_cast<std::size_t>(layer)];
  for (const LayerDataset& expected : layer_datasets(impl_->header, info)) {
    if (expected.name != name || !expected.present) continue;
    const h5::Dataset dataset = impl_->file.group(info.path).dataset(name);
    if (dataset.type() != stored_type(expected.dtype) || dataset.shape() != expected.shape)
      dataset.fail("changed since the trace was opened");
    dataset.stream(sink);
  }
}

}  // namespace kv
