// HierarchicalSparseAttention as a TensorRT plugin.
#pragma once

#include <vector>

#include "operator_plugin.h"

namespace lightforcing::tensorrt {

class AttentionPlugin final : public OperatorPlugin {
  public:
    static constexpr const char* kName = "HierarchicalSparseAttention";

    /// The attributes, in the order of the operator's schema.
    static const std::vector<const char*>& fieldNames();

    /// Throws if a field is missing or of another type, or an attribute is out of range.
    static std::unique_ptr<OperatorPlugin> create(const nvinfer1::PluginFieldCollection* fields);

  protected:
    std::unique_ptr<OperatorPlugin> copy() const override;
    void describeOutputs(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                         nvinfer1::IExprBuilder& expressions) const override;
    lf_shape checkShapes(std::int32_t dtype, const std::vector<nvinfer1::Dims>& dims) const override;
    std::size_t workspaceFor(const lf_shape& shape) const override;
    void load() override;
    void launch(const lf_shape& shape, const void* const* inputs, void* const* outputs, void* workspace,
                void* stream) const override;

  private:
    struct Destroy {
        void operator()(lf_attention* attention) const { lf_attention_destroy(attention); }
    };

    AttentionPlugin(const lf_attention_attributes& attributes, std::vector<std::int32_t> keepQ20);

    lf_attention_attributes attributes_;
    std::vector<std::int32_t> keepQ20_;
    std::unique_ptr<lf_attention, Destroy> attention_;
};

} // namespace lightforcing::tensorrt
