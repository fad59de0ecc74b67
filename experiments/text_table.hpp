// Columns of text for the terminal.
#pragma once
#include <string>
#include <vector>

namespace kv {

/// Rows of equally many cells; the first is the heading.
using TextTable = std::vector<std::vector<std::string>>;

/// One line a row, cells padded to their column's width, no blanks at the end.
std::string columns(const TextTable& table);

}  // namespace kv
