// The layers of a trace on their way to one device.
#pragma once
#include <future>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/device_layer.hpp"
#include "kernels/outbox.hpp"

namespace kv {

/// A session that several devices read from; what is not for any thread goes under the mutex.
struct SharedSession {
  Session& session;
  std::mutex mutex;
};

/// What is read of every layer beside its tensors.
struct LayerNeeds {
  bool norms = false;                       // what policies know of W_o
  std::vector<std::vector<int>> floors_of;  // lists of tokens whose recorded outputs are wanted
};

/// Gives the layers in order, in pieces. With `ahead` the next piece is read and copied, by a thread of its own, while
/// the present one replays; otherwise when it is asked for. Borrows all that it is made from.
class LayerFeed {
 public:
  using Layers = std::vector<std::unique_ptr<DeviceLayer>>;

  LayerFeed(const DeviceTrace& trace, SharedSession& session, const Outbox& outbox, LayerNeeds needs, int at_once,
            bool ahead);

  /// The next piece; no longer whole once the outbox says stop. Throws CudaError, TraceError.
  Layers next();

  /// Layers that are on their way now.
  std::size_t under_way() const { return ahead_ ? static_cast<std::size_t>(std::min(at_once_, layers_ - first_)) : 0; }

 private:
  std::future<Layers> start();
  Layers load(int first, int last);

  const DeviceTrace& trace_;
  SharedSession& session_;
  const Outbox& outbox_;
  const LayerNeeds needs_;
  const int layers_, at_once_;
  const bool ahead_;
  int device_ = 0, first_ = 0;  // first_: of the next piece
  Upload upload_;
  std::future<Layers> next_;
};

}  // namespace kv
