// Chunks of a dataset through their filters on all cores: HDF5 itself inflates on one at 150 MB/s, and deflates slower.
#include <hdf5.h>
#include <zlib.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "core/hdf5.hpp"
#include "core/hdf5_type.hpp"

namespace kv::h5 {
namespace {

using Bytes = std::vector<std::byte>;

const std::vector<H5Z_filter_t> our_filters{H5Z_FILTER_SHUFFLE, H5Z_FILTER_DEFLATE, H5Z_FILTER_FLETCHER32};

/// HDF5's Fletcher checksum, over big-endian 16-bit words.
std::uint32_t fletcher32(std::span<const std::byte> bytes) {
  const auto at = [&](std::size_t i) { return std::to_integer<std::uint32_t>(bytes[i]); };
  const auto fold = [](std::uint32_t sum) { return (sum & 0xffff) + (sum >> 16); };
  std::uint32_t first = 0, second = 0;
  for (std::size_t i = 0; i + 1 < bytes.size();) {
    const std::size_t end = std::min(i + 720, bytes.size() / 2 * 2);  // sums of 360 words cannot overflow
    for (; i < end; i += 2) first += at(i) << 8 | at(i + 1), second += first;
    first = fold(first), second = fold(second);
  }
  if (bytes.size() % 2 > 0) first = fold(first + (at(bytes.size() - 1) << 8)), second = fold(second + first);
  return fold(second) << 16 | fold(first);
}

bool undo_fletcher32(Bytes& bytes) {
  std::uint32_t stored = 0;
  if (bytes.size() < sizeof stored) return false;
  const std::size_t size = bytes.size() - sizeof stored;
  std::memcpy(&stored, bytes.data() + size, sizeof stored);
  bytes.resize(size);
  return fletcher32(bytes) == stored;
}

bool undo_deflate(Bytes& bytes, std::size_t chunk_bytes) {
  Bytes out(chunk_bytes);
  uLongf size = chunk_bytes;
  if (uncompress(reinterpret_cast<Bytef*>(out.data()), &size, reinterpret_cast<const Bytef*>(bytes.data()),
                 bytes.size()) != Z_OK)
    return false;
  out.resize(size);
  bytes = std::move(out);
  return true;
}

Bytes do_fletcher32(Bytes bytes) {
  const std::uint32_t sum = fletcher32(bytes);
  const auto* const words = reinterpret_cast<const std::byte*>(&sum);
  bytes.insert(bytes.end(), words, words + sizeof sum);
  return bytes;
}

/// Empty when it does not get smaller.
Bytes do_deflate(const Bytes& bytes) {
  Bytes out(compressBound(bytes.size()));
  uLongf size = out.size();
  if (compress2(reinterpret_cast<Bytef*>(out.data()), &size, reinterpret_cast<const Bytef*>(bytes.data()), bytes.size(),
                deflate_level) != Z_OK ||
      size >= bytes.size())
    return {};
  out.resize(size);
  return out;
}

/// A shuffled chunk is all first bytes of its elements, then all second ones, ...
template <std::size_t size, bool forth>
Bytes shuffled(const Bytes& bytes) {
  Bytes out(bytes.size());
  const std::size_t count = bytes.size() / size;
  for (std::size_t i = 0; i < count; ++i)
    for (std::size_t b = 0; b < size; ++b) {
      const std::size_t element = i * size + b, shuffle = b * count + i;
      if (forth)
        out[shuffle] = bytes[element];
      else
        out[element] = bytes[shuffle];
    }
  return out;
}

bool undo_shuffle(Bytes& bytes, std::size_t element_size) {
  if (element_size == 2)
    bytes = shuffled<2, false>(bytes);
  else if (element_size == 4)
    bytes = shuffled<4, false>(bytes);
  else
    return false;
  return true;
}

/// The dataset's filters in the order in which they were applied.
std::vector<H5Z_filter_t> filters_of(hid_t dataset) {
  const Id properties(H5Dget_create_plist(dataset));
  std::vector<H5Z_filter_t> filters;
  for (int i = 0; i < H5Pget_nfilters(properties.get()); ++i) {
    unsigned flags = 0, config = 0;
    std::size_t values = 0;
    filters.push_back(
        H5Pget_filter2(properties.get(), static_cast<unsigned>(i), &flags, &values, nullptr, 0, nullptr, &config));
  }
  return filters;
}

/// One chunk as a run of a block's bytes.
struct Run {
  std::vector<hsize_t> at;   // its first element in the dataset
  std::size_t first, bytes;  // within the block: as many of its elements as lie within the dataset
};

/// The chunks of the block [start, start + count); none when they are not whole, or no runs: one index of every axis
/// before some axis, all of every one behind it.
std::vector<Run> runs_of(const Shape& shape, const Shape& chunk, std::size_t element_size, const Shape& start,
                         const Shape& count) {
  if (chunk.empty()) return {};
  std::size_t axis = 0;
  while (axis + 1 < shape.size() && chunk[axis] == 1) ++axis;
  std::size_t inner = element_size;  // bytes of one index of that axis
  for (std::size_t i = axis + 1; i < shape.size(); ++i) {
    if (chunk[i] != shape[i] || count[i] != shape[i]) return {};
    inner *= shape[i];
  }
  const std::uint64_t end = start[axis] + count[axis];
  if (start[axis] % chunk[axis] != 0 || (end % chunk[axis] != 0 && end != shape[axis])) return {};
  std::vector<Run> runs;
  std::vector<hsize_t> at(start.begin(), start.end());
  for (std::size_t first = 0; at[0] < start[0] + count[0];) {
    const std::uint64_t rows = std::min<std::uint64_t>(chunk[axis], end - at[axis]);
    runs.push_back({at, first, rows * inner});
    first += rows * inner, at[axis] += rows;
    for (std::size_t i = axis; i > 0 && at[i] == start[i] + count[i]; --i) at[i] = start[i], ++at[i - 1];
  }
  return runs;
}

/// work(0), work(1), ... until one is false, which is what comes back then. By plain threads, not TBB's: a trace is first
/// walked in a forked child, to which TBB's do not come along. They know nothing of HDF5's lock and do not touch HDF5.
template <class Work>
bool on_all_cores(std::size_t count, const Work& work) {
  std::atomic<std::size_t> next = 0;
  std::atomic<bool> good = true;
  const auto share = [&] {
    for (std::size_t i = next++; i < count && good; i = next++)
      if (!work(i)) good = false;
  };
  std::vector<std::jthread> others;
  for (std::size_t i = 1; i < std::min<std::size_t>(std::thread::hardware_concurrency(), count); ++i)
    others.emplace_back(share);
  share();
  others.clear();
  return good;
}

/// False for what HDF5 has to look at itself: other filters, and damage, which it then reports.
bool decode(Bytes& bytes, const std::vector<H5Z_filter_t>& filters, std::size_t chunk_bytes, std::size_t element_size) {
  for (auto filter = filters.rbegin(); filter != filters.rend(); ++filter) {
    const bool undone = *filter == H5Z_FILTER_FLETCHER32 ? undo_fletcher32(bytes)
                        : *filter == H5Z_FILTER_DEFLATE  ? undo_deflate(bytes, chunk_bytes)
                        : *filter == H5Z_FILTER_SHUFFLE  ? undo_shuffle(bytes, element_size)
                                                         : false;
    if (!undone) return false;
  }
  return bytes.size() == chunk_bytes;
}

}  // namespace

bool Dataset::decode_block(const Shape& start, const Shape& count, std::span<std::byte> bytes) const {
  const std::vector<Run> runs = runs_of(shape_, chunk_, element_size_, start, count);
  std::vector<Bytes> chunks;
  std::vector<H5Z_filter_t> filters;
  std::size_t chunk_bytes = element_size_;
  for (const std::uint64_t extent : chunk_) chunk_bytes *= extent;
  {
    const Lock lock;
    filters = filters_of(id_.get());
    if (runs.empty() || filters.empty()) return false;
    for (const Run& run : runs) {
      hsize_t stored = 0;
      std::uint32_t left_out = 0;  // filters
      if (H5Dget_chunk_storage_size(id_.get(), run.at.data(), &stored) < 0 || stored > 2 * chunk_bytes + 4096 ||
          H5Dread_chunk(id_.get(), H5P_DEFAULT, run.at.data(), &left_out, chunks.emplace_back(stored).data()) < 0 ||
          left_out != 0)
        return false;
    }
  }
  return on_all_cores(runs.size(), [&](std::size_t i) {
    if (!decode(chunks[i], filters, chunk_bytes, element_size_)) return false;
    std::copy_n(chunks[i].begin(), runs[i].bytes, bytes.begin() + static_cast<std::ptrdiff_t>(runs[i].first));
    return true;
  });
}

bool Dataset::encode_block(const Shape& start, const Shape& count, std::span<const std::byte> bytes) {
  const std::vector<Run> runs = runs_of(shape_, chunk_, element_size_, start, count);
  std::size_t chunk_bytes = element_size_;
  for (const std::uint64_t extent : chunk_) chunk_bytes *= extent;
  {
    const Lock lock;
    if (filters_of(id_.get()) != our_filters || (element_size_ != 2 && element_size_ != 4)) return false;
  }
  std::vector<Bytes> chunks(runs.size());
  const bool good = on_all_cores(runs.size(), [&](std::size_t i) {
    Bytes chunk(chunk_bytes);  // what lies beyond the dataset is zero
    std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(runs[i].first), runs[i].bytes, chunk.begin());
    chunk = do_deflate(element_size_ == 2 ? shuffled<2, true>(chunk) : shuffled<4, true>(chunk));
    if (chunk.empty()) return false;
    chunks[i] = do_fletcher32(std::move(chunk));
    return true;
  });
  if (!good || runs.empty()) return false;
  const Lock lock;
  for (std::size_t i = 0; i < runs.size(); ++i)
    if (H5Dwrite_chunk(id_.get(), H5P_DEFAULT, 0, runs[i].at.data(), chunks[i].size(), chunks[i].data()) < 0)
      fail("cannot be written" + reason());
  return true;
}

}  // namespace kv::h5
