// What makes two traces the same for a run id: not only q, k and v, but all that can change a number of a row.
#pragma once
#include <string>

#include "core/trace.hpp"

namespace kv {

/// SHA-256, in hex, over the content of q, k, v, sink_logit, wo and o, the constants of the model and of every layer,
/// and the tokens' positions. Texts (dataset, token ids, producer) do not count. Reads the trace's file; throws
/// TraceError.
std::string trace_identity(const TraceHeader& header);

}  // namespace kv
