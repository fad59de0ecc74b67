// From the devices' threads to the caller's.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>

#include "kernels/engine.hpp"

namespace kv {

/// Outcomes on their way from the devices' threads to the caller's.
class Outbox {
 public:
  void put(std::size_t point, DeviceOutcome outcome) {
    const std::lock_guard lock(mutex_);
    ready_.emplace_back(point, std::move(outcome));
    changed_.notify_one();
  }
  void worker_ended() {
    const std::lock_guard lock(mutex_);
    ++ended_;
    changed_.notify_one();
  }
  /// The next outcome; empty when all `workers` have ended.
  std::optional<std::pair<std::size_t, DeviceOutcome>> take(std::size_t workers) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !ready_.empty() || ended_ == workers; });
    if (ready_.empty()) return std::nullopt;
    auto first = std::move(ready_.front());
    ready_.pop_front();
    return first;
  }
  void stop() { stopped_ = true; }
  bool stopped() const { return stopped_; }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::pair<std::size_t, DeviceOutcome>> ready_;
  std::size_t ended_ = 0;
  std::atomic<bool> stopped_ = false;
};

}  // namespace kv
