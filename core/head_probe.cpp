// HeadReplay's probing half: a block's queries look at a cache that they are not part of yet.
#include <Eigen/Core>
#include <cmath>
#include <numeric>

#include "core/head_replay.hpp"

namespace kv {

namespace {
using Rows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using ConstRows = Eigen::Map<const Rows>;
}  // namespace

void HeadReplay::probe(const BlockRange& block) {
  const int older = cache_.size();
  enter(block);
  const bool gradient = traits_.key_gradient != KeyGradient::none;
  Look look{.phase = TimedPhase::observe, .older = older, .output = gradient, .observe = true, .gradient = gradient};
  look.tokens.resize(static_cast<std::size_t>(block.last - block.first));
  std::iota(look.tokens.begin(), look.tokens.end(), block.first);
  timed(TimedPhase::observe, [&] { append_rows(block); });
  attend(look);
  timed(TimedPhase::observe, [&] {
    sight_ = {};
    sight_.seen = gather(static_cast<int>(look.tokens.size()));
    if (gradient) rotate_gradient_back(), sight_.key_gradient = gradient_.data();
    cache_.truncate(older);
    slot_rotated_at_.resize(std::min(slot_rotated_at_.size(), static_cast<std::size_t>(older)));
    program_->probe(cache_, moment(), sight_);
  });
}

/// dLoss/dk of every slot: sum over rows of scale * p_tj (E_t . (v_j - o_t)) q_t (kvslimmer-asymkv 2.4, with p = l a
/// and mean values), here by the rotated keys.
void HeadReplay::add_gradient(const AttentionTile& tile, const Look& look, const std::vector<float>& q) {
  const auto dim = static_cast<Eigen::Index>(model_.head_dim), dv = static_cast<Eigen::Index>(model_.value_dim);
  const Eigen::Index rows = tile.rows * group_, columns = tile.columns;
  const ConstRows o(tile.output, rows, dv), v(cache_.values(), columns, dv);
  const ConstRows queries(q.data() + tile.first_row * group_ * dim, rows, dim);
  const Eigen::Map<const Rows, 0, Eigen::OuterStride<>> p(tile.probability, rows, columns,
                                                          Eigen::OuterStride<>(static_cast<Eigen::Index>(tile.stride)));
  Rows e = o;
  if (traits_.key_gradient == KeyGradient::recorded) {
    const std::vector<float>& all = layer_.layer.tensors.e;
    const std::size_t recorded = all.size() / static_cast<std::size_t>(model_.query_heads * model_.value_dim);
    for (Eigen::Index r = 0; r < rows; ++r) {
      const int token = look.tokens[static_cast<std::size_t>(tile.first_row + r / group_)];
      const auto head = static_cast<std::size_t>(kv_head_ * group_ + r % group_);
      const auto row = static_cast<std::size_t>(layer_.layer.row_of_token[static_cast<std::size_t>(token)]);
      e.row(r) = Eigen::Map<const Eigen::RowVectorXf>(all.data() + (head * recorded + row) * model_.value_dim, dv);
    }
  }
  Rows s = e * v.transpose();
  s.colwise() -= (e.array() * o.array()).rowwise().sum().matrix();
  s.array() *= p.array() * static_cast<float>(model_.scale);
  if (model_.softcap > 0)  // the logit's own slope: 1 - tanh^2
    for (Eigen::Index r = 0; r < rows; ++r)
      for (Eigen::Index c = 0; c < columns; ++c) {
        const float t = tile.logit[r * static_cast<Eigen::Index>(tile.stride) + c] / static_cast<float>(model_.softcap);
        s(r, c) *= std::isfinite(t) ? 1 - t * t : 0.f;  // a hidden slot has no slope
      }
  Eigen::Map<Rows>(gradient_.data(), columns, dim).noalias() += s.transpose() * queries;
}

void HeadReplay::rotate_gradient_back() {
  if (layer_.settings.positions == Positions::absolute) return;  // hooks see rotated keys
  const auto dim = static_cast<std::size_t>(model_.head_dim);
  const std::vector<int> place = places();
  std::vector<float> rotated(dim);
  for (std::size_t s = 0; s < place.size(); ++s) {
    std::copy_n(gradient_.data() + s * dim, dim, rotated.data());
    layer_.layer.by_slot->rotate_back(static_cast<std::size_t>(place[s]), rotated.data(), gradient_.data() + s * dim);
  }
}

}  // namespace kv
