#include "core/attention.hpp"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>

namespace kv {
namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Rows = Eigen::Map<Matrix, Eigen::AlignedMax, Eigen::OuterStride<>>;
using ConstRows = Eigen::Map<const Matrix>;

constexpr float hidden = -std::numeric_limits<float>::infinity();
constexpr int tile_rows = 96;  // query rows x heads at a time: the tile of logits stays in the L2 cache

float capped(float logit, float softcap) { return softcap > 0 ? softcap * std::tanh(logit / softcap) : logit; }

void mask(Rows& logits, const AttentionKeys& keys, const AttentionRule& rule, const AttentionQueries& queries,
          int first_row, int plain) {
  for (Eigen::Index r = 0; r < logits.rows(); ++r) {
    const int token = queries.token[first_row + static_cast<int>(r) / queries.group];
    float* row = logits.data() + r * logits.outerStride();
    for (int c = rule.window > 0 ? 0 : plain; c < static_cast<int>(logits.cols()); ++c)
      if (!visible(rule, token, keys.token[c]) || keys.token[c] > queries.newest_key) row[c] = hidden;
  }
}

/// Turns logits into probabilities in place; returns the log of each row's denominator in `lse`.
void softmax(Rows& rows, const AttentionRule& rule, int group, double* lse) {
  for (Eigen::Index r = 0; r < rows.rows(); ++r) {
    const float sink = rule.sink_logit ? rule.sink_logit[r % group] : hidden;
    const float peak = std::max(rows.row(r).maxCoeff(), sink);
    if (peak == hidden) {  // nothing is visible: the output is zero
      rows.row(r).setZero();
      if (lse) lse[r] = hidden;
      continue;
    }
    // Vectorised, exp(-infinity) may be the smallest float: hidden slots weigh nothing on every machine.
    rows.row(r).array() = (rows.row(r).array() == hidden).select(0.f, (rows.row(r).array() - peak).exp());
    const float denominator = rows.row(r).sum() + (sink == hidden ? 0.f : std::exp(sink - peak));
    rows.row(r) *= 1.f / denominator;
    if (lse) lse[r] = std::log(static_cast<double>(denominator)) + peak;
  }
}

}  // namespace

float logit(const AttentionRule& rule, const float* query, const float* key, int key_dim) {
  const Eigen::Map<const Eigen::VectorXf> q(query, key_dim), k(key, key_dim);
  return capped(q.dot(k) * rule.scale, rule.softcap);
}

void Attention::run(const AttentionKeys& keys, const AttentionRule& rule, const AttentionQueries& queries, int plain,
                    int columns_of_row0, float* output, double* lse,
                    const std::function<void(const AttentionTile&)>& observe) {
  const int group = queries.group, tile = std::max(1, tile_rows / group);
  const std::size_t stride = (static_cast<std::size_t>(keys.slots) + 15) / 16 * 16;
  probability_.resize(static_cast<std::size_t>(std::min(tile, queries.rows) * group) * stride);
  for (int first = 0; first < queries.rows; first += tile) {
    const int count = std::min(tile, queries.rows - first), rows = count * group;
    const int columns = std::min(keys.slots, columns_of_row0 + first + count - 1);
    const auto row_offset = static_cast<std::size_t>(first) * static_cast<std::size_t>(group);
    const ConstRows q(queries.queries + row_offset * static_cast<std::size_t>(keys.key_dim), rows, keys.key_dim);
    const ConstRows k(keys.keys, columns, keys.key_dim), v(keys.values, columns, keys.value_dim);
    Rows p(probability_.data(), rows, columns, Eigen::OuterStride<>(static_cast<Eigen::Index>(stride)));
    p.noalias() = (q * k.transpose()) * rule.scale;
    if (rule.softcap > 0) p = p.unaryExpr([&](float x) { return capped(x, rule.softcap); });
    mask(p, keys, rule, queries, first, plain);
    if (observe) logit_ = probability_;
    if (keys.bias) p.rowwise() += Eigen::Map<const Eigen::RowVectorXf>(keys.bias, columns);
    softmax(p, rule, group, lse ? lse + row_offset : nullptr);
    float* out = output ? output + row_offset * static_cast<std::size_t>(keys.value_dim) : nullptr;
    if (out) Eigen::Map<Matrix>(out, rows, keys.value_dim).noalias() = p * v;
    if (observe) observe({p.data(), logit_.data(), out, first, count, columns, stride});
  }
}

}  // namespace kv
