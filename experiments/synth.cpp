#include "experiments/synth.hpp"

#include <fmt/core.h>

#include "core/trace_writer.hpp"

namespace kv {

void synth(const std::filesystem::path& file, const Synthetic& settings) {
  const TraceHeader header = synthetic_header(settings);
  TraceWriter writer(file, header);
  for (const LayerInfo& layer : header.layers) {
    writer.write_layer(layer, synthetic_layer(settings, layer.index));
    fmt::print("layer {} of {} written\n", layer.index + 1, settings.layers);
  }
  writer.close();
  fmt::print("{}: {} layers, {} tokens, {} query and {} KV heads of {}, {}\n", file.string(), settings.layers,
             settings.tokens, settings.query_heads, settings.kv_heads, settings.head_dim, name_of(settings.dtype));
}

}  // namespace kv
