#include "core/hdf5.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <hdf5.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>

#include "core/error.hpp"
#include "core/hdf5_type.hpp"

namespace kv::h5 {
namespace {

bool forked_child = false;

std::recursive_mutex& mutex() {
  static std::recursive_mutex instance;
  return instance;
}

/// Refuses, with the system's own words, what HDF5 would explain in a page.
void check_readable(const std::filesystem::path& path) {
  const auto refuse = [&](const std::string& problem) { throw TraceError(path.string() + ": " + problem); };
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (status.type() == std::filesystem::file_type::not_found) refuse("no such file");
  if (error) refuse(error.message());
  if (status.type() == std::filesystem::file_type::directory) refuse("is a directory, not a file");
  if (status.type() != std::filesystem::file_type::regular) refuse("is not a regular file");
  if (access(path.c_str(), R_OK) != 0) refuse(fmt::format("cannot be read: {}", std::strerror(errno)));
  if (std::filesystem::file_size(path, error) == 0) refuse("is empty (0 bytes)");
  const Lock lock;
  if (H5Fis_hdf5(path.c_str()) <= 0) refuse("is not an HDF5 file");
}

Id open_file(const std::filesystem::path& path, unsigned mode, bool locked) {
  check_readable(path);
  const Lock lock;
  const Id access(H5Pcreate(H5P_FILE_ACCESS));
  H5Pset_file_locking(access.get(), locked, true);
  Id id(H5Fopen(path.c_str(), mode, access.get()));
  if (id.get() < 0) throw TraceError(fmt::format("{}: cannot be opened as HDF5{}", path.string(), reason()));
  return id;
}

}  // namespace

Lock::Lock() {
  if (forked_child) return;
  mutex().lock();
  static const bool quiet = H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr) >= 0;  // errors are ours to print
  static_cast<void>(quiet);
}

Lock::~Lock() {
  if (!forked_child) mutex().unlock();
}

void Lock::disable_in_child() { forked_child = true; }

Id::~Id() {
  if (id_ < 0) return;
  const Lock lock;
  H5Idec_ref(id_);
}

Id::Id(Id&& other) noexcept : id_(std::exchange(other.id_, -1)) {}

Id& Id::operator=(Id&& other) noexcept {
  std::swap(id_, other.id_);
  return *this;
}

