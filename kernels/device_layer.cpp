#include <algorithm>
#include <cstring>
#include <numeric>

#include "kernels/device_layer.hpp"
#include "kernels/row_memory.hpp"
#include "kernels/unit_kernels.hpp"

namespace kv {
namespace {

/// Rows are stored as the trace stores them, unless a rotation in float32 makes values that its type cannot hold.
Dtype elements_of(const TraceHeader& header) {
  for (const LayerInfo& layer : header.layers)
    if (!layer.rope_post && header.model.rope_type != "none" && layer.recipe == RopeRecipe::fp32) return Dtype::float32;
  return header.dtype;
}

}  // namespace

DeviceTrace::DeviceTrace(const TraceHeader& header)
    : position_(std::vector<int>(header.position.begin(), header.position.end())) {
  const ModelInfo& m = header.model;
  data.tokens = header.tokens, data.prompt_tokens = header.prompt_tokens;
  data.kv_heads = m.kv_heads, data.group = m.group(), data.key_dim = m.head_dim, data.value_dim = m.value_dim;
  data.dtype = header.dtype, data.elements = elements_of(header);
  data.scale = static_cast<float>(m.scale), data.softcap = static_cast<float>(m.softcap);
  data.attention_scaling = m.attention_scaling;
  data.pairs = m.rope_type == "none" ? 0 : static_cast<int>(m.inv_freq.size());
  data.half_style = m.rope_style == RopeStyle::half;
  data.position = position_.data();
}

AttentionShape DeviceTrace::shape() const {
  return {data.elements, data.key_dim, data.value_dim, data.group, data.scale, data.softcap};
}

template <class T>
const T* DeviceLayer::keep(const std::vector<T>& host) {
  if (host.empty()) return nullptr;
  Buffer<char> buffer(host.size() * sizeof(T));
  to_device(buffer.data(), host.data(), host.size() * sizeof(T));
  kept_.push_back(std::move(buffer));
  return reinterpret_cast<const T*>(kept_.back().data());
}

const void* DeviceLayer::keep_elements(const std::vector<float>& host, Dtype elements) {
  if (elements == Dtype::float32) return keep(host);
  Buffer<char> buffer(host.size() * 2);
  constexpr std::size_t piece = 1 << 24;
  const Buffer<float> wide(std::min(piece, host.size()));
  for (std::size_t first = 0; first < host.size(); first += piece) {
    const std::size_t count = std::min(piece, host.size() - first);
    KV_CUDA_TRY(cudaMemcpy(wide.data(), host.data() + first, count * sizeof(float), cudaMemcpyHostToDevice));
    to_elements(wide.data(), buffer.data() + first * 2, elements, count, nullptr);
  }
  KV_CUDA_TRY(cudaDeviceSynchronize());
  kept_.push_back(std::move(buffer));
  return kept_.back().data();
}

DeviceLayer::DeviceLayer(const DeviceTrace& trace, Session& session, int index, bool with_norms) {
  const auto layer = session.layer(index);
  const Dtype elements = trace.data.elements;
  data_.q = keep_elements(layer->tensors.q, elements), data_.k = keep_elements(layer->tensors.k, elements);
  data_.v = keep_elements(layer->tensors.v, elements);
  const bool turned = trace.data.pairs > 0 && !layer->info.rope_post;
  data_.q_rotated = turned ? keep_elements(layer->q_rotated, elements) : data_.q;
  data_.k_rotated = turned ? keep_elements(layer->k_rotated, elements) : data_.k;
  data_.cos = keep(layer->by_slot->cosines()), data_.sin = keep(layer->by_slot->sines());
  data_.inv_freq = keep(session.header().model.inv_freq);
  data_.rope_step = layer->by_slot->step_dtype();
  row_of_token_ = layer->row_of_token;
  data_.row_of_token = keep(layer->row_of_token);
  data_.sink_logit = keep(layer->tensors.sink_logit), data_.e = keep(layer->tensors.e);
  if (with_norms) data_.norms = keep(*session.norms(index));
  data_.window = layer->info.window;
  data_.query_rows = static_cast<int>(layer->tensors.q.size() / static_cast<std::size_t>(trace.data.key_dim) /
                                      static_cast<std::size_t>(trace.data.kv_heads * trace.data.group));
  if (!layer->tensors.wo.empty()) wo_ = Buffer<float>(layer->tensors.wo);
}

LayerData DeviceLayer::measured(const DeviceTrace& trace, const std::vector<int>& tokens, cudaStream_t stream) {
  auto found = full_.find(tokens);
  if (found == full_.end()) found = full_.emplace(tokens, attend(trace, tokens, stream)).first;
  LayerData data = data_;
  data.full_output = found->second.output.data(), data.full_lse = found->second.lse.data();
  return data;
}

DeviceLayer::FullAttention DeviceLayer::attend(const DeviceTrace& trace, const std::vector<int>& measured,
                                               cudaStream_t stream) const {
  const TraceData& t = trace.data;
  const auto rows = measured.size(), heads = static_cast<std::size_t>(t.kv_heads), group = static_cast<std::size_t>(t.group);
  FullAttention full{Buffer<float>(heads * rows * group * static_cast<std::size_t>(t.value_dim)),
                     Buffer<float>(heads * rows * group)};
  std::vector<int> every(static_cast<std::size_t>(t.tokens)), query_row;
  std::iota(every.begin(), every.end(), 0);
  for (const int token : measured) query_row.push_back(row_of_token_[static_cast<std::size_t>(token)]);
  const Buffer<int> token(every), row(query_row), query_token(measured);
  std::vector<AttentionTask> tasks(heads);
  const auto element = static_cast<std::size_t>(bytes_of(t.elements));
  for (std::size_t h = 0; h < heads; ++h) {
    AttentionTask& task = tasks[h];
    const auto bytes = [&](const void* base, std::size_t at, int dim) {
      return static_cast<const char*>(base) + at * static_cast<std::size_t>(dim) * element;
    };
    task.keys = bytes(data_.k_rotated, h * every.size(), t.key_dim);
    task.values = bytes(data_.v, h * every.size(), t.value_dim);
    task.token = token.data();
    task.sink_logit = data_.sink_logit ? data_.sink_logit + h * group : nullptr;
    task.queries = bytes(data_.q_rotated, h * group * static_cast<std::size_t>(data_.query_rows), t.key_dim);
    task.query_row = row.data(), task.query_token = query_token.data(), task.query_stride = data_.query_rows;
    task.output = full.output.data() + h * rows * group * static_cast<std::size_t>(t.value_dim);
    task.lse = full.lse.data() + h * rows * group;
    task.slots = t.tokens, task.rows = static_cast<int>(rows), task.window = data_.window;
  }
  const Buffer<AttentionTask> device_tasks(tasks);
  block_attention(trace.shape(), device_tasks.data(), {t.kv_heads, static_cast<int>(rows), t.tokens}, stream);
  KV_CUDA_TRY(cudaStreamSynchronize(stream));
  return full;
}

std::size_t DeviceLayer::bytes(const TraceHeader& header, int layer, Dtype elements, std::size_t measured) {
  const ModelInfo& m = header.model;
  const LayerInfo& info = header.layers[static_cast<std::size_t>(layer)];
  const std::size_t rows = info.q_index.empty() ? static_cast<std::size_t>(header.tokens) : info.q_index.size();
  const auto heads = static_cast<std::size_t>(m.query_heads), d = static_cast<std::size_t>(m.head_dim),
             dv = static_cast<std::size_t>(m.value_dim), kv = static_cast<std::size_t>(m.kv_heads),
             tokens = static_cast<std::size_t>(header.tokens);
  std::size_t bytes = (2 * heads * rows * d + kv * tokens * (2 * d + dv)) * static_cast<std::size_t>(bytes_of(elements));
  bytes += tokens * m.inv_freq.size() * 8 + tokens * 8 + heads * measured * (dv + 1) * 4 + kv * tokens * 4;
  if (info.has_wo) bytes += static_cast<std::size_t>(m.hidden_size) * heads * dv * 4;
  if (info.has_e) bytes += heads * rows * dv * 4;
  return bytes + (std::size_t{64} << 20);  // the piece that is widened at a time
}

}  // namespace kv
