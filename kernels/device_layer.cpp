#include <algorithm>
#include <cstring>
#include <numeric>

#include "core/comparison.hpp"
#include "core/trace_words.hpp"
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

bool turns(const TraceHeader& header, const LayerInfo& layer) {
  return header.model.rope_type != "none" && !layer.rope_post;
}

}  // namespace

std::vector<int> tokens_between(int first, int last) {
  std::vector<int> tokens(static_cast<std::size_t>(last - first));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

DeviceTrace::DeviceTrace(const TraceHeader& header)
    : position_(std::vector<int>(header.position.begin(), header.position.end())), inv_freq_(header.model.inv_freq) {
  const ModelInfo& m = header.model;
  data.tokens = header.tokens, data.prompt_tokens = header.prompt_tokens;
  data.kv_heads = m.kv_heads, data.group = m.group(), data.key_dim = m.head_dim, data.value_dim = m.value_dim;
  data.dtype = header.dtype, data.elements = elements_of(header);
  data.scale = static_cast<float>(m.scale), data.softcap = static_cast<float>(m.softcap);
  data.attention_scaling = m.attention_scaling;
  data.pairs = m.rope_type == "none" ? 0 : static_cast<int>(m.inv_freq.size());
  data.half_style = m.rope_style == RopeStyle::half;
  data.position = position_.data();
  for (const LayerInfo& layer : header.layers) {
    if (rotations_.contains(layer.recipe)) continue;
    const RopeTable own(m, header.dtype, layer.recipe, header.position);
    const RopeTable slot(m, header.dtype, layer.recipe, tokens_between(0, header.tokens));
    rotations_[layer.recipe] = {Buffer<float>(own.cosines()), Buffer<float>(own.sines()), Buffer<float>(slot.cosines()),
                                Buffer<float>(slot.sines()), own.step_dtype()};
  }
}

std::size_t DeviceTrace::bytes() const {
  std::size_t count = position_.size() + inv_freq_.size();
  for (const auto& [recipe, tables] : rotations_) count += 4 * tables.own_cos.size();
  return 4 * count;
}

AttentionShape DeviceTrace::shape() const {
  return {data.elements, data.key_dim, data.value_dim, data.group, data.scale, data.softcap};
}

char* DeviceLayer::keep(std::size_t bytes) { return kept_.emplace_back(bytes).data(); }

template <class T>
const T* DeviceLayer::keep(const std::vector<T>& host) {
  char* const to = keep(host.size() * sizeof(T));
  to_device(to, host.data(), host.size() * sizeof(T));
  return reinterpret_cast<const T*>(to);
}

DeviceLayer::DeviceLayer(const DeviceTrace& trace, const Session& session, int index, const std::vector<float>* norms,
                         Upload& upload) {
  const TraceHeader& header = session.header();
  const TraceData& t = trace.data;
  const LayerInfo& info = header.layers[static_cast<std::size_t>(index)];
  // A dataset as it is stored, or widened to float32; null when it was not recorded.
  const auto read = [&](const char* name, Dtype stored, Dtype wanted) -> const void* {
    const std::size_t words = header.bytes(index, name) / size_of(stored);
    if (words == 0) return nullptr;
    char* const to = keep(words * size_of(wanted));
    session.stream(index, name, [&](std::uint64_t first, std::span<const std::byte> piece) {
      if (stored == wanted)
        upload.copy(piece, to + first * size_of(stored));
      else
        upload.widen(piece, stored, reinterpret_cast<float*>(to) + first);
    });
    return to;
  };
  const auto read_floats = [&](const char* name, Dtype stored) {
    return static_cast<const float*>(read(name, stored, Dtype::float32));
  };
  data_.q = read("q", t.dtype, t.elements), data_.k = read("k", t.dtype, t.elements);
  data_.v = read("v", t.dtype, t.elements);
  data_.e = read_floats("e", info.e_dtype), data_.sink_logit = read_floats("sink_logit", Dtype::float32);
  wo_ = read_floats("wo", t.dtype);
  if (norms) data_.norms = keep(*norms);

  const std::vector<int> every_token = tokens_between(0, header.tokens),
                         &token_of_row = info.q_index.empty() ? every_token : info.q_index;
  row_of_token_.assign(every_token.size(), -1);
  for (std::size_t r = 0; r < token_of_row.size(); ++r)
    row_of_token_[static_cast<std::size_t>(token_of_row[r])] = static_cast<int>(r);
  data_.row_of_token = keep(row_of_token_);
  data_.query_rows = static_cast<int>(token_of_row.size()), data_.window = info.window;

  const DeviceRotations& tables = trace.rotations(info.recipe);
  data_.cos = tables.slot_cos.data(), data_.sin = tables.slot_sin.data();
  data_.inv_freq = trace.inv_freq(), data_.rope_step = tables.step;
  data_.q_rotated = data_.q, data_.k_rotated = data_.k;
  if (turns(header, info)) {
    const Rotation shape{t.elements, tables.step, t.key_dim, t.pairs, t.half_style};
    const auto rotate = [&](const void* from, const int* token, int heads, int count) -> const void* {
      const long rows = static_cast<long>(heads) * count;
      char* const to = keep(static_cast<std::size_t>(rows * t.key_dim * bytes_of(t.elements)));
      rotate_rows({from, to, shape, rows, count, token, tables.own_cos.data(), tables.own_sin.data()}, upload.stream());
      return to;
    };
    data_.q_rotated = rotate(data_.q, keep(token_of_row), t.kv_heads * t.group, data_.query_rows);
    data_.k_rotated = rotate(data_.k, keep(every_token), t.kv_heads, t.tokens);
  }
  if (streams(t.elements, t.key_dim, t.value_dim, t.group)) {
    const auto map_of = [&](const void* rows, int dim) {
      return make_tile_map(rows, dim, t.tokens, static_cast<std::size_t>(t.tokens) * static_cast<std::size_t>(dim) * 2,
                           static_cast<std::size_t>(t.kv_heads),
                           tile_slots(stream_width(t.key_dim, t.value_dim), short_ring));
    };
    TileMaps maps;
    maps.keys = map_of(data_.k_rotated, t.key_dim), maps.values = map_of(data_.v, t.value_dim);
    maps_ = Buffer<TileMaps>({maps});
    data_.maps = maps_.data();
  }
  upload.wait();
}

LayerData DeviceLayer::seen(const DeviceTrace& trace, const std::vector<int>& measured, Prefill prefill,
                            cudaStream_t stream) {
  const auto attend = [&](const std::vector<int>& tokens, bool outputs) {
    FullLook look = full_look(trace, tokens, outputs, false);
    block_attention(trace.shape(), look.tasks.data(), look.bounds, stream);
    KV_CUDA_TRY(cudaStreamSynchronize(stream));
    return look;
  };
  if (!full_.contains(measured)) {
    FullLook look = attend(measured, true);
    full_.emplace(measured, FullAttention{std::move(look.output), std::move(look.lse)});
  }
  if (prefill.rows() > 0 && !prefill_lse_.contains(prefill))
    prefill_lse_.emplace(prefill, attend(tokens_between(prefill.first, prefill.last), false).lse);
  LayerData data = data_;
  const FullAttention& full = full_.at(measured);
  data.full_output = full.output.data(), data.full_lse = full.lse.data();
  if (prefill.rows() > 0) data.prefill_lse = prefill_lse_.at(prefill).data();
  return data;
}

void DeviceLayer::read_outputs(const Session& session, int index, const std::vector<std::vector<int>>& lists) {
  const TraceHeader& header = session.header();
  const auto dv = static_cast<std::size_t>(header.model.value_dim),
             group = static_cast<std::size_t>(header.model.group()),
             heads = static_cast<std::size_t>(header.model.query_heads),
             rows = static_cast<std::size_t>(data_.query_rows);
  std::vector<std::vector<std::pair<float*, std::size_t>>> places(rows);  // where a recorded row goes, and rows there
  for (const std::vector<int>& list : lists) {
    std::vector<float>& output = outputs_[list];
    output.resize(heads * list.size() * dv);
    for (std::size_t i = 0; i < list.size(); ++i)
      places[static_cast<std::size_t>(row_of_token_[static_cast<std::size_t>(list[i])])].emplace_back(
          output.data() + i * group * dv, list.size());
  }
  const std::size_t row_bytes = dv * size_of(header.dtype);
  session.stream(index, "o", [&](std::uint64_t first, std::span<const std::byte> words) {  // in whole rows
    for (std::size_t i = 0; i < words.size() / row_bytes; ++i) {
      const std::size_t row = first / dv + i, head = row / rows;
      for (const auto& [to, count] : places[row % rows])
        widen(header.dtype, words.subspan(i * row_bytes, row_bytes),
              to + (head / group * count * group + head % group) * dv);
    }
  });
}

void DeviceLayer::add_floor(const DeviceTrace& trace, int index, ReplayResult& floor, cudaStream_t stream) {
  seen(trace, floor.measured, {}, stream);
  const std::vector<float> full = full_.at(floor.measured).output.to_host(), &recorded = outputs_.at(floor.measured);
  const std::size_t rows = floor.measured.size();
  const auto heads = static_cast<std::size_t>(floor.query_heads), group = static_cast<std::size_t>(trace.data.group),
             dv = static_cast<std::size_t>(trace.data.value_dim),
             first = static_cast<std::size_t>(index) * heads * rows;
  for (std::size_t h = 0; h < heads; ++h)
    for (std::size_t i = 0; i < rows; ++i) {
      const std::size_t from = ((h / group * rows + i) * group + h % group) * dv, to = first + h * rows + i;
      const Comparison c(full.data() + from, recorded.data() + from, trace.data.value_dim);
      floor.error2[to] = c.error2, floor.output2[to] = c.output2, floor.cosine[to] = c.cosine;
    }
}

FullLook DeviceLayer::full_look(const DeviceTrace& trace, const std::vector<int>& tokens, bool outputs,
                                bool sums) const {
  const TraceData& t = trace.data;
  const auto rows = tokens.size(), heads = static_cast<std::size_t>(t.kv_heads),
             group = static_cast<std::size_t>(t.group), dv = static_cast<std::size_t>(t.value_dim),
             all = static_cast<std::size_t>(t.tokens), element = static_cast<std::size_t>(bytes_of(t.elements));
  std::vector<int> query_row;
  for (const int token : tokens) query_row.push_back(row_of_token_[static_cast<std::size_t>(token)]);
  FullLook look;
  look.token = Buffer<int>(tokens_between(0, t.tokens)), look.query_row = Buffer<int>(query_row),
  look.query_token = Buffer<int>(tokens);
  if (outputs) look.output = Buffer<float>(heads * rows * group * dv);
  look.lse = Buffer<float>(heads * rows * group);
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
    if (outputs) task.output = look.output.data() + h * rows * group * dv;
    task.lse = look.lse.data() + h * rows * group;
    if (sums) task.sums = look.sums.data() + h * all * group;
    task.slots = t.tokens, task.rows = static_cast<int>(rows), task.window = data_.window;
  }
  look.tasks = Buffer<AttentionTask>(tasks);
  look.bounds = {t.kv_heads, static_cast<int>(rows), t.tokens, outputs, !outputs};
  return look;
}

