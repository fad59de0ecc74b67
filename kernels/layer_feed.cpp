#include "kernels/layer_feed.hpp"

#include <algorithm>

namespace kv {

LayerFeed::LayerFeed(const DeviceTrace& trace, SharedSession& session, const Outbox& outbox, LayerNeeds needs,
                     int at_once, bool ahead)
    : trace_(trace),
      session_(session),
      outbox_(outbox),
      needs_(std::move(needs)),
      layers_(static_cast<int>(session.session.header().layers.size())),
      at_once_(at_once),
      ahead_(ahead) {
  KV_CUDA_TRY(cudaGetDevice(&device_));
  next_ = start();
}

std::future<LayerFeed::Layers> LayerFeed::start() {
  return std::async(ahead_ ? std::launch::async : std::launch::deferred, &LayerFeed::load, this, first_,
                    std::min(first_ + at_once_, layers_));
}

LayerFeed::Layers LayerFeed::next() {
  Layers layers = next_.get();
  first_ = std::min(first_ + at_once_, layers_);
  if (first_ < layers_) next_ = start();
  return layers;
}

LayerFeed::Layers LayerFeed::load(int first, int last) {
  KV_CUDA_TRY(cudaSetDevice(device_));  // the thread may be a new one
  Layers layers;
  for (int l = first; l < last && !outbox_.stopped(); ++l) {
    std::shared_ptr<const std::vector<float>> norms;
    if (needs_.norms) {
      const std::lock_guard lock(session_.mutex);
      norms = session_.session.norms(l);
    }
    layers.push_back(std::make_unique<DeviceLayer>(trace_, session_.session, l, norms.get(), upload_));
    if (!needs_.floors_of.empty()) layers.back()->read_outputs(session_.session, l, needs_.floors_of);
  }
  return layers;
}

}  // namespace kv
