#include "experiments/progress.hpp"

#include <fmt/core.h>
#include <unistd.h>

namespace kv {

std::string human_bytes(double bytes) {
  const char* unit = "B";
  for (const char* larger : {"KiB", "MiB", "GiB", "TiB"}) {
    if (bytes < 1024) break;
    bytes /= 1024;
    unit = larger;
  }
  return *unit == 'B' ? fmt::format("{:.0f} B", bytes) : fmt::format("{:.1f} {}", bytes, unit);
}

std::string human_seconds(double seconds) {
  if (seconds < 9.95) return fmt::format("{:.2f} s", seconds);
  const auto whole = static_cast<long long>(seconds + 0.5);
  if (whole < 120) return fmt::format("{} s", whole);
  if (whole < 7200) return fmt::format("{} min {} s", whole / 60, whole % 60);
  return fmt::format("{} h {} min", whole / 3600, whole % 3600 / 60);
}

void say(std::FILE* out, const std::string& text) {
  std::fputs(text.c_str(), out);
  std::fflush(out);
}

Progress::Progress(std::size_t total, std::FILE* out) : out_(out), terminal_(isatty(fileno(out)) == 1), total_(total) {
  draw_bar(0);
}

Progress::~Progress() { clear_bar(); }

void Progress::finished(const std::string& text, double seconds) {
  ++done_;
  seconds_ += seconds;
  const double left = seconds_ / static_cast<double>(done_) * static_cast<double>(total_ - done_);
  clear_bar();
  say(out_, fmt::format("[{}/{}] {} {} eta {}\n", done_, total_, text, human_seconds(seconds), human_seconds(left)));
  draw_bar(left);
}

void Progress::clear_bar() {
  if (terminal_) say(out_, "\r\033[K");
}

void Progress::draw_bar(double left) {
  if (!terminal_ || done_ == total_) return;
  constexpr std::size_t width = 40;
  const std::size_t full = done_ * width / total_;
  say(out_, fmt::format("{}{} {}/{}{}", std::string(full, '#'), std::string(width - full, '.'), done_, total_,
                        done_ == 0 ? "" : " eta " + human_seconds(left)));
}

}  // namespace kv
