#include "experiments/text_table.hpp"

#include <algorithm>

namespace kv {

std::string columns(const TextTable& table) {
  std::vector<std::size_t> width(table.front().size());
  for (const auto& row : table)
    for (std::size_t i = 0; i < row.size(); ++i) width[i] = std::max(width[i], row[i].size());
  std::string text;
  for (const auto& row : table) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) line.append(row[i]).append(width[i] - row[i].size() + 2, ' ');
    text.append(line, 0, line.find_last_not_of(' ') + 1).append(1, '\n');
  }
  return text;
}

}  // namespace kv
