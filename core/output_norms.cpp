#include "core/output_norms.hpp"

#include <tbb/parallel_for.h>

#include <Eigen/Core>

namespace kv {

std::vector<float> output_norms(const TraceHeader& trace, const PreparedLayer& layer) {
  using Rows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const ModelInfo& m = trace.model;
  const Eigen::Map<const Rows> wo(layer.tensors.wo.data(), m.hidden_size, m.query_heads * m.value_dim);
  std::vector<float> norms(static_cast<std::size_t>(m.kv_heads) * static_cast<std::size_t>(trace.tokens));
  tbb::parallel_for(0, m.kv_heads, [&](int head) {
    const Eigen::Index tokens = trace.tokens, dv = m.value_dim;
    const Eigen::Map<const Rows> values(layer.tensors.v.data() + head * tokens * dv, tokens, dv);
    Eigen::Map<Eigen::VectorXf> out(norms.data() + head * tokens, tokens);
    out.setZero();
    for (int g = 0; g < m.group(); ++g)
      for (Eigen::Index first = 0; first < tokens; first += 256) {  // a tile of mapped values, never all of them
        const Eigen::Index n = std::min<Eigen::Index>(256, tokens - first);
        const Rows mapped = values.middleRows(first, n) * wo.middleCols((head * m.group() + g) * dv, dv).transpose();
        out.segment(first, n) += mapped.rowwise().lpNorm<1>() / static_cast<float>(m.group());
      }
  });
  return norms;
}

}  // namespace kv
