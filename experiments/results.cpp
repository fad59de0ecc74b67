#include "experiments/results.hpp"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/file.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>

#include "core/error.hpp"
#include "experiments/config.hpp"

namespace kv {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

[[noreturn]] void fail_to_write(const fs::path& file) {
  throw ConfigError(fmt::format("--out: cannot write {}: {}", file.string(), std::strerror(errno)));
}

/// The whole file, "" when there is none.
std::string read_text(const fs::path& file) {
  std::error_code ignored;
  if (!fs::exists(file, ignored)) return "";
  std::ifstream in(file, std::ios::binary);
  if (!in || !fs::is_regular_file(file, ignored))
    throw ConfigError(fmt::format("--out: {} is not a file that can be read; choose another --out", file.string()));
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

bool is_row(const json& row) { return row.is_object() && row.contains("run") && row["run"].is_string(); }

/// Calls `visit(line without newline, row)` for each whole row of `text`; returns how many bytes they take. A last line
/// that was torn by a kill is not visited; anything else that is no row is an error.
std::size_t visit_rows(const std::string& file, const std::string& text,
                       const std::function<void(const std::string&, const json&)>& visit) {
  std::size_t begin = 0;
  for (int number = 1; begin < text.size(); ++number) {
    const std::size_t newline = text.find('\n', begin);
    const std::string line = text.substr(begin, newline - begin);
    const json row = json::parse(line, nullptr, false);
    if (is_row(row)) {
      visit(line, row);
    } else if (newline == std::string::npos) {
      return begin;
    } else if (!line.empty()) {
      fail({file, number}, "is not a row of kvreplay; remove the line or choose another --out");
    }
    begin = newline == std::string::npos ? text.size() : newline + 1;
  }
  return begin;
}

RowState state_of(const json& row) {
  RowState state;
  const auto status = row.find("status"), series = row.find("series"), repeats = row.find("timing.repeats");
  if (status != row.end() && status->is_string()) state.status = status->get<std::string>();
  state.series = series != row.end() && series->is_boolean() && series->get<bool>();
  state.timing_repeats = repeats != row.end() && repeats->is_number_integer() ? repeats->get<std::int64_t>() : 0;
  const auto error = row.find("error"), code = row.find("error.code");
  if (error != row.end() && error->is_string()) state.error = error->get<std::string>();
  if (code != row.end() && code->is_number_integer()) state.error_code = code->get<int>();
  return state;
}

void write_all(int fd, const std::string& text, const fs::path& file) {
  for (std::size_t done = 0; done < text.size();) {
    const ssize_t n = ::write(fd, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_to_write(file);
    done += static_cast<std::size_t>(n);
  }
  if (::fsync(fd) != 0) fail_to_write(file);
}

}  // namespace

RowStates read_rows(const fs::path& dir) {
  RowStates rows;
  const fs::path file = dir / "runs.jsonl";
  visit_rows(file.string(), read_text(file),
             [&](const std::string&, const json& row) { rows[row["run"].get<std::string>()] = state_of(row); });
  return rows;
}

Results::Results(const fs::path& dir) : file_(dir / "runs.jsonl") {
  std::error_code error;
  fs::create_directories(dir, error);
  if (error) throw ConfigError(fmt::format("--out: cannot create {}: {}", dir.string(), error.message()));
  lock_ = ::open((dir / ".lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (lock_ < 0) throw ConfigError(fmt::format("--out: cannot write in {}: {}", dir.string(), std::strerror(errno)));
  if (::flock(lock_, LOCK_EX | LOCK_NB) != 0) {
    ::close(lock_);
    throw ConfigError(fmt::format("--out: another kvreplay is writing to {}", dir.string()));
  }
  try {
    const std::string text = read_text(file_);
    const std::size_t whole = visit_rows(file_.string(), text, [&](const std::string&, const json& row) {
      rows_[row["run"].get<std::string>()] = state_of(row);
      ++lines_;
    });
    out_ = ::open(file_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (out_ < 0 || ::ftruncate(out_, static_cast<off_t>(whole)) != 0) fail_to_write(file_);
    if (whole > 0 && text[whole - 1] != '\n') write_all(out_, "\n", file_);  // killed between a row and its newline
  } catch (...) {
    if (out_ >= 0) ::close(out_);
    ::close(lock_);
    throw;
  }
}

Results::~Results() {
  ::close(out_);
  ::close(lock_);
}

void Results::append(const Row& row) {
  write_all(out_, row.dump(-1, ' ', false, Row::error_handler_t::replace) + "\n", file_);
  rows_[row["run"].get<std::string>()] = state_of(row);
  ++lines_;
}

void Results::compact() {
  if (lines_ == rows_.size()) return;
  const std::string text = read_text(file_);
  std::map<std::string, std::size_t> last;  // line of each run
  std::size_t line_number = 0;
  visit_rows(file_.string(), text,
             [&](const std::string&, const json& row) { last[row["run"].get<std::string>()] = line_number++; });
  std::string kept;
  line_number = 0;
  visit_rows(file_.string(), text, [&](const std::string& line, const json& row) {
    if (last.at(row["run"].get<std::string>()) == line_number++) kept += line + "\n";
  });
  write_atomically(file_, kept);
  const int fresh = ::open(file_.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
  if (fresh < 0) fail_to_write(file_);
  ::close(out_);
  out_ = fresh;
  lines_ = rows_.size();
}

void write_atomically(const fs::path& file, const std::string& text) {
  const fs::path part = file.string() + ".part";
  const int fd = ::open(part.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) fail_to_write(part);
  std::error_code ignored;
  try {
    write_all(fd, text, part);
  } catch (...) {
    ::close(fd);
    fs::remove(part, ignored);
    throw;
  }
  ::close(fd);
  if (std::rename(part.c_str(), file.c_str()) != 0) fail_to_write(file);
}

bool is_done(const Point& point, const RowState* row) {
  return row != nullptr && row->status == "ok" && row->series >= point.keys.series &&
         row->timing_repeats >= point.keys.timing_repeats;
}

}  // namespace kv
