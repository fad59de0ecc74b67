// Words of a trace on their way to the device: through pinned memory, one piece copied while the next is filled.
#pragma once
#include <cstddef>
#include <span>

#include "core/dtype.hpp"
#include "kernels/streams.hpp"

namespace kv {

/// Copies in a stream of its own. One thread at a time. Throws CudaError.
class Upload {
 public:
  /// Takes the words to device memory at `to`: they may be forgotten when this returns, and are there after wait().
  void copy(std::span<const std::byte> words, void* to);

  /// The same for words of type `from` that become float32.
  void widen(std::span<const std::byte> words, Dtype from, float* to);

  cudaStream_t stream() const { return stream_.id; }  // for kernels that go on with what was copied
  void wait() { KV_CUDA_TRY(cudaStreamSynchronize(stream_.id)); }

 private:
  struct Piece {
    Piece();
    ~Piece() { cudaFreeHost(memory); }
    Piece(const Piece&) = delete;
    Piece& operator=(const Piece&) = delete;
    std::byte* memory = nullptr;  // pinned
    Event taken;                  // by the device: free again
  };
  template <class Take>
  void send(std::span<const std::byte> words, Take take);

  Stream stream_;
  Piece pieces_[2];
  std::size_t turn_ = 0;
};

}  // namespace kv
