// HeadReplay's measuring half: a head's outputs against full attention.
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/comparison.hpp"
#include "core/error.hpp"
#include "core/head_replay.hpp"

namespace kv {

void HeadReplay::measure(const std::vector<int>& rows, const std::vector<int>& measured, const Attended& attended) {
  const auto m_count = layer_.settings.measured.size(), dv = static_cast<std::size_t>(model_.value_dim);
  const auto first = static_cast<std::size_t>(
      std::lower_bound(layer_.settings.measured.begin(), layer_.settings.measured.end(), measured.front()) -
      layer_.settings.measured.begin());
  const bool by_lse = layer_.settings.positions == Positions::absolute && counters_.merges == 0;
  const std::vector<int> lost = by_lse ? std::vector<int>{} : lost_tokens();
  std::vector<double> p(lost.size());
  ReplayResult& result = *layer_.result;
  for (std::size_t i = 0; i < measured.size(); ++i) {
    const auto row = static_cast<std::size_t>(std::lower_bound(rows.begin(), rows.end(), measured[i]) - rows.begin());
    for (int g = 0; g < group_; ++g) {
      const int query_head = kv_head_ * group_ + g;
      const std::size_t in_full = static_cast<std::size_t>(query_head) * m_count + first + i;
      const std::size_t at = static_cast<std::size_t>(layer_.index * model_.query_heads) * m_count + in_full;
      const std::size_t local = row * static_cast<std::size_t>(group_) + static_cast<std::size_t>(g);
      const float* got = attended.output.data() + local * dv;
      const float* full = layer_.full->output.data() + in_full * dv;
      const Comparison c(got, full, model_.value_dim);
      if (!std::isfinite(c.error2) || !std::isfinite(c.output2))
        throw TraceError(
            fmt::format("{}: the attention output of layer {}, query head {}, token {} is not finite: logits overflow, "
                        "or a policy's merged keys do",
                        layer_.trace.file.string(), layer_.layer.info.index, query_head, measured[i]));
      result.error2[at] = c.error2, result.output2[at] = c.output2, result.cosine[at] = c.cosine;
      const double full_lse = layer_.full->lse[in_full];
      // What remains visible of an unmerged cache are the same exponentials: their sum says what is missing.
      if (!by_lse) full_probabilities(lost, measured[i], query_head, full_lse, p);
      result.lost_mass[at] = by_lse ? std::max(0.0, 1 - std::exp(attended.lse[local] - full_lse))
                                    : std::accumulate(p.begin(), p.end(), 0.0);
      if (layer_.deltas)
        for (std::size_t c2 = 0; c2 < dv; ++c2)
          layer_.deltas[((first + i) * static_cast<std::size_t>(model_.query_heads) +
                         static_cast<std::size_t>(query_head)) *
                            dv +
                        c2] = got[c2] - full[c2];
    }
  }
}

std::vector<int> HeadReplay::lost_tokens() const {
  std::vector<int> lost;
  const int seen = cache_.size() == 0 ? 0 : cache_.tokens()[static_cast<std::size_t>(cache_.order().back())] + 1;
  for (int t = 0; t < seen; ++t)
    if (cache_.standing_for(t) < 0) lost.push_back(t);
  return lost;
}

void HeadReplay::full_probabilities(const std::vector<int>& tokens, int query_token, int query_head, double full_lse,
                                    std::vector<double>& p) const {
  const AttentionRule rule{static_cast<float>(model_.scale), static_cast<float>(model_.softcap),
                           layer_.layer.info.window, nullptr};
  const auto dim = static_cast<std::size_t>(model_.head_dim),
             rows = layer_.layer.q_rotated.size() / dim / static_cast<std::size_t>(model_.query_heads);
  const float* q = layer_.layer.q_rotated.data() +
                   (static_cast<std::size_t>(query_head) * rows +
                    static_cast<std::size_t>(layer_.layer.row_of_token[static_cast<std::size_t>(query_token)])) *
                       dim;
  const float* keys = layer_.layer.k_rotated.data() +
                      static_cast<std::size_t>(kv_head_) * static_cast<std::size_t>(layer_.trace.tokens) * dim;
  for (std::size_t i = 0; i < tokens.size(); ++i)
    p[i] = visible(rule, query_token, tokens[i])
               ? std::exp(logit(rule, q, keys + static_cast<std::size_t>(tokens[i]) * dim, model_.head_dim) - full_lse)
               : 0.0;
}

/// mass_tv of every measured query of a tile: half the distance between its own masses, slot by slot, and the full ones
/// of the tokens that each slot stands for; lost tokens count in full.
void HeadReplay::measure_mass(const AttentionTile& tile, const std::vector<int>& tokens) {
  const auto& measured = layer_.settings.measured;
  std::vector<int> every(static_cast<std::size_t>(now_ + 1)), owner(every.size());
  std::iota(every.begin(), every.end(), 0);
  for (const int t : every) {
    const int stands = cache_.standing_for(t);
    owner[static_cast<std::size_t>(t)] = stands < 0 ? -1 : cache_.slot_of(stands);
  }
  std::vector<double> p(every.size()), moved;
  for (int r = 0; r < tile.rows * group_; ++r) {
    const int token = tokens[static_cast<std::size_t>(tile.first_row + r / group_)];
    const auto m = std::lower_bound(measured.begin(), measured.end(), token);
    if (m == measured.end() || *m != token) continue;
    const int query_head = kv_head_ * group_ + r % group_;
    const std::size_t at =
        static_cast<std::size_t>(query_head) * measured.size() + static_cast<std::size_t>(m - measured.begin());
    full_probabilities(every, token, query_head, layer_.full->lse[at], p);
    moved.assign(static_cast<std::size_t>(cache_.size()), 0.0);  // own mass - full mass of the slot's tokens
    for (std::size_t s = 0; s < static_cast<std::size_t>(tile.columns); ++s)
      moved[s] = tile.probability[static_cast<std::size_t>(r) * tile.stride + s];
    double sum = 0;
    for (std::size_t t = 0; t < p.size(); ++t) {
      if (owner[t] < 0)
        sum += p[t];  // lost
      else
        moved[static_cast<std::size_t>(owner[t])] -= p[t];
    }
    for (const double x : moved) sum += std::abs(x);
    layer_.result->mass_tv[static_cast<std::size_t>(layer_.index * model_.query_heads) * measured.size() + at] =
        sum / 2;
  }
}

std::vector<int> HeadReplay::kept_tokens() const {
  std::vector<int> tokens;
  for (const int slot : cache_.order()) tokens.push_back(cache_.tokens()[static_cast<std::size_t>(slot)]);
  return tokens;
}

void HeadReplay::finish() {
  ReplayResult& result = *layer_.result;
  const auto at = static_cast<std::size_t>(layer_.index * model_.kv_heads + kv_head_);
  result.final_slots[at] = cache_.size();
  for (const int slot : cache_.order()) {
    result.final_position[at].push_back(cache_.tokens()[static_cast<std::size_t>(slot)]);
    result.final_multiplicity[at].push_back(cache_.multiplicities()[static_cast<std::size_t>(slot)]);
  }
}

}  // namespace kv