std::string shape_text(const Shape& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

std::string quoted(std::string_view text) {
  std::string line = "'";
  for (const char c : text.substr(0, 60)) line += static_cast<unsigned char>(c) < 32 || c == 127 ? '?' : c;
  return line + (text.size() > 60 ? "...'" : "'");
}

Object::Object(Id id, std::string file, std::string path)
    : id_(std::move(id)), file_(std::move(file)), path_(std::move(path)) {}

void Object::fail(std::string_view problem) const {
  throw TraceError(fmt::format("{}: {}: {}", file_, path_, problem));
}

bool Object::has_attribute(const std::string& name) const {
  const Lock lock;
  const htri_t exists = H5Aexists(id_.get(), name.c_str());
  if (exists < 0) fail(fmt::format("attribute {} cannot be looked up{}", name, reason()));
  return exists > 0;
}

Id Object::open_attribute(const std::string& name, const char* expected, std::initializer_list<int> classes) const {
  if (!has_attribute(name)) fail(fmt::format("attribute {} is missing ({} expected)", name, expected));
  Id attribute(H5Aopen(id_.get(), name.c_str(), H5P_DEFAULT));
  if (attribute.get() < 0) fail(fmt::format("attribute {} cannot be opened{}", name, reason()));
  const Id type(H5Aget_type(attribute.get())), space(H5Aget_space(attribute.get()));
  if (std::find(classes.begin(), classes.end(), H5Tget_class(type.get())) == classes.end())
    fail(fmt::format("attribute {} is {}, {} expected", name, describe(type.get()), expected));
  if (H5Sget_simple_extent_npoints(space.get()) != 1)
    fail(fmt::format("attribute {} is an array, one {} expected", name, expected));
  return attribute;
}

std::int64_t Object::integer(const std::string& name) const {
  const Lock lock;
  const Id attribute = open_attribute(name, "integer", {H5T_INTEGER});
  std::int64_t value = 0;
  if (H5Aread(attribute.get(), H5T_NATIVE_INT64, &value) < 0)
    fail(fmt::format("attribute {} cannot be read{}", name, reason()));
  return value;
}

double Object::number(const std::string& name) const {
  const Lock lock;
  const Id attribute = open_attribute(name, "number", {H5T_INTEGER, H5T_FLOAT});
  double value = 0;
  if (H5Aread(attribute.get(), H5T_NATIVE_DOUBLE, &value) < 0)
    fail(fmt::format("attribute {} cannot be read{}", name, reason()));
  return value;
}

std::string Object::text(const std::string& name) const {
  const Lock lock;
  const Id attribute = open_attribute(name, "string", {H5T_STRING});
  const Id type(H5Aget_type(attribute.get()));
  if (H5Tis_variable_str(type.get()) > 0) {
    char* value = nullptr;
    if (H5Aread(attribute.get(), type.get(), &value) < 0)
      fail(fmt::format("attribute {} cannot be read{}", name, reason()));
    const std::unique_ptr<char, decltype(&H5free_memory)> owner(value, H5free_memory);
    return value == nullptr ? "" : value;
  }
  const std::size_t size = H5Tget_size(type.get());
  if (size > 1 << 20) fail(fmt::format("attribute {} is a string of {} bytes", name, size));
  std::string value(size, '\0');
  if (H5Aread(attribute.get(), type.get(), value.data()) < 0)
    fail(fmt::format("attribute {} cannot be read{}", name, reason()));
  return trimmed(value, type.get());
}

std::int64_t Object::integer(const std::string& name, std::int64_t otherwise) const {
  return has_attribute(name) ? integer(name) : otherwise;
}

double Object::number(const std::string& name, double otherwise) const {
  return has_attribute(name) ? number(name) : otherwise;
}

std::string Object::text(const std::string& name, const std::string& otherwise) const {
  return has_attribute(name) ? text(name) : otherwise;
}

void Object::set(const std::string& name, Type type, const void* value) {
  const Lock lock;
  remove_attribute(name);
  const Id stored = make_type(type), space(H5Screate(H5S_SCALAR));
  const Id attribute(H5Acreate2(id_.get(), name.c_str(), stored.get(), space.get(), H5P_DEFAULT, H5P_DEFAULT));
  if (attribute.get() < 0 || H5Awrite(attribute.get(), stored.get(), value) < 0)
    fail(fmt::format("attribute {} cannot be written{}", name, reason()));
}

void Object::set_integer(const std::string& name, std::int64_t value) { set(name, Type::int64, &value); }
void Object::set_number(const std::string& name, double value) { set(name, Type::float64, &value); }

void Object::set_text(const std::string& name, const std::string& value) {
  const char* const pointer = value.c_str();
  set(name, Type::text, &pointer);
}

void Object::set_flag(const std::string& name, bool value) {
  const std::uint8_t byte = value;
  set(name, Type::uint8, &byte);
}

void Object::remove_attribute(const std::string& name) {
  const Lock lock;
  if (has_attribute(name) && H5Adelete(id_.get(), name.c_str()) < 0)
    fail(fmt::format("attribute {} cannot be removed{}", name, reason()));
}

Group::Group(Id id, std::string file, std::string path) : Object(std::move(id), std::move(file), std::move(path)) {}

std::string Group::child(const std::string& name) const { return path_ == "/" ? "/" + name : path_ + "/" + name; }

bool Group::has(const std::string& name) const {
  const Lock lock;
  const htri_t exists = H5Lexists(id_.get(), name.c_str(), H5P_DEFAULT);
  if (exists < 0) fail(fmt::format("member {} cannot be looked up{}", name, reason()));
  return exists > 0;
}

std::vector<std::string> Group::names() const {
  const Lock lock;
  std::vector<std::string> found;
  const auto collect = [](hid_t, const char* name, const H5L_info_t*, void* into) -> herr_t {
    auto& names = *static_cast<std::vector<std::string>*>(into);
    names.emplace_back(name);
    return names.size() > 100'000 ? -1 : 0;  // no file of ours has as many: a damaged index
  };
  if (H5Literate(id_.get(), H5_INDEX_NAME, H5_ITER_INC, nullptr, collect, &found) < 0)
    fail("members cannot be listed" + reason());
  return found;
}

Group Group::group(const std::string& name) const {
  const Lock lock;
  if (!has(name)) fail(fmt::format("group {} is missing", name));
  Id id(H5Gopen2(id_.get(), name.c_str(), H5P_DEFAULT));
  if (id.get() < 0) fail(fmt::format("member {} cannot be opened as a group{}", name, reason()));
  return Group(std::move(id), file_, child(name));
}

Group Group::create_group(const std::string& name) {
  const Lock lock;
  const Id properties(H5Pcreate(H5P_GROUP_CREATE));
  H5Pset_obj_track_times(properties.get(), false);  // equal content, equal file
  Id id(H5Gcreate2(id_.get(), name.c_str(), H5P_DEFAULT, properties.get(), H5P_DEFAULT));
  if (id.get() < 0) fail(fmt::format("group {} cannot be created{}", name, reason()));
  return Group(std::move(id), file_, child(name));
}

void Group::remove(const std::string& name) {
  const Lock lock;
  if (H5Ldelete(id_.get(), name.c_str(), H5P_DEFAULT) < 0)
    fail(fmt::format("member {} cannot be removed{}", name, reason()));
}

File::File(Id file_id, std::string file)
    : Group(Id(H5Gopen2(file_id.get(), "/", H5P_DEFAULT)), std::move(file), "/"), file_id_(std::move(file_id)) {
  if (id_.get() < 0) fail("the root group cannot be opened" + reason());
}

File File::open(const std::filesystem::path& path) {
  const Lock lock;
  return File(open_file(path, H5F_ACC_RDONLY, false), path.string());
}

File File::modify(const std::filesystem::path& path) {
  const Lock lock;
  return File(open_file(path, H5F_ACC_RDWR, true), path.string());
}

File File::create(const std::filesystem::path& path, bool checksums) {
  std::FILE* const probe = std::fopen(path.c_str(), "ab");  // for the system's own words when it cannot be done
  if (probe == nullptr) throw TraceError(fmt::format("{}: cannot be created: {}", path.string(), std::strerror(errno)));
  std::fclose(probe);
  const Lock lock;
  const Id access(H5Pcreate(H5P_FILE_ACCESS)), properties(H5Pcreate(H5P_FILE_CREATE));
  H5Pset_file_locking(access.get(), true, true);
  H5Pset_obj_track_times(properties.get(), false);
  if (checksums) H5Pset_libver_bounds(access.get(), H5F_LIBVER_V110, H5F_LIBVER_V110);
  Id id(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, properties.get(), access.get()));
  if (id.get() < 0) throw TraceError(fmt::format("{}: cannot be created{}", path.string(), reason()));
  return File(std::move(id), path.string());
}

void File::close() {
  const Lock lock;
  if (file_id_.get() < 0) return;
  const bool flushed = H5Fflush(file_id_.get(), H5F_SCOPE_GLOBAL) >= 0;
  const std::string why = flushed ? "" : reason();
  id_ = Id();
  file_id_ = Id();
  if (!flushed) fail("cannot be written out" + why);
}

}  // namespace kv::h5
