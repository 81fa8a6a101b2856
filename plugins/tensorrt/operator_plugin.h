// What both plugins have in common: TensorRT's four interfaces, over an operator of the launch library.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "fields.h"
#include "lightforcing_launch.h"
#include "shapes.h"

namespace lightforcing::tensorrt {

constexpr const char* kNamespace = "lightforcing";
constexpr const char* kVersion = "1";

/// Throws std::runtime_error with the launch library's message unless `status` is LF_OK.
void require(lf_status status);

/// A plugin is its attributes; only a clone that is attached to a context holds anything on the device.
///
/// TensorRT's methods are final here: they keep exceptions in, report messages, and call the protected hooks,
/// which throw. Both hooks' `dims` are of the inputs followed by the outputs.
class OperatorPlugin : public nvinfer1::IPluginV3,
                       public nvinfer1::IPluginV3OneCore,
                       public nvinfer1::IPluginV3OneBuildV2,
                       public nvinfer1::IPluginV3OneRuntime {
  public:
    OperatorPlugin(const OperatorPlugin&) = delete;
    OperatorPlugin& operator=(const OperatorPlugin&) = delete;

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept final;
    nvinfer1::IPluginV3* clone() noexcept final;

    // IPluginV3OneCore
    const nvinfer1::AsciiChar* getPluginName() const noexcept final { return name_; }
    const nvinfer1::AsciiChar* getPluginVersion() const noexcept final { return kVersion; }
    const nvinfer1::AsciiChar* getPluginNamespace() const noexcept final { return kNamespace; }

    // IPluginV3OneBuildV2. No output is aliased to an input: the cache is read only.
    std::int32_t getNbOutputs() const noexcept final;
    std::int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, std::int32_t nbOutputs,
                                    const nvinfer1::DataType* inputTypes,
                                    std::int32_t nbInputs) const noexcept final;
    std::int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t nbInputs,
                                 const nvinfer1::DimsExprs* shapeInputs, std::int32_t nbShapeInputs,
                                 nvinfer1::DimsExprs* outputs, std::int32_t nbOutputs,
                                 nvinfer1::IExprBuilder& exprBuilder) noexcept final;
    bool supportsFormatCombination(std::int32_t pos, const nvinfer1::DynamicPluginTensorDesc* inOut,
                                   std::int32_t nbInputs, std::int32_t nbOutputs) noexcept final;
    std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, std::int32_t nbInputs,
                                 const nvinfer1::DynamicPluginTensorDesc* out,
                                 std::int32_t nbOutputs) noexcept final;
    std::size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t nbInputs,
                                 const nvinfer1::DynamicPluginTensorDesc* outputs,
                                 std::int32_t nbOutputs) const noexcept final;
    const char* getTimingCacheID() noexcept final { return fields_.text().c_str(); }
    const char* getMetadataString() noexcept final { return fields_.text().c_str(); }

    // IPluginV3OneRuntime
    std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, std::int32_t nbInputs,
                               const nvinfer1::PluginTensorDesc* out, std::int32_t nbOutputs) noexcept final;
    std::int32_t enqueue(const nvinfer1::PluginTensorDesc* inputDesc,
                         const nvinfer1::PluginTensorDesc* outputDesc, const void* const* inputs,
                         void* const* outputs, void* workspace, cudaStream_t stream) noexcept final;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept final;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept final {
        return fields_.collection();
    }

  protected:
    /// `name` and the tensors must outlive the plugin.
    OperatorPlugin(const char* name, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs)
        : name_(name), inputs_(inputs), outputs_(outputs) {}

    const char* name() const { return name_; }
    FieldList& fields() { return fields_; }

    /// A plugin of the same attributes, not attached.
    virtual std::unique_ptr<OperatorPlugin> copy() const = 0;

    /// Output shapes as expressions of the input shapes, whose ranks have not been checked.
    virtual void describeOutputs(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                                 nvinfer1::IExprBuilder& expressions) const = 0;

    /// Checks the shape of every input against the contract and gives the sizes that the launch library asks
    /// for.
    virtual lf_shape checkShapes(std::int32_t dtype, const std::vector<nvinfer1::Dims>& dims) const = 0;

    /// Checks that a kernel serves `shape`; returns the bytes of workspace that it needs.
    virtual std::size_t workspaceFor(const lf_shape& shape) const = 0;

    /// Loads what `launch` needs onto the current device; does nothing the second time.
    virtual void load() = 0;

    virtual void launch(const lf_shape& shape, const void* const* inputs, void* const* outputs,
                        void* workspace, void* stream) const = 0;

  private:
    /// Runs `body`, reports what it throws, and gives TensorRT its 0 for success.
    template <typename Body>
    std::int32_t guarded(const char* method, Body&& body) const noexcept;

    void requireCounts(std::int32_t inputs, std::int32_t outputs) const;
    const Tensor& tensorAt(std::size_t position) const;
    lf_shape shapeOf(const nvinfer1::PluginTensorDesc* inputs) const;
    lf_shape shapeOf(const nvinfer1::DynamicPluginTensorDesc* inputs,
                     nvinfer1::Dims nvinfer1::DynamicPluginTensorDesc::* bound) const;

    const char* name_;
    const std::vector<Tensor>& inputs_;
    const std::vector<Tensor>& outputs_;
    FieldList fields_;
};

} // namespace lightforcing::tensorrt
