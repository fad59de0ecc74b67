#include "core/session.hpp"

#include <tbb/parallel_for.h>

#include <algorithm>
#include <list>
#include <map>
#include <numeric>
#include <utility>

#include "core/attention.hpp"
#include "core/output_norms.hpp"
#include "core/query_rows.hpp"

namespace kv {
namespace {

/// All rows of [heads][rows][dim], rotated to their own tokens' positions.
std::vector<float> rotate_all(const RopeTable& table, const std::vector<float>& rows,
                              const std::vector<int>& token_of_row, int dim) {
  std::vector<float> out(rows.size());
  const std::size_t count = token_of_row.size();
  tbb::parallel_for(std::size_t{0}, rows.size() / static_cast<std::size_t>(dim), [&](std::size_t i) {
    const std::size_t offset = i * static_cast<std::size_t>(dim);
    table.rotate(static_cast<std::size_t>(token_of_row[i % count]), rows.data() + offset, out.data() + offset);
  });
  return out;
}

std::vector<int> first_integers(int n) {
  std::vector<int> v(static_cast<std::size_t>(n));
  std::iota(v.begin(), v.end(), 0);
  return v;
}

FullAttention full_attention(const TraceHeader& header, const PreparedLayer& layer, const std::vector<int>& measured) {
  const ModelInfo& m = header.model;
  const std::size_t rows = measured.size(), group = static_cast<std::size_t>(m.group()),
                    dv = static_cast<std::size_t>(m.value_dim);
  FullAttention full{measured, std::vector<float>(static_cast<std::size_t>(m.query_heads) * rows * dv),
                     std::vector<double>(static_cast<std::size_t>(m.query_heads) * rows)};
  const std::vector<int> token = first_integers(header.tokens);
  tbb::parallel_for(0, m.kv_heads, [&](int head) {
    const std::vector<float> queries = gather_queries(m, layer, layer.q_rotated, head, measured);
    std::vector<float> output(rows * group * dv);
    std::vector<double> lse(rows * group);
    Attention().run(keys_of(header, layer, head, token), rule_of(m, layer, head),
                    {queries.data(), measured.data(), static_cast<int>(rows), m.group()}, 0, header.tokens,
                    output.data(), lse.data(), {});
    for (std::size_t r = 0; r < rows; ++r)
      for (std::size_t g = 0; g < group; ++g) {  // [rows][group] -> [query head][rows]
        const std::size_t to = (static_cast<std::size_t>(head) * group + g) * rows + r;
        std::copy_n(output.data() + (r * group + g) * dv, dv, full.output.data() + to * dv);
        full.lse[to] = lse[r * group + g];
      }
  });
  return full;
}

}  // namespace

std::size_t PreparedLayer::bytes() const {
  return sizeof(float) * (tensors.q.size() + tensors.k.size() + tensors.v.size() + tensors.o.size() +
                          tensors.wo.size() + tensors.e.size() + q_rotated.size() + k_rotated.size());
}

struct Session::Impl {
  Impl(const std::filesystem::path& file, std::size_t limit) : trace(Trace::open(file)), memory_limit(limit) {}

  Trace trace;
  std::size_t memory_limit;
  std::list<std::pair<int, std::shared_ptr<const PreparedLayer>>> layers;  // most recently used first
  std::map<std::pair<int, std::vector<int>>, std::shared_ptr<const FullAttention>> references;
  std::size_t reference_bytes = 0;
  std::map<int, std::shared_ptr<const std::vector<float>>> norms;
  std::map<std::pair<RopeRecipe, bool>, std::shared_ptr<const RopeTable>> tables;

  /// Rotations by the recipe; to the tokens' own positions, or to slot indices.
  std::shared_ptr<const RopeTable> table(RopeRecipe recipe, bool by_slot) {
    const TraceHeader& h = trace.header();
    auto& entry = tables[{recipe, by_slot}];
    if (!entry)
      entry = std::make_shared<RopeTable>(h.model, h.dtype, recipe,
                                          by_slot ? first_integers(h.tokens) : std::vector<int>(h.position));
    return entry;
  }

  std::shared_ptr<const PreparedLayer> prepare(int index) {
    const TraceHeader& h = trace.header();
    auto layer = std::make_shared<PreparedLayer>();
    layer->info = h.layers[static_cast<std::size_t>(index)];
    layer->tensors = trace.read_layer(index);
    const std::vector<int> all = first_integers(h.tokens);
    const std::vector<int>& token_of_row = layer->info.q_index.empty() ? all : layer->info.q_index;
    layer->row_of_token.assign(all.size(), -1);
    for (std::size_t r = 0; r < token_of_row.size(); ++r)
      layer->row_of_token[static_cast<std::size_t>(token_of_row[r])] = static_cast<int>(r);
    layer->by_slot = table(layer->info.recipe, true);
    if (layer->info.rope_post) {
      layer->q_rotated = layer->tensors.q, layer->k_rotated = layer->tensors.k;
    } else {
      const auto own = table(layer->info.recipe, false);
      layer->q_rotated = rotate_all(*own, layer->tensors.q, token_of_row, h.model.head_dim);
      layer->k_rotated = rotate_all(*own, layer->tensors.k, all, h.model.head_dim);
    }
    return layer;
  }
};

Session::Session(const std::filesystem::path& file, std::size_t memory_limit)
    : impl_(std::make_unique<Impl>(file, memory_limit)) {}
Session::~Session() = default;

const TraceHeader& Session::header() const { return impl_->trace.header(); }

std::shared_ptr<const PreparedLayer> Session::layer(int layer) {
  auto& layers = impl_->layers;
  auto found = std::find_if(layers.begin(), layers.end(), [layer](const auto& entry) { return entry.first == layer; });
  if (found == layers.end()) {
    layers.emplace_front(layer, impl_->prepare(layer));
    std::size_t bytes = 0;
    for (auto entry = layers.begin(); entry != layers.end();) {
      bytes += entry->second->bytes();
      entry = bytes > impl_->memory_limit && entry != layers.begin() ? layers.erase(entry) : std::next(entry);
    }
  } else {
    layers.splice(layers.begin(), layers, found);
  }
  return layers.front().second;
}

void Session::stream(int layer, const std::string& name, const WordSink& sink) const {
  impl_->trace.stream(layer, name, sink);
}

int Session::layers_at_once() {
  const std::size_t fit = impl_->memory_limit / std::max<std::size_t>(1, layer(0)->bytes());
  return static_cast<int>(std::clamp<std::size_t>(fit, 1, header().layers.size()));
}

std::shared_ptr<const FullAttention> Session::reference(int layer, const std::vector<int>& measured) {
  const auto found = impl_->references.find({layer, measured});
  if (found != impl_->references.end()) return found->second;
  const auto full = std::make_shared<FullAttention>(full_attention(header(), *this->layer(layer), measured));
  const std::size_t bytes = sizeof(float) * full->output.size() + sizeof(double) * full->lse.size();
  if (impl_->reference_bytes + bytes > impl_->memory_limit) impl_->references.clear(), impl_->reference_bytes = 0;
  impl_->reference_bytes += bytes;
  return impl_->references[{layer, measured}] = full;
}

std::shared_ptr<const std::vector<float>> Session::norms(int layer) {
  auto& norms = impl_->norms[layer];
  if (!norms) norms = std::make_shared<std::vector<float>>(output_norms(header(), *this->layer(layer)));
  return norms;
}

}  // namespace kv
