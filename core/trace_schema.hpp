// Internal to trace*.cpp: the layout of `kvtrace/1`, shared by reader and writer so that neither can drift.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/hdf5.hpp"
#include "core/trace.hpp"

namespace kv {

inline constexpr const char* segment_names = "system,context,question,answer,generated,padding";

/// One dataset of a layer: what it must look like given the header.
struct LayerDataset {
  const char* name;
  h5::Shape shape;
  Dtype dtype;
  bool present;
  bool hashed;  // part of content_sha256
};

/// All datasets that a layer can hold, in file order; q, k, v come first, in the order of content_sha256.
std::vector<LayerDataset> layer_datasets(const TraceHeader& header, const LayerInfo& info);

h5::Type stored_type(Dtype dtype);

/// Ranges of counts and constants, and that they fit each other. Throws TraceError "FILE: OBJECT: problem".
void check_constants(const TraceHeader& header);

/// Lengths and values of the token arrays; `position` must be there and strictly increase.
void check_tokens(const TraceHeader& header);

/// Ranges of one layer's description, `q_index` included.
void check_layer(const TraceHeader& header, const LayerInfo& info);

/// Reads all but the tensors, and checks version, completeness, shapes, types and storage of everything.
TraceHeader read_header(const h5::File& file);

/// Reads every tensor, checks that its values are finite and that content_sha256, where given, is theirs; returns it.
std::string check_content(const h5::File& file, const TraceHeader& header);

}  // namespace kv
