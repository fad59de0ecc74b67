#include "experiments/trace_identity.hpp"

#include <fmt/core.h>

#include <span>
#include <string_view>

#include "core/hdf5.hpp"
#include "core/sha256.hpp"

namespace kv {
namespace {

/// Hashes named values; names and lengths keep neighbours apart.
class Digest {
 public:
  template <class T>
  void value(std::string_view name, const T& x) {
    const std::string line = fmt::format("{}={}\n", name, x);  // numbers as the shortest text of the same bits
    hash_.update(std::as_bytes(std::span(line)));
  }
  template <class T>
  void array(std::string_view name, const std::vector<T>& values) {
    value(name, values.size());
    hash_.update(std::as_bytes(std::span(values)));
  }
  void tensor(const h5::Dataset& dataset) {
    value(dataset.path(), dataset.elements());
    dataset.stream([this](std::uint64_t, std::span<const std::byte> words) { hash_.update(words); });
  }
  std::string hex() { return hash_.hex(); }

 private:
  Sha256 hash_;
};

void add_model(Digest& digest, const ModelInfo& m) {
  digest.value("query_heads", m.query_heads);
  digest.value("kv_heads", m.kv_heads);
  digest.value("head_dim", m.head_dim);
  digest.value("value_dim", m.value_dim);
  digest.value("hidden_size", m.hidden_size);
  digest.value("scale", m.scale);
  digest.value("softcap", m.softcap);
  digest.value("rope_type", m.rope_type);
  digest.value("rope_style", static_cast<int>(m.rope_style));
  digest.value("attention_scaling", m.attention_scaling);
  digest.array("inv_freq", m.inv_freq);
}

/// One layer but q, k and v. `g` is read by no policy.
void add_layer(Digest& digest, const h5::File& file, const LayerInfo& layer) {
  digest.value("layer", layer.index);
  digest.value("window", layer.window);
  digest.value("rope_post", layer.rope_post);
  digest.value("recipe", static_cast<int>(layer.recipe));
  digest.array("q_index", layer.q_index);
  digest.value("has_e", layer.has_e);
  const h5::Group group = file.group(layer.path);
  if (layer.has_sink_logit) digest.tensor(group.dataset("sink_logit"));
  if (layer.has_e) digest.tensor(group.dataset("e"));
  if (layer.has_wo) digest.tensor(group.dataset("wo"));
  if (layer.has_o) digest.tensor(group.dataset("o"));
}

}  // namespace

std::string trace_identity(const TraceHeader& header) {
  Digest digest;
  digest.value("content_sha256", header.content_sha256);
  digest.value("tokens", header.tokens);
  digest.value("prompt_tokens", header.prompt_tokens);
  digest.value("dtype", name_of(header.dtype));
  digest.array("position", header.position);
  add_model(digest, header.model);
  const h5::File file = h5::File::open(header.file);
  for (const LayerInfo& layer : header.layers) add_layer(digest, file, layer);
  return digest.hex();
}

}  // namespace kv
