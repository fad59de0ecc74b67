// Datasets of core/hdf5.hpp: opening, creating, checking and moving their bytes.
#include <fmt/format.h>
#include <hdf5.h>

#include <algorithm>
#include <functional>
#include <future>
#include <memory>
#include <numeric>

#include "core/error.hpp"
#include "core/hdf5.hpp"
#include "core/hdf5_type.hpp"

namespace kv::h5 {
namespace {

constexpr std::uint64_t max_chunk_bytes = 1ull << 30;  // HDF5 holds one decoded chunk in memory
constexpr std::uint64_t max_cache_bytes = 256ull << 20;
constexpr std::uint64_t slab_bytes = 16ull << 20;

/// Product, or the largest number when it does not fit.
std::uint64_t product(const Shape& shape, std::uint64_t factor) {
  for (const std::uint64_t extent : shape)
    if (__builtin_mul_overflow(factor, extent, &factor)) return UINT64_MAX;
  return factor;
}

std::uint64_t ceil_div(std::uint64_t a, std::uint64_t b) { return a / b + (a % b != 0); }

/// Cache that holds every chunk that one index of the first axis touches, when chunks span several or are larger than a
/// slab: HDF5's own cache (1 MiB) would decode such chunks again for every slab. 0 = its own is enough.
std::uint64_t cache_bytes(const Shape& shape, const Shape& chunk, std::uint64_t element_size) {
  if (chunk.empty() || (chunk[0] == 1 && product(chunk, element_size) <= slab_bytes)) return 0;
  std::uint64_t bytes = product(chunk, element_size);
  for (std::size_t axis = 1; axis < shape.size(); ++axis) bytes = product({ceil_div(shape[axis], chunk[axis])}, bytes);
  return bytes > 1 << 20 ? std::min(bytes, max_cache_bytes) : 0;
}

/// Of the same rank as the block in the file: for unlike shapes HDF5 goes element by element, eight times as slow.
Id memory_space(const Shape& count) {
  if (count.empty()) return Id(H5Screate(H5S_SCALAR));
  const std::vector<hsize_t> extent(count.begin(), count.end());
  return Id(H5Screate_simple(static_cast<int>(extent.size()), extent.data(), nullptr));
}

/// Whether a filter pipeline holds nothing that packs better than deflate, whose ratio cannot exceed 1032.
bool at_most_deflate(hid_t properties) {
  for (int i = 0; i < H5Pget_nfilters(properties); ++i) {
    unsigned flags = 0, config = 0;
    std::size_t values = 0;
    const H5Z_filter_t filter =
        H5Pget_filter2(properties, static_cast<unsigned>(i), &flags, &values, nullptr, 0, nullptr, &config);
    if (filter != H5Z_FILTER_DEFLATE && filter != H5Z_FILTER_SHUFFLE && filter != H5Z_FILTER_FLETCHER32) return false;
  }
  return true;
}

}  // namespace

Dataset::Dataset(Id id, std::string file, std::string path)
    : Object(std::move(id), std::move(file), std::move(path)), type_id_(H5Dget_type(id_.get())) {
  const Id space(H5Dget_space(id_.get())), properties(H5Dget_create_plist(id_.get()));
  const int rank = H5Sget_simple_extent_ndims(space.get());
  if (type_id_.get() < 0 || rank < 0 || properties.get() < 0) fail("cannot be described" + reason());
  type_ = classify(type_id_.get());
  element_size_ = H5Tget_size(type_id_.get());
  std::vector<hsize_t> extent(static_cast<std::size_t>(rank));
  H5Sget_simple_extent_dims(space.get(), extent.data(), nullptr);
  shape_.assign(extent.begin(), extent.end());
  if (H5Pget_layout(properties.get()) != H5D_CHUNKED) return;
  if (H5Pget_chunk(properties.get(), rank, extent.data()) != rank) fail("has a damaged chunk extent" + reason());
  chunk_.assign(extent.begin(), extent.end());
  if (std::find(chunk_.begin(), chunk_.end(), 0u) != chunk_.end()) fail("has an empty chunk extent");
}

std::string Dataset::type_text() const {
  const Lock lock;
  return describe(type_id_.get());
}

std::uint64_t Dataset::elements() const { return product(shape_, 1); }

void Dataset::expect(Type type) const {
  if (type_ != type) fail(fmt::format("is {}, {} expected", type_text(), name_of(type)));
}

void Dataset::check_stored() const {
  const Lock lock;
  const std::uint64_t logical = product(shape_, element_size_);
  if (logical == 0) return;
  const Id properties(H5Dget_create_plist(id_.get())), file(H5Iget_file_id(id_.get()));
  hsize_t file_bytes = 0;
  if (H5Fget_filesize(file.get(), &file_bytes) < 0) fail("lies in a file of unknown size" + reason());
  const H5D_layout_t layout = H5Pget_layout(properties.get());
  if (layout == H5D_VIRTUAL || H5Pget_external_count(properties.get()) > 0) fail("keeps its values in another file");
  const std::uint64_t stored = H5Dget_storage_size(id_.get());
  if (stored > file_bytes) fail(fmt::format("claims {} stored bytes in a file of {}", stored, file_bytes));
  if (layout == H5D_CHUNKED) {
    check_chunks(properties.get(), logical, stored);
  } else if (stored != logical) {
    fail(fmt::format("has {} stored bytes, shape {} needs {}", stored, shape_text(shape_), logical));
  }
}

void Dataset::check_chunks(std::int64_t properties, std::uint64_t logical, std::uint64_t stored) const {
  if (product(chunk_, element_size_) > max_chunk_bytes)
    fail(fmt::format("has chunks of {}, more than {} bytes each", shape_text(chunk_), max_chunk_bytes));
  std::uint64_t expected = 1;
  for (std::size_t axis = 0; axis < shape_.size(); ++axis)
    expected = product({ceil_div(shape_[axis], chunk_[axis])}, expected);
  const Id space(H5Dget_space(id_.get()));
  hsize_t present = 0;
  if (H5Dget_num_chunks(id_.get(), space.get(), &present) < 0) fail("has a damaged chunk index" + reason());
  if (present != expected) fail(fmt::format("has {} of {} chunks: it was not written completely", present, expected));
  const std::uint64_t ratio = at_most_deflate(properties) ? 1100 : 1 << 20;
  if (logical / ratio > stored)
    fail(fmt::format("shape {} needs {} bytes, {} stored bytes cannot hold them", shape_text(shape_), logical, stored));
}

Id Dataset::select(const Shape& start, const Shape& count) const {
  Id space(H5Dget_space(id_.get()));
  KV_CHECK(start.size() == shape_.size() && count.size() == shape_.size());
  if (shape_.empty()) return space;  // a scalar: all of it
  const std::vector<hsize_t> from(start.begin(), start.end()), extent(count.begin(), count.end());
  if (H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, from.data(), nullptr, extent.data(), nullptr) < 0)
    fail("has no such block" + reason());
  return space;
}

