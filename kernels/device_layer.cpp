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
  if (found == full_.end()) {
    FullLook look = full_look(trace, tokens, false);
    block_attention(trace.shape(), look.tasks.data(), look.bounds, stream);
    KV_CUDA_TRY(cudaStreamSynchronize(stream));
    found = full_.emplace(tokens, FullAttention{std::move(look.output), std::move(look.lse)}).first;
  }
  LayerData data = data_;
  data.full_output = found->second.output.data(), data.full_lse = found->second.lse.data();
  return data;
}

FullLook DeviceLayer::full_look(const DeviceTrace& trace, const std::vector<int>& tokens, bool sums) const {
  const TraceData& t = trace.data;
  const auto rows = tokens.size(), heads = static_cast<std::size_t>(t.kv_heads),
             group = static_cast<std::size_t>(t.group), dv = static_cast<std::size_t>(t.value_dim),
             all = static_cast<std::size_t>(t.tokens), element = static_cast<std::size_t>(bytes_of(t.elements));
  std::vector<int> every(all), query_row;
  std::iota(every.begin(), every.end(), 0);
  for (const int token : tokens) query_row.push_back(row_of_token_[static_cast<std::size_t>(token)]);
  FullLook look;
  look.token = Buffer<int>(every), look.query_row = Buffer<int>(query_row), look.query_token = Buffer<int>(tokens);
  look.output = Buffer<float>(heads * rows * group * dv), look.lse = Buffer<float>(heads * rows * group);
  if (sums) look.sums = Buffer<float>(heads * all * group);
  const auto row_of = [&](const void* base, std::size_t row, int dim) {
    return static_cast<const char*>(base) + row * static_cast<std::size_t>(dim) * element;
  };
  std::vector<AttentionTask> tasks(heads);
  for (std::size_t h = 0; h < heads; ++h) {
    AttentionTask& task = tasks[h];
    task.keys = row_of(data_.k_rotated, h * all, t.key_dim), task.values = row_of(data_.v, h * all, t.value_dim);
    task.token = look.token.data();
    task.sink_logit = data_.sink_logit ? data_.sink_logit + h * group : nullptr;
    task.queries = row_of(data_.q_rotated, h * group * static_cast<std::size_t>(data_.query_rows), t.key_dim);
    task.query_row = look.query_row.data(), task.query_token = look.query_token.data();
    task.query_stride = data_.query_rows;
    task.output = look.output.data() + h * rows * group * dv, task.lse = look.lse.data() + h * rows * group;
    if (sums) task.sums = look.sums.data() + h * all * group;
    task.slots = t.tokens, task.rows = static_cast<int>(rows), task.window = data_.window;
  }
  look.tasks = Buffer<AttentionTask>(tasks);
  look.bounds = {t.kv_heads, static_cast<int>(rows), t.tokens};
  return look;
}

std::size_t DeviceLayer::bytes(const TraceHeader& header, int layer, Dtype elements, std::size_t measured) {
  const ModelInfo& m = header.model;
  const LayerInfo& info = header.layers[static_cast<std::size_t>(layer)];
  const std::size_t rows = info.q_index.empty() ? static_cast<std::size_t>(header.tokens) : info.q_index.size();
  const auto heads = static_cast<std::size_t>(m.query_heads), d = static_cast<std::size_t>(m.head_dim),
             dv = static_cast<std::size_t>(m.value_dim), kv = static_cast<std::size_t>(m.kv_heads),
             tokens = static_cast<std::size_t>(header.tokens);
  std::size_t bytes =
      (2 * heads * rows * d + kv * tokens * (2 * d + dv)) * static_cast<std::size_t>(bytes_of(elements));
  bytes += tokens * m.inv_freq.size() * 8 + tokens * 8 + heads * measured * (dv + 1) * 4 + kv * tokens * 4;
  if (info.has_wo) bytes += static_cast<std::size_t>(m.hidden_size) * heads * dv * 4;
  if (info.has_e) bytes += heads * rows * dv * 4;
  return bytes + (std::size_t{64} << 20);  // the piece that is widened at a time
}

}  // namespace kv
