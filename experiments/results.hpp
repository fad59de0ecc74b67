// The output folder's runs.jsonl: one JSON object a line, appended when its run ends. Of rows of one run the last
// counts, so that a row is there until its successor is. Survives being killed at any moment: only a torn last line can
// be lost, and it is cut off when the folder is opened again.
#pragma once
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "experiments/point.hpp"

namespace kv {

using Row = nlohmann::ordered_json;

/// What resuming needs to know of a row.
struct RowState {
  std::string status;  // ok, error or skipped
  bool series = false;
  std::int64_t timing_repeats = 0;
  std::string error{};  // what a failed row says
  int error_code = 1;   // the exit code that goes with it
};
using RowStates = std::map<std::string, RowState>;  // by run

/// The rows of DIR/runs.jsonl, without touching it; empty when there is none. Throws ConfigError naming a line that is
/// no row (a torn last line is passed over), or a runs.jsonl that is no file.
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

  /// Appends one row in one write and waits until it is on disk. Throws ConfigError when it cannot be written.
  void append(const Row& row);

  /// Takes out the rows that later ones have replaced, atomically.
  void compact();

 private:
  std::filesystem::path file_;
  int lock_ = -1, out_ = -1;
  RowStates rows_;
  std::size_t lines_ = 0;  // more than rows_ when some were replaced
};

/// Writes `text` to FILE.part and renames it, so that FILE is old or new but never half. Throws ConfigError when it
/// cannot be written.
void write_atomically(const std::filesystem::path& file, const std::string& text);

/// Whether `row` (null = none) makes running `point` needless: it is ok and has the series and timings asked for.
bool is_done(const Point& point, const RowState* row);

}  // namespace kv
