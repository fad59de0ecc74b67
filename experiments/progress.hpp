// One line per finished run, and on a terminal a bar below it.
#pragma once
#include <cstddef>
#include <cstdio>
#include <string>

namespace kv {

/// "12.3 KiB"
std::string human_bytes(double bytes);

/// "0.41 s", "38 s", "3 min 10 s", "2 h 5 min"
std::string human_seconds(double seconds);

/// Writes `text` and flushes. When nobody reads any more (`kvreplay run | head -1`) the sweep goes on all the same.
void say(std::FILE* out, const std::string& text);

class Progress {
 public:
  explicit Progress(std::size_t total, std::FILE* out = stdout);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Prints "[12/96] text 0.41 s eta 38 s". The time left is judged from the runs finished so far.
  void finished(const std::string& text, double seconds);

 private:
  void clear_bar();
  void draw_bar(double left);
  std::FILE* out_;
  bool terminal_;
  std::size_t total_, done_ = 0;
  double seconds_ = 0;
};

}  // namespace kv
