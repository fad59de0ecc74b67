#include "kernels/upload.hpp"

#include <cstring>

#include "kernels/unit_kernels.hpp"

namespace kv {
namespace {

constexpr std::size_t piece_bytes = std::size_t{16} << 20;  // whole elements of any type

}  // namespace

Upload::Piece::Piece() { KV_CUDA_TRY(cudaMallocHost(&memory, piece_bytes)); }

/// `take(memory, first byte, bytes)` tells the device to take a piece.
template <class Take>
void Upload::send(std::span<const std::byte> words, Take take) {
  for (std::size_t first = 0; first < words.size(); first += piece_bytes) {
    const std::size_t bytes = std::min(piece_bytes, words.size() - first);
    Piece& piece = pieces_[turn_++ % 2];
    KV_CUDA_TRY(cudaEventSynchronize(piece.taken.id));
    std::memcpy(piece.memory, words.data() + first, bytes);
    take(piece.memory, first, bytes);
    piece.taken.record(stream_.id);
  }
}

void Upload::copy(std::span<const std::byte> words, void* to) {
  send(words, [&](const std::byte* memory, std::size_t first, std::size_t bytes) {
    KV_CUDA_TRY(cudaMemcpyAsync(static_cast<char*>(to) + first, memory, bytes, cudaMemcpyHostToDevice, stream_.id));
  });
}

void Upload::widen(std::span<const std::byte> words, Dtype from, float* to) {
  const std::size_t size = size_of(from);
  send(words, [&](const std::byte* memory, std::size_t first, std::size_t bytes) {
    widen_words(memory, from, to + first / size, bytes / size, stream_.id);  // read where it lies, over the bus
  });
}

}  // namespace kv
