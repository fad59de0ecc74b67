// The output folder's runs.jsonl: one JSON object a line, appended when its run ends. Survives being killed at any
// moment: only a torn last line can be lost, and it is cut off when the folder is opened again.
#pragma once
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "experiments/point.hpp"

namespace kv {

using Row = nlohmann::ordered_json;

/// What resuming needs to know of a row.
struct RowState {
  std::string status;  // ok, error or skipped
  bool series = false;
  std::int64_t timing_repeats = 0;
};
using RowStates = std::map<std::string, RowState>;  // by run

/// The rows of DIR/runs.jsonl, without touching it; empty when there is none. Throws ConfigError naming a line that is
/// no row (a torn last line is passed over).
RowStates read_rows(const std::filesystem::path& dir);

/// The one writer of an output folder.
class Results {
 public:
  /// Creates `dir`, locks it against a second kvreplay, cuts off a torn last line. Throws ConfigError when it is locked
  /// or cannot be written.
  explicit Results(const std::filesystem::path& dir);
  ~Results();
  Results(const Results&) = delete;
  Results& operator=(const Results&) = delete;

  const RowStates& rows() const { return rows_; }

  /// Takes rows out, atomically.
  void drop(const std::set<std::string>& runs);

  /// Appends one row in one write and waits until it is on disk. Throws std::system_error.
  void append(const Row& row);

 private:
  std::filesystem::path file_;
  int lock_ = -1, out_ = -1;
  RowStates rows_;
};

/// Writes `text` to FILE.part and renames it, so that FILE is old or new but never half. Throws std::system_error.
void write_atomically(const std::filesystem::path& file, const std::string& text);

/// Whether `row` (null = none) makes running `point` needless: it is ok and has the series and timings asked for.
bool is_done(const Point& point, const RowState* row);

}  // namespace kv
