// Plugin fields: attributes of an ONNX node, and what an engine stores of a plugin.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

namespace lightforcing::tensorrt {

/// Reads a collection that comes from outside: a parser, an application, an engine file. Everything is
/// checked that can be; every method throws std::invalid_argument with what was found and what was expected.
class FieldReader {
  public:
    /// Refuses unknown and repeated names. `expected` are the names that the operator has.
    FieldReader(const char* owner, const nvinfer1::PluginFieldCollection* fields,
                const std::vector<const char*>& expected);

    /// A field with one INT32 (or an INT64 that fits).
    std::int32_t integer(const char* name) const;

    /// A field with one FLOAT32 (or a FLOAT64).
    float real(const char* name) const;

    /// A field with one or more INT32 (or INT64 that fit).
    std::vector<std::int32_t> integers(const char* name) const;

  private:
    [[noreturn]] void refuse(const std::string& what) const;
    const nvinfer1::PluginField& find(const char* name) const;

    std::string owner_;
    std::vector<nvinfer1::PluginField> fields_;
};

/// Fields over values that live elsewhere, and their textual form.
class FieldList {
  public:
    void add(const char* name, const std::int32_t& value);
    void add(const char* name, const float& value);
    void add(const char* name, const std::vector<std::int32_t>& values);

    /// Valid as long as the list and the values are.
    const nvinfer1::PluginFieldCollection* collection();

    /// `name=value` of each, separated by spaces.
    const std::string& text() const { return text_; }

  private:
    void add(const char* name, const void* data, nvinfer1::PluginFieldType type, std::size_t length,
             const std::string& text);

    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
    std::string text_;
};

} // namespace lightforcing::tensorrt
