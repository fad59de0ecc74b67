// A child may return, throw, crash, hang or leave: the parent always learns which.
#include "core/child.hpp"

#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <stdexcept>

namespace kv {
namespace {

using std::chrono::seconds;

TEST(Child, ReturnsTexts) {
  const ChildOutcome outcome = run_in_child([] { return std::string(200'000, 'x'); }, seconds(20));
  EXPECT_EQ(outcome.kind, ChildOutcome::returned);
  EXPECT_EQ(outcome.text, std::string(200'000, 'x'));
  EXPECT_EQ(run_in_child([] { return std::string(); }, seconds(20)).kind, ChildOutcome::returned);
}

TEST(Child, PassesMessagesOn) {
  const ChildOutcome outcome = run_in_child([]() -> std::string { throw std::runtime_error("no luck"); }, seconds(20));
  EXPECT_EQ(outcome.kind, ChildOutcome::threw);
  EXPECT_EQ(outcome.text, "no luck");
}

TEST(Child, SurvivesCrashes) {
  for (const int number : {SIGSEGV, SIGABRT, SIGKILL}) {
    const ChildOutcome outcome = run_in_child(
        [number] {
          raise(number);
          return std::string();
        },
        seconds(20));
    EXPECT_EQ(outcome.kind, ChildOutcome::died);
    EXPECT_EQ(outcome.text, "crashed (signal " + std::to_string(number) + ")");
  }
  const ChildOutcome outcome = run_in_child(
      [] {
        _exit(7);
        return std::string();
      },
      seconds(20));
  EXPECT_EQ(outcome.text, "crashed (exit status 7)");
}

TEST(Child, StopsWhatHangs) {
  const auto before = std::chrono::steady_clock::now();
  const ChildOutcome outcome = run_in_child(
      [] {
        while (true) pause();
        return std::string();
      },
      std::chrono::milliseconds(200));
  EXPECT_EQ(outcome.kind, ChildOutcome::died);
  EXPECT_EQ(outcome.text, "hung (no answer in 0.2 s)");
  EXPECT_LT(std::chrono::steady_clock::now() - before, seconds(10));
}

}  // namespace
}  // namespace kv
