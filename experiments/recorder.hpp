// What became of a point as a row on disk, whichever engine replayed it.
#pragma once
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <tuple>

#include "core/session.hpp"
#include "experiments/point.hpp"
#include "experiments/results.hpp"
#include "experiments/row.hpp"
#include "kernels/engine.hpp"

namespace kv {

/// Why a point has no good row.
struct Failure {
  std::string message;
  int code = 1;
};

/// What is left to say of a point whose row is on disk.
struct Recorded {
  std::string said;  // on its progress line
  std::optional<Failure> failure;
};

class Recorder {
 public:
  /// `threads` and `gpu` (the devices' name) are for the rows.
  Recorder(Results& results, std::filesystem::path dir, int threads, std::string gpu);

  /// Appends the row of a point that ended, an error's too. `session` is its trace's.
  Recorded record(const Point& point, Session& session, const DeviceOutcome& outcome);

 private:
  std::string add_measured(Row& row, const Point& point, Session& session, const DeviceOutcome& outcome);
  /// The noise floor of the point's measured queries, computed at the first call for them: by its own engine.
  const NoiseFloor& floor_of(const Point& point, Session& session, const DeviceOutcome& outcome);
  void save_series(const Point& point, const TraceHeader& header, const ReplayResult& result) const;

  Results& results_;
  std::filesystem::path dir_;
  int threads_;
  std::string gpu_;
  std::map<std::tuple<std::string, std::string, std::string>, NoiseFloor> floors_;  // by trace, measure and backend
};

}  // namespace kv
