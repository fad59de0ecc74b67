// Synthetic traces hold what their settings ask for.
#include "core/synthetic.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "core/error.hpp"

namespace kv {
namespace {

constexpr Synthetic small{
    .layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 64, .tokens = 400, .prompt_tokens = 300, .rope = false};

double dot(const std::vector<float>& x, std::size_t a, const std::vector<float>& y, std::size_t b, std::size_t d) {
  double sum = 0;
  for (std::size_t c = 0; c < d; ++c) sum += static_cast<double>(x[a * d + c]) * static_cast<double>(y[b * d + c]);
  return sum;
}

/// Attention that query `t` of head 0 gives to tokens [0, t].
std::vector<double> attention(const LayerTensors& x, const Synthetic& s, std::size_t t) {
  const auto d = static_cast<std::size_t>(s.head_dim);
  std::vector<double> p;
  double sum = 0;
  for (std::size_t k = 0; k <= t; ++k)
    p.push_back(std::exp(dot(x.q, t, x.k, k, d) / std::sqrt(double(d)))), sum += p.back();
  for (double& v : p) v /= sum;
  return p;
}

TEST(Synthetic, IsTheSameForEqualSeedsAndAnotherForOthers) {
  const LayerTensors a = synthetic_layer(small, 0), b = synthetic_layer(small, 0), other = synthetic_layer(small, 1);
  EXPECT_EQ(a.k, b.k);
  EXPECT_EQ(a.q, b.q);
  EXPECT_NE(a.k, other.k);
  Synthetic seeded = small;
  seeded.seed = 1;
  EXPECT_NE(a.k, synthetic_layer(seeded, 0).k);
  Synthetic longer = small;  // a longer trace begins like a shorter one
  longer.tokens = 500;
  EXPECT_EQ(a.k[5], synthetic_layer(longer, 0).k[5]);
}

TEST(Synthetic, SinksAndHeavyHittersGetAttention) {
  Synthetic s = small;
  s.heavy = 0.05;
  const LayerTensors x = synthetic_layer(s, 0);
  Synthetic plain = s;
  plain.sinks = 0, plain.heavy = 0;
  const LayerTensors none = synthetic_layer(plain, 0);
  double sinks = 0, sinks_none = 0, top = 0, top_none = 0;
  for (const std::size_t t : {150u, 250u, 399u}) {
    std::vector<double> p = attention(x, s, t), q = attention(none, plain, t);
    for (std::size_t k = 0; k < 4; ++k) sinks += p[k] / 3, sinks_none += q[k] / 3;
    std::sort(p.begin() + 4, p.end()), std::sort(q.begin(), q.end());
    for (std::size_t k = 1; k <= 20; ++k) top += p[p.size() - k] / 3, top_none += q[q.size() - k] / 3;
  }
  EXPECT_GT(sinks, 0.3);
  EXPECT_LT(sinks_none, 0.1);
  EXPECT_GT(top / (1 - sinks), top_none) << "heavy hitters take more than the best of ordinary tokens";
}

TEST(Synthetic, NeighboursLookAlikeAndOutlierChannelsHaveAMean) {
  Synthetic s = small;
  s.outliers = 0, s.heavy = 0, s.sinks = 0;
  const LayerTensors x = synthetic_layer(s, 0);
  double near = 0, far = 0;
  for (std::size_t t = 0; t + 50 < 400; ++t) near += dot(x.k, t, x.k, t + 1, 64), far += dot(x.k, t, x.k, t + 50, 64);
  EXPECT_NEAR(near / 350 / 64, s.correlation, 0.05);
  EXPECT_NEAR(far / 350 / 64, 0, 0.1);
  s.outliers = 3;
  const LayerTensors y = synthetic_layer(s, 0);
  for (std::size_t c = 0; c < 4; ++c) {
    double mean = 0;
    for (std::size_t t = 0; t < 400; ++t) mean += static_cast<double>(y.k[t * 64 + c] - x.k[t * 64 + c]) / 400;
    EXPECT_NEAR(mean, c < 3 ? 6 : 0, 1e-3) << c;
  }
}

TEST(Synthetic, RefusesImpossibleShapes) {
  Synthetic s = small;
  s.query_heads = 3;
  EXPECT_THROW(synthetic_header(s), ConfigError);
  s = small, s.prompt_tokens = 401;
  EXPECT_THROW(synthetic_header(s), ConfigError);
  s = small, s.rope = true, s.head_dim = 3;
  EXPECT_THROW(synthetic_header(s), ConfigError);
}

}  // namespace
}  // namespace kv
