// One attention output against another, in double.
#pragma once
#include <cmath>
#include <limits>

namespace kv {

/// |got - full|^2, |full|^2 and 1 - cos(got, full) of one query; the cosine is NaN when either is zero.
struct Comparison {
  double error2 = 0, output2 = 0, cosine = std::numeric_limits<double>::quiet_NaN();

  Comparison(const float* got, const float* full, int dim) {
    double dot = 0, got2 = 0;
    for (int c = 0; c < dim; ++c) {
      const double g = static_cast<double>(got[c]), f = static_cast<double>(full[c]);
      error2 += (g - f) * (g - f), output2 += f * f, got2 += g * g, dot += g * f;
    }
    if (got2 > 0 && output2 > 0) cosine = 1 - dot / std::sqrt(got2 * output2);
  }
};

}  // namespace kv
