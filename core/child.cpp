#include "core/child.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <exception>
#include <string_view>

#include "core/error.hpp"
#include "core/hdf5.hpp"

namespace kv {
namespace {

using Clock = std::chrono::steady_clock;

void write_all(int pipe, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = write(pipe, text.data(), text.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return;
    text.remove_prefix(static_cast<std::size_t>(written));
  }
}

/// A crash must be plain and quiet: no handlers of ours, no core file, no words of the C library on stderr.
void settle_in(pid_t parent) {
  h5::Lock::disable_in_child();
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1);  // it died before that took effect
  const rlimit no_core{0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  for (const int number : {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL}) signal(number, SIG_DFL);
#if !defined(__SANITIZE_ADDRESS__)
  const int null = open("/dev/null", O_WRONLY);
  if (null < 0) return;
  dup2(null, STDOUT_FILENO);
  dup2(null, STDERR_FILENO);
#endif
}

[[noreturn]] void run_and_exit(const std::function<std::string()>& work, int pipe) {
  std::string answer(1, '+');
  try {
    answer += work();
  } catch (const std::exception& error) {
    answer = '-';
    answer += error.what();
  } catch (...) {
    answer = "-unknown exception";
  }
  write_all(pipe, answer);
  _exit(0);
}

/// Everything the child writes until it closes the pipe; false when `deadline` comes first.
bool read_until(int pipe, Clock::time_point deadline, std::string& answer) {
  char buffer[4096];
  while (true) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    if (left <= 0) return false;
    pollfd waiting{pipe, POLLIN, 0};
    const int ready = poll(&waiting, 1, static_cast<int>(std::min<long long>(left, 1'000'000)));
    if (ready < 0 && errno != EINTR) return false;
    if (ready <= 0) continue;
    const ssize_t count = read(pipe, buffer, sizeof buffer);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return true;
    answer.append(buffer, static_cast<std::size_t>(count));
  }
}

int wait_for(pid_t child) {
  int status = 0;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) return 0;  // somebody ignores SIGCHLD: how it ended is lost
  return status;
}

}  // namespace

ChildOutcome run_in_child(const std::function<std::string()>& work, std::chrono::milliseconds limit) {
  int ends[2];
  pid_t child = -1;
  {
    const h5::Lock lock;  // also keeps the write end out of children that other threads fork here
    if (pipe2(ends, O_CLOEXEC) != 0)
      throw TraceError(fmt::format("no pipe to a child process: {}", std::strerror(errno)));
    const pid_t parent = getpid();
    child = fork();
    if (child == 0) {
      settle_in(parent);
      close(ends[0]);
      run_and_exit(work, ends[1]);
    }
    close(ends[1]);
  }
  if (child < 0) {
    close(ends[0]);
    throw TraceError(fmt::format("no child process: {}", std::strerror(errno)));
  }
  std::string answer;
  const bool in_time = read_until(ends[0], Clock::now() + limit, answer);
  close(ends[0]);
  if (!in_time) kill(child, SIGKILL);
  const int status = wait_for(child);
  const double seconds = std::chrono::duration<double>(limit).count();
  if (!in_time) return {ChildOutcome::died, fmt::format("hung (no answer in {:.4g} s)", seconds)};
  if (WIFSIGNALED(status)) return {ChildOutcome::died, fmt::format("crashed (signal {})", WTERMSIG(status))};
  if (answer.empty()) return {ChildOutcome::died, fmt::format("crashed (exit status {})", WEXITSTATUS(status))};
  return {answer[0] == '+' ? ChildOutcome::returned : ChildOutcome::threw, answer.substr(1)};
}

}  // namespace kv
