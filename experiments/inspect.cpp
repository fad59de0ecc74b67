#include "experiments/inspect.hpp"

#include <fmt/core.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "core/attention.hpp"
#include "core/error.hpp"
#include "core/metrics.hpp"
#include "core/query_rows.hpp"
#include "core/replay.hpp"
#include "experiments/progress.hpp"

namespace kv {
namespace {

constexpr std::size_t sinks = 4;  // tokens whose attention is shown

void print_header(const TraceHeader& h) {
  const ModelInfo& m = h.model;
  const auto line = [](const char* name, const std::string& value) {
    if (!value.empty()) fmt::print("  {:<10} {}\n", name, value);
  };
  fmt::print("{}\n", h.file.string());
  line("model", h.model_id);
  line("dataset", h.dataset);
  line("license", h.license);
  line("recorded", fmt::format("{} by {} ({})", h.created_utc, h.producer, h.framework));
  line("content", fmt::format("sha256 {}", h.content_sha256));
  line("tokens",
       fmt::format("{}: {} of the prompt, {} decoded", h.tokens, h.prompt_tokens, h.tokens - h.prompt_tokens));
  line("heads", fmt::format("{} query, {} key-value; dimension {}, values {}", m.query_heads, m.kv_heads, m.head_dim,
                            m.value_dim));
  line("attention",
       fmt::format("scale {}{}; rope {}{}", m.scale, m.softcap > 0 ? fmt::format(", softcap {}", m.softcap) : "",
                   m.rope_type, m.rope_type == "none" ? "" : fmt::format(" over {} channels", 2 * m.inv_freq.size())));
  line("stored as", name_of(h.dtype));
}

void print_layers(const TraceHeader& h) {
  fmt::print("\nlayers: {} of the model's {}\n", h.layers.size(), h.model.layers);
  for (const LayerInfo& layer : h.layers) {
    std::string text = layer.rope_post ? "q and k stored rotated" : "q and k stored before rotation";
    if (layer.window > 0) text += fmt::format(", window {}", layer.window);
    text += layer.q_index.empty() ? ", every query" : fmt::format(", {} queries", layer.q_index.size());
    const std::array<std::pair<bool, const char*>, 6> optional{{{layer.has_o, "o"},
                                                                {layer.has_wo, "wo"},
                                                                {layer.has_sink_logit, "sink_logit"},
                                                                {layer.has_e, "e"},
                                                                {layer.has_g, "g"},
                                                                {layer.has_attention, "attention"}}};
    std::string also;
    for (const auto& [has, name] : optional)
      if (has) also += fmt::format(" {}", name);
    fmt::print("  {:>3}: {}{}\n", layer.index, text, also.empty() ? "" : "; also" + also);
  }
}

void print_sizes(const TraceHeader& h) {
  std::error_code ignored;
  fmt::print("\nsize: {} on disk; as stored values, all layers:\n",
             human_bytes(static_cast<double>(std::filesystem::file_size(h.file, ignored))));
  for (const char* part : {"q", "k", "v", "o", "wo", "sink_logit", "e", "g", "attention"}) {
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < h.layers.size(); ++i) bytes += h.bytes(static_cast<int>(i), part);
    if (bytes > 0) fmt::print("  {:<10} {}\n", part, human_bytes(static_cast<double>(bytes)));
  }
}

/// The queries to look at: of decode, or of all tokens when nothing was decoded; only those that were recorded.
std::vector<int> decode_queries(const TraceHeader& h) {
  const char* measure = h.prompt_tokens < h.tokens ? "decode" : "all";
  return recorded_queries(h, parse_measure(measure, h.tokens, h.prompt_tokens));
}

/// Mean full-attention mass of the first tokens over the layer's heads and `tokens`' queries.
std::array<double, sinks> sink_mass(Session& session, int index, const std::vector<int>& tokens) {
  const TraceHeader& h = session.header();
  const auto layer = session.layer(index);
  const auto full = session.reference(index, tokens);
  const auto dim = static_cast<std::size_t>(h.model.head_dim),
             rows = layer->q_rotated.size() / dim / static_cast<std::size_t>(h.model.query_heads);
  std::array<double, sinks> mass{};
  for (int head = 0; head < h.model.query_heads; ++head) {
    const AttentionRule rule = rule_of(h.model, *layer, head / h.model.group());
    const auto first_key = static_cast<std::size_t>(head / h.model.group()) * static_cast<std::size_t>(h.tokens) * dim;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const auto row = static_cast<std::size_t>(head) * rows +
                       static_cast<std::size_t>(layer->row_of_token[static_cast<std::size_t>(tokens[i])]);
      const double lse = full->lse[static_cast<std::size_t>(head) * tokens.size() + i];
      for (std::size_t j = 0; j < std::min(sinks, static_cast<std::size_t>(h.tokens)); ++j)
        if (visible(rule, tokens[i], static_cast<int>(j)))
          mass[j] += std::exp(logit(rule, layer->q_rotated.data() + row * dim,
                                    layer->k_rotated.data() + first_key + j * dim, h.model.head_dim) -
                              lse);
    }
  }
  for (double& m : mass) m /= static_cast<double>(tokens.size()) * h.model.query_heads;
  return mass;
}