void Dataset::read_block(const Shape& start, const Shape& count, std::span<std::byte> bytes) const {
  KV_CHECK(type_ != Type::text && bytes.size() == product(count, element_size_));
  if (bytes.empty() || decode_block(start, count, bytes)) return;
  const Lock lock;
  const Id file = select(start, count);
  const Id memory = memory_space(count);
  if (H5Dread(id_.get(), type_id_.get(), memory.get(), file.get(), H5P_DEFAULT, bytes.data()) < 0)
    fail("cannot be read" + reason());
}

void Dataset::stream(const std::function<void(std::uint64_t, std::span<const std::byte>)>& sink) const {
  // Blocks that are contiguous in row-major order: many indices of the first axis, or a part of one.
  std::size_t axis = 0;
  std::uint64_t inner = 0;  // bytes of one index of that axis
  for (; axis < shape_.size(); ++axis) {
    inner = product(Shape(shape_.begin() + static_cast<std::ptrdiff_t>(axis) + 1, shape_.end()), element_size_);
    if (inner <= slab_bytes || axis + 1 == shape_.size()) break;
  }
  if (shape_.empty() || elements() == 0) return;
  std::uint64_t step = std::clamp<std::uint64_t>(slab_bytes / std::max<std::uint64_t>(inner, 1), 1, shape_[axis]);
  if (!chunk_.empty() && step > chunk_[axis]) step -= step % chunk_[axis];  // decode no chunk twice
  Shape start(shape_.size(), 0), count = shape_;
  std::fill(count.begin(), count.begin() + static_cast<std::ptrdiff_t>(axis), 1);
  std::vector<std::byte> buffers[2];
  const auto read = [&](std::vector<std::byte>& buffer) {
    count[axis] = std::min(step, shape_[axis] - start[axis]);
    buffer.resize(count[axis] * inner);
    read_block(start, count, buffer);
    start[axis] += count[axis];
    for (std::size_t i = axis; i > 0 && start[i] == shape_[i]; --i) start[i] = 0, ++start[i - 1];
  };
  read(buffers[0]);
  for (std::uint64_t first = 0, turn = 0; first < elements(); ++turn) {
    const std::vector<std::byte>& block = buffers[turn % 2];
    const std::uint64_t after = first + block.size() / element_size_;
    std::future<void> next;
    if (after < elements()) next = std::async(std::launch::async, read, std::ref(buffers[(turn + 1) % 2]));
    sink(first, block);
    if (next.valid()) next.get();
    first = after;
  }
}

