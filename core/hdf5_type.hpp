// Internal to hdf5*.cpp: stored types and error texts in terms of raw HDF5 identifiers.
#pragma once
#include <cstdint>
#include <string>

#include "core/hdf5.hpp"

namespace kv::h5 {

/// HDF5's innermost reason for the call that just failed, as " (HDF5: ...)"; must be asked before any other call.
std::string reason();

/// Which of our types `type` is, exactly.
Type classify(std::int64_t type);

/// `type` in words: "bfloat16", "big-endian float32", "uint16", "compound".
std::string describe(std::int64_t type);

constexpr int deflate_level = 1;  // of the chunks that we write

/// A new HDF5 type of that kind. bfloat16 and float16 are self-describing floats: h5dump and h5py print true numbers.
Id make_type(Type type);

/// A fixed-length string without its padding.
std::string trimmed(const std::string& value, std::int64_t type);

}  // namespace kv::h5
