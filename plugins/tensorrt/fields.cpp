// Reading and writing plugin fields.
#include "fields.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace lightforcing::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

// A length from outside says how much memory will be read, and nothing can confirm it. No table is this long.
constexpr std::int32_t kMostEntries = 65536;
constexpr std::int32_t kMostFields = 64;

std::string describe(const PluginField& field) {
    return "type " + std::to_string(static_cast<std::int32_t>(field.type)) + " and length " +
           std::to_string(field.length);
}

/// Fields may lie at any address.
template <typename T>
T valueAt(const PluginField& field, std::int32_t index) {
    T value;
    std::memcpy(&value,
                static_cast<const unsigned char*>(field.data) + sizeof(T) * static_cast<std::size_t>(index),
                sizeof(T));
    return value;
}

std::string textOf(float value) {
    // Nine digits tell every float apart.
    char text[32];
    std::snprintf(text, sizeof text, "%.9g", static_cast<double>(value));
    return text;
}

} // namespace

FieldReader::FieldReader(const char* owner, const nvinfer1::PluginFieldCollection* fields,
                         const std::vector<const char*>& expected)
    : owner_(owner) {
    if (fields == nullptr || fields->nbFields < 0 || fields->nbFields > kMostFields ||
        (fields->fields == nullptr && fields->nbFields > 0)) {
        refuse("there is no valid collection of fields; expected one with " +
               std::to_string(expected.size()));
    }
    for (std::int32_t index = 0; index < fields->nbFields; ++index) {
        const PluginField& field = fields->fields[index];
        if (field.name == nullptr) {
            refuse("field " + std::to_string(index) + " has no name");
        }
        const auto same = [&](const char* name) { return std::strcmp(name, field.name) == 0; };
        if (std::none_of(expected.begin(), expected.end(), same)) {
            refuse(std::string("there is a field '") + field.name + "' that it does not have");
        }
        if (std::any_of(fields_.begin(), fields_.end(),
                        [&](const PluginField& seen) { return same(seen.name); })) {
            refuse(std::string("field '") + field.name + "' is there twice");
        }
        fields_.push_back(field);
    }
}

void FieldReader::refuse(const std::string& what) const {
    throw std::invalid_argument(owner_ + ": " + what);
}

const PluginField& FieldReader::find(const char* name) const {
    const auto found = std::find_if(fields_.begin(), fields_.end(), [&](const PluginField& field) {
        return std::strcmp(field.name, name) == 0;
    });
    if (found == fields_.end()) {
        refuse(std::string("field '") + name + "' is missing; every attribute of the node must be there");
    }
    if (found->data == nullptr || found->length < 1 || found->length > kMostEntries) {
        refuse(std::string("field '") + name + "' has no usable data (" + describe(*found) +
               "); expected 1 to " + std::to_string(kMostEntries) + " values");
    }
    return *found;
}

std::vector<std::int32_t> FieldReader::integers(const char* name) const {
    const PluginField& field = find(name);
    const bool wide = field.type == PluginFieldType::kINT64;
    if (!wide && field.type != PluginFieldType::kINT32) {
        refuse(std::string("field '") + name + "' has " + describe(field) + "; expected INT32");
    }
    std::vector<std::int32_t> values;
    values.reserve(static_cast<std::size_t>(field.length));
    for (std::int32_t index = 0; index < field.length; ++index) {
        const std::int64_t value =
            wide ? valueAt<std::int64_t>(field, index) : valueAt<std::int32_t>(field, index);
        if (value < std::numeric_limits<std::int32_t>::min() ||
            value > std::numeric_limits<std::int32_t>::max()) {
            refuse(std::string("field '") + name + "' holds " + std::to_string(value) +
                   ", which does not fit into 32 bits");
        }
        values.push_back(static_cast<std::int32_t>(value));
    }
    return values;
}

std::int32_t FieldReader::integer(const char* name) const {
    if (find(name).length != 1) {
        refuse(std::string("field '") + name + "' has " + describe(find(name)) + "; expected one value");
    }
    return integers(name).front();
}

float FieldReader::real(const char* name) const {
    const PluginField& field = find(name);
    if (field.length == 1 && field.type == PluginFieldType::kFLOAT32) {
        return valueAt<float>(field, 0);
    }
    if (field.length == 1 && field.type == PluginFieldType::kFLOAT64) {
        const auto value = valueAt<double>(field, 0);
        // Outside of float's range the conversion is undefined; the operator refuses what is not finite.
        return std::abs(value) <= std::numeric_limits<float>::max() ? static_cast<float>(value)
                                                                    : std::numeric_limits<float>::infinity();
    }
    refuse(std::string("field '") + name + "' has " + describe(field) + "; expected one FLOAT32");
}

void FieldList::add(const char* name, const std::int32_t& value) {
    add(name, &value, PluginFieldType::kINT32, 1, std::to_string(value));
}

void FieldList::add(const char* name, const float& value) {
    add(name, &value, PluginFieldType::kFLOAT32, 1, textOf(value));
}

void FieldList::add(const char* name, const std::vector<std::int32_t>& values) {
    std::string text;
    for (std::int32_t value : values) {
        text += (text.empty() ? "" : ",") + std::to_string(value);
    }
    add(name, values.data(), PluginFieldType::kINT32, values.size(), text);
}

void FieldList::add(const char* name, const void* data, PluginFieldType type, std::size_t length,
                    const std::string& text) {
    fields_.emplace_back(name, data, type, static_cast<std::int32_t>(length));
    text_ += (text_.empty() ? "" : " ") + std::string(name) + "=" + text;
}

const nvinfer1::PluginFieldCollection* FieldList::collection() {
    collection_.nbFields = static_cast<std::int32_t>(fields_.size());
    collection_.fields = fields_.data();
    return &collection_;
}

} // namespace lightforcing::tensorrt
