// A typed layer over the HDF5 C library; its .cpp is the only place that includes hdf5.h. Every failure is a TraceError
// "FILE: OBJECT: problem". Values are never converted on reading: bytes arrive as stored, since HDF5 converts bfloat16
// at 30 MB/s and reads it raw at 8 GB/s.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace kv::h5 {

/// Keeps other threads out of HDF5, whose usual build is not thread-safe. Everything in this header takes it by itself
/// (it is recursive); hold one to keep HDF5 at rest across several calls, such as a fork.
class Lock {
 public:
  Lock();
  ~Lock();
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

  /// To be called first in a child forked under a Lock: it has one thread, and a mutex owned by a thread of the parent.
  static void disable_in_child();
};

/// Owns one HDF5 identifier of any kind.
class Id {
 public:
  explicit Id(std::int64_t id = -1) noexcept : id_(id) {}
  ~Id();
  Id(Id&& other) noexcept;
  Id& operator=(Id&& other) noexcept;
  std::int64_t get() const { return id_; }

 private:
  std::int64_t id_;
};

using Shape = std::vector<std::uint64_t>;

/// Stored types that we read and write, all little-endian; `other` is everything else.
enum class Type { uint8, int32, int64, float16, bfloat16, float32, float64, text, other };

const char* name_of(Type type);

template <class T>
constexpr Type type_of() {
  if constexpr (std::is_same_v<T, std::uint8_t>) return Type::uint8;
  if constexpr (std::is_same_v<T, std::int32_t>) return Type::int32;
  if constexpr (std::is_same_v<T, std::int64_t>) return Type::int64;
  if constexpr (std::is_same_v<T, float>) return Type::float32;
  if constexpr (std::is_same_v<T, double>) return Type::float64;
  return Type::other;
}

/// "[3, 1024, 64]"
std::string shape_text(const Shape& shape);

/// `text` in quotes, shortened and on one line, for use in messages.
std::string quoted(std::string_view text);

/// What a group and a dataset have in common: a place in a file, and attributes.
class Object {
 public:
  const std::string& file() const { return file_; }
  const std::string& path() const { return path_; }

  /// Throws TraceError "FILE: PATH: problem".
  [[noreturn]] void fail(std::string_view problem) const;

  bool has_attribute(const std::string& name) const;
  /// Scalar attributes; a missing one or one of another class (number() takes integers too) is a TraceError.
  std::int64_t integer(const std::string& name) const;
  double number(const std::string& name) const;
  std::string text(const std::string& name) const;
  /// The same with a value for a missing attribute.
  std::int64_t integer(const std::string& name, std::int64_t otherwise) const;
  double number(const std::string& name, double otherwise) const;
  std::string text(const std::string& name, const std::string& otherwise) const;

  /// Write an attribute (int64, float64, UTF-8, uint8), replacing an old one of that name.
  void set_integer(const std::string& name, std::int64_t value);
  void set_number(const std::string& name, double value);
  void set_text(const std::string& name, const std::string& value);
  void set_flag(const std::string& name, bool value);
  void remove_attribute(const std::string& name);

 protected:
  Object(Id id, std::string file, std::string path);
  Id id_;
  std::string file_, path_;

 private:
  Id open_attribute(const std::string& name, const char* expected, std::initializer_list<int> classes) const;
  void set(const std::string& name, Type type, const void* value);
};

/// An array on disk.
class Dataset : public Object {
 public:
  Type type() const { return type_; }
  /// The stored type in words, also of `other` ones: "big-endian float32", "int16", "compound".
  std::string type_text() const;
  const Shape& shape() const { return shape_; }
  /// Extent of a chunk; empty when not chunked.
  const Shape& chunk() const { return chunk_; }
  std::uint64_t elements() const;
  std::size_t element_size() const { return element_size_; }

  /// Throws TraceError unless every element is really stored in this file, so that memory of that size may be asked
  /// for: a corrupt shape would otherwise ask for any amount.
  void check_stored() const;

  /// Reads all elements in row-major order through bounded buffers: `sink(index of the first element, bytes)`, which must
  /// leave this library alone: what it gets next is read meanwhile.
  void stream(const std::function<void(std::uint64_t first, std::span<const std::byte> bytes)>& sink) const;

  /// Reads everything; T must be the stored type. Checks check_stored() before it allocates.
  template <class T>
  std::vector<T> read() const {
    expect(type_of<T>());
    check_stored();
    std::vector<T> values(elements());
    read_block(Shape(shape_.size(), 0), shape_, std::as_writable_bytes(std::span(values)));
    return values;
  }
  /// Reads an array of strings.
  std::vector<std::string> read_text() const;

  /// Writes everything; T must be the stored type.
  template <class T>
  void write(std::span<const T> values) {
    expect(type_of<T>());
    write_bytes(std::as_bytes(values));
  }
  /// The same for values that have no C++ type (float16, bfloat16).
  void write_bytes(std::span<const std::byte> bytes);
  void write_text(std::span<const std::string> values);
  /// Writes the block [start, start + count) along every axis.
  void write_block(const Shape& start, const Shape& count, std::span<const std::byte> bytes);

 private:
  friend class Group;
  Dataset(Id id, std::string file, std::string path);
  void expect(Type type) const;
  void check_chunks(std::int64_t properties, std::uint64_t logical, std::uint64_t stored) const;
  void read_block(const Shape& start, const Shape& count, std::span<std::byte> bytes) const;
  /// The same for whole chunks, on all cores; false when HDF5 has to do it, or to say what is wrong.
  bool decode_block(const Shape& start, const Shape& count, std::span<std::byte> bytes) const;
  bool encode_block(const Shape& start, const Shape& count, std::span<const std::byte> bytes);  // the same for writing
  Id select(const Shape& start, const Shape& count) const;
  Type type_;
  Id type_id_;  // the file's own type, which is also the memory type of every transfer
  Shape shape_, chunk_;
  std::size_t element_size_;
};

class Group : public Object {
 public:
  bool has(const std::string& name) const;
  std::vector<std::string> names() const;  // of all members, sorted
  Group group(const std::string& name) const;
  Group create_group(const std::string& name);
  Dataset dataset(const std::string& name) const;
  /// Creates a dataset. With a chunk extent it is shuffled, deflated and checksummed; without one it is contiguous.
  Dataset create(const std::string& name, Type type, const Shape& shape, const Shape& chunk = {});
  /// Creates and writes in one go, chunked as a whole unless told otherwise.
  template <class T>
  Dataset create(const std::string& name, std::span<const T> values, const Shape& shape, const Shape& chunk = {}) {
    Dataset dataset = create(name, type_of<T>(), shape, chunk.empty() ? shape : chunk);
    dataset.write(values);
    return dataset;
  }
  void remove(const std::string& name);

 protected:
  Group(Id id, std::string file, std::string path);
  std::string child(const std::string& name) const;
};

/// A file, which is also its root group. Groups and datasets keep it open while they live.
class File : public Group {
 public:
  /// Read-only and without a lock, so that NFS and read-only media work.
  static File open(const std::filesystem::path& path);
  static File modify(const std::filesystem::path& path);
  /// `checksums`: metadata carries checksums and needs HDF5 1.10 to read; otherwise any HDF5 reads it.
  static File create(const std::filesystem::path& path, bool checksums = true);
  using Group::create;  // of datasets
  /// Flushes and closes; the destructor does the same but cannot report.
  void close();

 private:
  File(Id file_id, std::string file);
  Id file_id_;
};

}  // namespace kv::h5