std::vector<std::string> Dataset::read_text() const {
  const Lock lock;
  expect(Type::text);
  check_stored();
  std::vector<std::string> values(elements());
  if (values.empty()) return values;
  if (H5Tis_variable_str(type_id_.get()) > 0) {
    std::vector<char*> pointers(values.size(), nullptr);
    if (H5Dread(id_.get(), type_id_.get(), H5S_ALL, H5S_ALL, H5P_DEFAULT, pointers.data()) < 0)
      fail("cannot be read" + reason());
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (pointers[i] != nullptr) values[i] = pointers[i];
      H5free_memory(pointers[i]);
    }
    return values;
  }
  std::string bytes(product(shape_, element_size_), '\0');
  if (H5Dread(id_.get(), type_id_.get(), H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.data()) < 0)
    fail("cannot be read" + reason());
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = trimmed(bytes.substr(i * element_size_, element_size_), type_id_.get());
  return values;
}

void Dataset::write_bytes(std::span<const std::byte> bytes) { write_block(Shape(shape_.size(), 0), shape_, bytes); }

void Dataset::write_block(const Shape& start, const Shape& count, std::span<const std::byte> bytes) {
  KV_CHECK(type_ != Type::text && bytes.size() == product(count, element_size_));
  if (bytes.empty() || encode_block(start, count, bytes)) return;
  const Lock lock;
  const Id file = select(start, count);
  const Id memory = memory_space(count);
  if (H5Dwrite(id_.get(), type_id_.get(), memory.get(), file.get(), H5P_DEFAULT, bytes.data()) < 0)
    fail("cannot be written" + reason());
}

void Dataset::write_text(std::span<const std::string> values) {
  const Lock lock;
  expect(Type::text);
  KV_CHECK(values.size() == elements());
  std::vector<const char*> pointers(values.size());
  std::transform(values.begin(), values.end(), pointers.begin(),
                 [](const std::string& value) { return value.c_str(); });
  if (!pointers.empty() && H5Dwrite(id_.get(), type_id_.get(), H5S_ALL, H5S_ALL, H5P_DEFAULT, pointers.data()) < 0)
    fail("cannot be written" + reason());
}

Dataset Group::dataset(const std::string& name) const {
  const Lock lock;
  if (!has(name)) fail(fmt::format("dataset {} is missing", name));
  const auto open = [&](hid_t access) {
    Id id(H5Dopen2(id_.get(), name.c_str(), access));
    if (id.get() < 0) fail(fmt::format("member {} cannot be opened as a dataset{}", name, reason()));
    return Dataset(std::move(id), file_, child(name));
  };
  Dataset dataset = open(H5P_DEFAULT);
  const std::uint64_t cache = cache_bytes(dataset.shape(), dataset.chunk(), dataset.element_size());
  if (cache == 0) return dataset;
  dataset.id_ = Id();  // the cache of an open dataset cannot be changed
  const Id access(H5Pcreate(H5P_DATASET_ACCESS));
  H5Pset_chunk_cache(access.get(), 12421, cache, 1.0);  // a prime number of slots; forget read chunks first
  return open(access.get());
}

Dataset Group::create(const std::string& name, Type type, const Shape& shape, const Shape& chunk) {
  const Lock lock;
  const std::vector<hsize_t> extent(shape.begin(), shape.end()), tile(chunk.begin(), chunk.end());
  const Id space(shape.empty() ? H5Screate(H5S_SCALAR)
                               : H5Screate_simple(static_cast<int>(extent.size()), extent.data(), nullptr));
  const Id stored = make_type(type), properties(H5Pcreate(H5P_DATASET_CREATE));
  H5Pset_obj_track_times(properties.get(), false);  // equal content, equal file
  if (!chunk.empty()) {
    H5Pset_chunk(properties.get(), static_cast<int>(tile.size()), tile.data());
    if (type != Type::text) {  // strings lie in a heap, out of reach of filters
      H5Pset_shuffle(properties.get());
      H5Pset_deflate(properties.get(), deflate_level);
      H5Pset_fletcher32(properties.get());
    }
  }
  Id id(H5Dcreate2(id_.get(), name.c_str(), stored.get(), space.get(), H5P_DEFAULT, properties.get(), H5P_DEFAULT));
  if (id.get() < 0) fail(fmt::format("dataset {} cannot be created{}", name, reason()));
  return Dataset(std::move(id), file_, child(name));
}

}  // namespace kv::h5