void print_attention(Session& session, const std::vector<int>& tokens) {
  const TraceHeader& h = session.header();
  fmt::print(
      "\nmean attention mass of the first tokens, over {} queries:\n  layer   token 0  token 1  token 2  token 3\n",
      tokens.size());
  for (std::size_t i = 0; i < h.layers.size(); ++i) {
    const auto mass = sink_mass(session, static_cast<int>(i), tokens);
    fmt::print("  {:>5}   {:>7.4f}  {:>7.4f}  {:>7.4f}  {:>7.4f}\n", h.layers[i].index, mass[0], mass[1], mass[2],
               mass[3]);
  }
}

void print_noise_floor(Session& session, const std::vector<int>& tokens) {
  const TraceHeader& h = session.header();
  if (!std::ranges::all_of(h.layers, &LayerInfo::has_o)) {
    fmt::print("\nnoise floor: unknown, the trace does not hold the model's own output (o)\n");
    return;
  }
  const ReplayResult result = noise_floor(session, tokens);
  const std::vector<double> errors = relative_errors(result);
  const auto per_layer = static_cast<std::ptrdiff_t>(errors.size() / h.layers.size());
  fmt::print(
      "\nnoise floor: replayed full attention against the model's own output, relative error\n  layer       mean       "
      " p99\n");
  for (std::size_t i = 0; i < h.layers.size(); ++i) {
    const auto first = errors.begin() + static_cast<std::ptrdiff_t>(i) * per_layer;
    std::vector<double> layer;
    std::copy_if(first, first + per_layer, std::back_inserter(layer), [](double x) { return !std::isnan(x); });
    double sum = 0;
    for (const double x : layer) sum += x;
    fmt::print("  {:>5}  {:>9.2e}  {:>9.2e}\n", h.layers[i].index, sum / static_cast<double>(layer.size()),
               percentile(layer, 99).value_or(std::nan("")));
  }
}

/// Why a policy cannot run with its default and published settings at half the prompt; "" when it can.
std::string obstacle(const TraceHeader& h, const PolicyEntry& entry, const std::vector<int>& tokens) {
  const auto policy = entry.make();
  ReplaySettings settings;
  settings.block = entry.published.block;
  settings.compress = entry.published.compress;
  settings.positions = entry.published.positions;
  settings.measured = tokens;
  try {
    settings.budget = policy->traits().needs_budget()
                          ? slots_of(parse_budget("50%"), h, slot_bytes(h, entry, policy->traits(), settings.positions))
                          : h.tokens;
    check_point(h, entry, *policy, settings);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

void print_policies(const TraceHeader& h, const std::vector<int>& tokens) {
  std::vector<std::string> able, unable;
  for (const PolicyEntry& entry : policies()) {
    const std::string why = obstacle(h, entry, tokens);
    if (why.empty())
      able.emplace_back(entry.doc.name);
    else
      unable.push_back(fmt::format("  {}\n", why));
  }
  fmt::print("\npolicies that run with default settings: {}\n", fmt::join(able, ", "));
  if (!unable.empty()) fmt::print("policies that do not:\n{}", fmt::join(unable, ""));
}

}  // namespace

void inspect(const std::filesystem::path& trace) {
  Session session(trace);
  const TraceHeader& header = session.header();
  print_header(header);
  print_layers(header);
  print_sizes(header);
  const std::vector<int> tokens = decode_queries(header);
  if (tokens.empty()) {
    fmt::print("\nno query is recorded in every layer: nothing can be measured\n");
    return;
  }
  print_attention(session, tokens);
  print_noise_floor(session, tokens);
  print_policies(header, tokens);
}

}  // namespace kv
