// A random trace in the temporary folder, opened; the file goes with the object.
#pragma once
#include <unistd.h>

#include "core/session.hpp"
#include "tests/synthetic.hpp"

namespace kv::test {

class MadeTrace {
 public:
  MadeTrace(const std::string& name, const Shape& shape, std::uint64_t seed, const Edit& edit = {})
      : session_(write_trace(name, shape, seed, edit)) {}
  ~MadeTrace() {
    std::error_code ignored;
    std::filesystem::remove(session_.header().file, ignored);
  }
  MadeTrace(const MadeTrace&) = delete;
  MadeTrace& operator=(const MadeTrace&) = delete;
  Session& session() { return session_; }

 private:
  Session session_;
};

}  // namespace kv::test
