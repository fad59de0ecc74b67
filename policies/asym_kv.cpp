// AsymKV: adjacent keys join where the next block needs them least, each channel weighted by its squared gradient of
// the block's loss; values add up and slots count their tokens (kvslimmer-asymkv 2; with a surrogate gradient it is not
// AsymKV's own weights, and every row says so).
#include "policies/adjacent_links.hpp"

namespace {

struct AsymKV : kv::AdjacentLinks {
  static constexpr kv::PolicyDoc doc{"asym_kv", "AsymKV", "Cui and Xu 2025, arXiv:2506.05410",
                                     "joins adjacent slots; keys weighted per channel by squared gradients"};
  enum class Gradient { recorded, surrogate } gradient = Gradient::recorded;
  void describe(auto& field) {
    field("gradient", gradient, kv::Choices{"recorded", "surrogate"},
          "of the model's loss, recorded as `e`; or of the squared attention outputs, which needs no recording");
    describe_links(field);
  }

  KV_HD kv::Traits traits() const {
    kv::Traits traits = link_traits();
    traits.key_gradient = gradient == Gradient::recorded ? kv::KeyGradient::recorded : kv::KeyGradient::surrogate;
    return traits;
  }
  KV_HD float score_in(auto& head, int slot) const {
    const int next = head.next(slot);
    const int tokens = head.multiplicity(slot) + (next < 0 ? 0 : head.multiplicity(next));
    return AdjacentLinks::score_in(head, slot) * static_cast<float>(tokens);
  }
  KV_HD float key_weight(auto& head, int slot, int channel) const {
    const float g = head.key_gradient(slot)[channel];
    return g * g + 1e-30f;  // without any gradient: the plain mean
  }
  KV_HD kv::Fold on_merge(auto& head, int victim) const { return link_fold(head, victim); }
};
KV_REGISTER(AsymKV);

}  // namespace
