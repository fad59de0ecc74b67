#include "experiments/series.hpp"

#include <algorithm>
#include <span>
#include <vector>

#include "core/hdf5.hpp"
#include "core/metrics.hpp"

namespace kv {
namespace {

std::vector<std::int64_t> widen(const std::vector<int>& values) { return {values.begin(), values.end()}; }

/// Rows of different length as one array, padded.
std::vector<std::int64_t> pad(const std::vector<std::vector<std::int64_t>>& rows, std::size_t width,
                              std::int64_t padding) {
  std::vector<std::int64_t> all(rows.size() * width, padding);
  for (std::size_t i = 0; i < rows.size(); ++i)
    std::ranges::copy(rows[i], all.begin() + static_cast<std::ptrdiff_t>(i * width));
  return all;
}

template <class T>
void put(h5::Group& group, const char* name, const std::vector<T>& values, const h5::Shape& shape) {
  group.create(name, std::span<const T>(values), shape);
}

void put_final(h5::File& file, const ReplayResult& result) {
  std::size_t width = 1;
  for (const auto& row : result.final_position) width = std::max(width, row.size());
  const h5::Shape shape{static_cast<std::uint64_t>(result.layers), static_cast<std::uint64_t>(result.kv_heads), width};
  h5::Group group = file.create_group("final");
  put(group, "position", pad(result.final_position, width, -1), shape);
  put(group, "multiplicity", pad(result.final_multiplicity, width, 0), shape);
}

}  // namespace

void write_series(const std::filesystem::path& file, const std::string& run, const TraceHeader& header,
                  const ReplayResult& result) {
  const std::filesystem::path part = file.string() + ".part";
  h5::File out = h5::File::create(part, false);
  const auto layers = static_cast<std::uint64_t>(result.layers), steps = std::uint64_t{result.step_token.size()};
  const h5::Shape queries{layers, static_cast<std::uint64_t>(result.query_heads), result.measured.size()};
  put(out, "error2", result.error2, queries);
  put(out, "output2", result.output2, queries);
  put(out, "rel_l2", relative_errors(result), queries);
  put(out, "lost_mass", result.lost_mass, queries);
  put(out, "measured", widen(result.measured), {result.measured.size()});
  put(out, "slots", widen(result.slots), {layers, static_cast<std::uint64_t>(result.kv_heads), steps});
  put(out, "step_token", widen(result.step_token), {steps});
  put_final(out, result);
  std::vector<std::int64_t> indices;
  for (const LayerInfo& layer : header.layers) indices.push_back(layer.index);
  put(out, "layer", indices, {layers});
  out.set_text("run", run);
  out.close();
  std::filesystem::rename(part, file);
}

}  // namespace kv
