#include "core/hdf5_type.hpp"

#include <fmt/format.h>
#include <hdf5.h>

#include <array>
#include <bit>

#include "core/error.hpp"

namespace kv::h5 {
namespace {

static_assert(std::endian::native == std::endian::little, "stored words are used as they are");

/// The bit fields of a binary float.
struct FloatFields {
  std::size_t size, sign, exponent, exponent_bits, mantissa, mantissa_bits, bias;
  bool operator==(const FloatFields&) const = default;
};

constexpr std::array<std::pair<Type, FloatFields>, 4> floats{{
    {Type::float16, {2, 15, 10, 5, 0, 10, 15}},
    {Type::bfloat16, {2, 15, 7, 8, 0, 7, 127}},
    {Type::float32, {4, 31, 23, 8, 0, 23, 127}},
    {Type::float64, {8, 63, 52, 11, 0, 52, 1023}},
}};

/// Type of a float whatever its byte order; `other` when its bits mean something else.
Type classify_float(hid_t type) {
  FloatFields f{};
  f.size = H5Tget_size(type);
  f.bias = H5Tget_ebias(type);
  H5Tget_fields(type, &f.sign, &f.exponent, &f.exponent_bits, &f.mantissa, &f.mantissa_bits);
  if (H5Tget_offset(type) != 0 || H5Tget_precision(type) != 8 * f.size || H5Tget_norm(type) != H5T_NORM_IMPLIED)
    return Type::other;
  for (const auto& [known, fields] : floats)
    if (f == fields) return known;
  return Type::other;
}

Type classify_integer(hid_t type) {
  const std::size_t size = H5Tget_size(type);
  if (H5Tget_offset(type) != 0 || H5Tget_precision(type) != 8 * size) return Type::other;
  const bool is_signed = H5Tget_sign(type) == H5T_SGN_2;
  if (size == 1 && !is_signed) return Type::uint8;
  if (size == 4 && is_signed) return Type::int32;
  if (size == 8 && is_signed) return Type::int64;
  return Type::other;
}

std::string describe_class(hid_t type) {
  const std::size_t bits = 8 * H5Tget_size(type);
  switch (H5Tget_class(type)) {
    case H5T_INTEGER:
      return fmt::format("{}{}", H5Tget_sign(type) == H5T_SGN_NONE ? "uint" : "int", bits);
    case H5T_FLOAT: {
      const Type known = classify_float(type);
      return known == Type::other ? fmt::format("an unusual {}-bit float", bits) : name_of(known);
    }
    case H5T_STRING:
      return "string";
    case H5T_COMPOUND:
      return "compound";
    case H5T_ENUM:
      return "enum";
    case H5T_ARRAY:
      return "array";
    case H5T_VLEN:
      return "variable-length";
    case H5T_OPAQUE:
      return "opaque";
    case H5T_BITFIELD:
      return "bitfield";
    case H5T_REFERENCE:
      return "reference";
    default:
      return "of an unknown type";
  }
}

herr_t keep_first(unsigned, const H5E_error2_t* error, void* into) {
  auto& text = *static_cast<std::string*>(into);
  if (text.empty() && error->desc != nullptr) text = error->desc;
  return 0;
}

}  // namespace

const char* name_of(Type type) {
  switch (type) {
    case Type::uint8:
      return "uint8";
    case Type::int32:
      return "int32";
    case Type::int64:
      return "int64";
    case Type::float16:
      return "float16";
    case Type::bfloat16:
      return "bfloat16";
    case Type::float32:
      return "float32";
    case Type::float64:
      return "float64";
    case Type::text:
      return "string";
    case Type::other:
      break;
  }
  return "another type";
}

std::string reason() {
  std::string text;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, keep_first, &text);
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 32) c = ' ';
  return text.empty() ? "" : " (HDF5: " + text + ")";
}

Type classify(std::int64_t type) {
  const H5T_class_t kind = H5Tget_class(type);
  if (kind == H5T_STRING) return Type::text;
  if (kind != H5T_INTEGER && kind != H5T_FLOAT) return Type::other;
  if (H5Tget_size(type) > 1 && H5Tget_order(type) != H5T_ORDER_LE) return Type::other;
  return kind == H5T_INTEGER ? classify_integer(type) : classify_float(type);
}

std::string describe(std::int64_t type) {
  const H5T_class_t kind = H5Tget_class(type);
  const bool ordered = kind == H5T_INTEGER || kind == H5T_FLOAT;
  return (ordered && H5Tget_order(type) == H5T_ORDER_BE ? "big-endian " : "") + describe_class(type);
}

Id make_type(Type type) {
  const Lock lock;
  switch (type) {
    case Type::uint8:
      return Id(H5Tcopy(H5T_STD_U8LE));
    case Type::int32:
      return Id(H5Tcopy(H5T_STD_I32LE));
    case Type::int64:
      return Id(H5Tcopy(H5T_STD_I64LE));
    case Type::float32:
      return Id(H5Tcopy(H5T_IEEE_F32LE));
    case Type::float64:
      return Id(H5Tcopy(H5T_IEEE_F64LE));
    case Type::text: {
      Id id(H5Tcopy(H5T_C_S1));
      H5Tset_size(id.get(), H5T_VARIABLE);
      H5Tset_cset(id.get(), H5T_CSET_UTF8);
      return id;
    }
    case Type::float16:
    case Type::bfloat16: {
      const FloatFields& f = floats[type == Type::bfloat16].second;
      Id id(H5Tcopy(H5T_IEEE_F32LE));  // fields first: a type can only shrink to what its fields leave free
      H5Tset_fields(id.get(), f.sign, f.exponent, f.exponent_bits, f.mantissa, f.mantissa_bits);
      H5Tset_precision(id.get(), 16);
      H5Tset_size(id.get(), f.size);
      H5Tset_ebias(id.get(), f.bias);
      KV_CHECK(classify(id.get()) == type);
      return id;
    }
    case Type::other:
      break;
  }
  throw InternalError("no HDF5 type for 'other'");
}

std::string trimmed(const std::string& value, std::int64_t type) {
  if (H5Tget_strpad(type) == H5T_STR_SPACEPAD) return value.substr(0, value.find_last_not_of(' ') + 1);
  return value.substr(0, value.find('\0'));
}

}  // namespace kv::h5
