// Writes a `kvtrace/1` file layer by layer. The file is `NAME.part` until close() and so never looks complete before.
#pragma once
#include <filesystem>
#include <memory>
#include <span>

#include "core/trace.hpp"

namespace kv {

class TraceWriter {
 public:
  /// Starts `file` (as `file`.part) with everything of `header` but `layers`, `file`, `version` and `content_sha256`.
  /// Throws TraceError when the place cannot be written or the header is inconsistent.
  TraceWriter(const std::filesystem::path& file, const TraceHeader& header);
  ~TraceWriter();  // without close() the .part file is removed

  /// Appends one layer, of a higher index than the one before; tensors are rounded to nearest even in header.dtype.
  /// Optional tensors are written when not empty. Throws TraceError when a shape does not fit the header or a value is
  /// not finite.
  void write_layer(const LayerInfo& info, const LayerTensors& tensors);

  /// Writes content_sha256 and complete = 1, then renames to the final name.
  void close();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kv