std::size_t DeviceLayer::bytes(const TraceHeader& header, int layer, Dtype elements, const FullRows& full) {
  const ModelInfo& m = header.model;
  const LayerInfo& info = header.layers[static_cast<std::size_t>(layer)];
  const std::size_t rows = info.q_index.empty() ? static_cast<std::size_t>(header.tokens) : info.q_index.size();
  const auto heads = static_cast<std::size_t>(m.query_heads), d = static_cast<std::size_t>(m.head_dim),
             dv = static_cast<std::size_t>(m.value_dim), kv = static_cast<std::size_t>(m.kv_heads),
             tokens = static_cast<std::size_t>(header.tokens), copies = turns(header, info) ? std::size_t{2} : 1;
  std::size_t bytes = (copies * (heads * rows + kv * tokens) * d + kv * tokens * dv) * size_of(elements);
  bytes += 2 * tokens * 4 + rows * 4 + heads * (full.measured * (dv + 1) + full.prefilled) * 4 + kv * tokens * 4;
  if (info.has_wo) bytes += static_cast<std::size_t>(m.hidden_size) * heads * dv * 4;
  if (info.has_e) bytes += heads * rows * dv * 4;
  return bytes + (std::size_t{16} << 20);  // what allocations are rounded up by
}

}  // namespace kv
