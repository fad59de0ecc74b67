#include "core/query_statistics.hpp"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>

namespace kv {
namespace {

using Vector = Eigen::VectorXd;
using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// The mean of the rotations to `horizon` positions from `first` on.
Matrix mean_rotation(const ModelInfo& model, int first, int horizon) {
  Matrix r = Matrix::Identity(model.head_dim, model.head_dim);
  if (model.rope_type == "none") return r;
  const auto pairs = static_cast<Eigen::Index>(model.inv_freq.size());
  const bool half = model.rope_style == RopeStyle::half;
  for (Eigen::Index i = 0; i < pairs; ++i) {
    double cos = 0, sin = 0;
    for (int p = first; p < first + horizon; ++p) {
      const float angle = model.inv_freq[static_cast<std::size_t>(i)] * static_cast<float>(p);
      cos += std::cos(angle), sin += std::sin(angle);
    }
    cos *= model.attention_scaling / horizon, sin *= model.attention_scaling / horizon;
    const Eigen::Index x = half ? i : 2 * i, y = half ? i + pairs : 2 * i + 1;
    r(x, x) = cos, r(x, y) = -sin, r(y, x) = sin, r(y, y) = cos;
  }
  return r;
}

}  // namespace

QueryStatistics::QueryStatistics(const ModelInfo& model, int group) : model_(model), group_(group) {
  const auto d = static_cast<std::size_t>(model.head_dim), g = static_cast<std::size_t>(group);
  sum_.resize(g * d), outer_.resize(g * d * d), mean_.resize(g * d), covariance_.resize(g * d * d);
}

void QueryStatistics::add_one(int g, const float* query) {
  const Eigen::Index d = model_.head_dim;
  const Vector q = Eigen::Map<const Eigen::VectorXf>(query, d).cast<double>();
  Eigen::Map<Vector>(sum_.data() + g * d, d) += q;
  Eigen::Map<Matrix>(outer_.data() + g * d * d, d, d).noalias() += q * q.transpose();
}

void QueryStatistics::look_ahead(int first, int horizon) {
  if (count_ == 0) return;
  const Eigen::Index d = model_.head_dim;
  const Matrix r = mean_rotation(model_, first, horizon);
  for (int g = 0; g < group_; ++g) {
    const Vector mean = Eigen::Map<const Vector>(sum_.data() + g * d, d) / count_;
    const Matrix covariance =
        Eigen::Map<const Matrix>(outer_.data() + g * d * d, d, d) / count_ - mean * mean.transpose();
    Eigen::Map<Eigen::VectorXf>(mean_.data() + g * d, d) = (r * mean).cast<float>();
    Eigen::Map<Eigen::Matrix<float, -1, -1, Eigen::RowMajor>>(covariance_.data() + g * d * d, d, d) =
        (r * covariance * r.transpose()).cast<float>();
  }
}

}  // namespace kv
