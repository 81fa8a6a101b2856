// QKPrepare as a TensorRT plugin.
#pragma once

#include <vector>

#include "operator_plugin.h"

namespace lightforcing::tensorrt {

class PreparePlugin final : public OperatorPlugin {
  public:
    static constexpr const char* kName = "QKPrepare";

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
        void operator()(lf_prepare* prepare) const { lf_prepare_destroy(prepare); }
    };

    explicit PreparePlugin(const lf_prepare_attributes& attributes);

    lf_prepare_attributes attributes_;
    std::unique_ptr<lf_prepare, Destroy> prepare_;
};

} // namespace lightforcing::tensorrt
