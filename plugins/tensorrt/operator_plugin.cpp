// TensorRT's side of the plugins: no exception leaves a method, and every failure is reported with its
// reason.
#include "operator_plugin.h"

#include <algorithm>
#include <stdexcept>

#include "logger.h"

namespace lightforcing::tensorrt {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

void require(lf_status status) {
    if (status != LF_OK) {
        throw std::runtime_error(lf_last_error());
    }
}

template <typename Body>
std::int32_t OperatorPlugin::guarded(const char* method, Body&& body) const noexcept {
    try {
        body();
        return 0;
    } catch (const std::exception& error) {
        logError({name_, "::", method, ": ", error.what()});
    } catch (...) {
        logError({name_, "::", method, ": unknown error"});
    }
    return 1;
}

void OperatorPlugin::requireCounts(std::int32_t inputs, std::int32_t outputs) const {
    if (inputs != static_cast<std::int32_t>(inputs_.size()) ||
        outputs != static_cast<std::int32_t>(outputs_.size())) {
        throw std::invalid_argument("it was given " + std::to_string(inputs) + " inputs and " +
                                    std::to_string(outputs) + " outputs; expected " +
                                    std::to_string(inputs_.size()) + " and " +
                                    std::to_string(outputs_.size()));
    }
}

const Tensor& OperatorPlugin::tensorAt(std::size_t position) const {
    return position < inputs_.size() ? inputs_[position] : outputs_.at(position - inputs_.size());
}

lf_shape OperatorPlugin::shapeOf(const PluginTensorDesc* inputs) const {
    std::vector<Dims> dims;
    for (std::size_t index = 0; index < inputs_.size(); ++index) {
        dims.push_back(inputs[index].dims);
    }
    return checkShapes(dtypeOf(inputs[0].type), dims);
}

lf_shape OperatorPlugin::shapeOf(const DynamicPluginTensorDesc* inputs,
                                 Dims DynamicPluginTensorDesc::* bound) const {
    std::vector<PluginTensorDesc> concrete;
    for (std::size_t index = 0; index < inputs_.size(); ++index) {
        concrete.push_back(inputs[index].desc);
        const Dims& dims = inputs[index].desc.dims;
        const std::int64_t* const end = dims.d + std::clamp(dims.nbDims, 0, Dims::MAX_DIMS);
        if (std::count(dims.d, end, -1) > 0) { // known when the engine runs
            concrete.back().dims = inputs[index].*bound;
        }
    }
    return shapeOf(concrete.data());
}

nvinfer1::IPluginCapability*
OperatorPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* OperatorPlugin::clone() noexcept {
    nvinfer1::IPluginV3* result = nullptr;
    guarded("clone", [&] { result = copy().release(); });
    return result;
}

std::int32_t OperatorPlugin::getNbOutputs() const noexcept {
    return static_cast<std::int32_t>(outputs_.size());
}

std::int32_t OperatorPlugin::getOutputDataTypes(DataType* outputTypes, std::int32_t nbOutputs,
                                                const DataType* inputTypes,
                                                std::int32_t nbInputs) const noexcept {
    return guarded("getOutputDataTypes", [&] {
        requireCounts(nbInputs, nbOutputs);
        for (std::size_t index = 0; index < outputs_.size(); ++index) {
            outputTypes[index] = typeOf(outputs_[index].element, inputTypes[0]);
        }
    });
}

std::int32_t OperatorPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t nbInputs,
                                             const nvinfer1::DimsExprs*, std::int32_t,
                                             nvinfer1::DimsExprs* outputs, std::int32_t nbOutputs,
                                             nvinfer1::IExprBuilder& exprBuilder) noexcept {
    return guarded("getOutputShapes", [&] {
        requireCounts(nbInputs, nbOutputs);
        describeOutputs(inputs, outputs, exprBuilder);
    });
}

bool OperatorPlugin::supportsFormatCombination(std::int32_t pos, const DynamicPluginTensorDesc* inOut,
                                               std::int32_t nbInputs, std::int32_t nbOutputs) noexcept {
    bool supported = false;
    guarded("supportsFormatCombination", [&] {
        requireCounts(nbInputs, nbOutputs);
        const Tensor& tensor = tensorAt(static_cast<std::size_t>(pos));
        const PluginTensorDesc& found = inOut[pos].desc;
        const bool typed = pos == 0 ? lf_serves_dtype(dtypeOf(found.type)) != 0
                                    : found.type == typeOf(tensor.element, inOut[0].desc.type);
        supported = typed && found.format == nvinfer1::TensorFormat::kLINEAR;
    });
    return supported;
}

std::int32_t OperatorPlugin::configurePlugin(const DynamicPluginTensorDesc* in, std::int32_t nbInputs,
                                             const DynamicPluginTensorDesc*,
                                             std::int32_t nbOutputs) noexcept {
    // A problem that no kernel serves should stop the build here and not at the first run.
    return guarded("configurePlugin", [&] {
        requireCounts(nbInputs, nbOutputs);
        workspaceFor(shapeOf(in, &DynamicPluginTensorDesc::opt));
    });
}

std::size_t OperatorPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, std::int32_t nbInputs,
                                             const DynamicPluginTensorDesc*,
                                             std::int32_t nbOutputs) const noexcept {
    std::size_t bytes = 0;
    guarded("getWorkspaceSize", [&] {
        requireCounts(nbInputs, nbOutputs);
        bytes = workspaceFor(shapeOf(inputs, &DynamicPluginTensorDesc::max));
    });
    return bytes;
}

std::int32_t OperatorPlugin::onShapeChange(const PluginTensorDesc* in, std::int32_t nbInputs,
                                           const PluginTensorDesc*, std::int32_t nbOutputs) noexcept {
    return guarded("onShapeChange", [&] {
        requireCounts(nbInputs, nbOutputs);
        workspaceFor(shapeOf(in));
        load(); // done already in a plugin that is attached to a context
    });
}

std::int32_t OperatorPlugin::enqueue(const PluginTensorDesc* inputDesc, const PluginTensorDesc*,
                                     const void* const* inputs, void* const* outputs, void* workspace,
                                     cudaStream_t stream) noexcept {
    return guarded("enqueue", [&] { launch(shapeOf(inputDesc), inputs, outputs, workspace, stream); });
}

nvinfer1::IPluginV3* OperatorPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
    nvinfer1::IPluginV3* result = nullptr;
    guarded("attachToContext", [&] {
        std::unique_ptr<OperatorPlugin> attached = copy();
        attached->load();
        result = attached.release();
    });
    return result;
}

} // namespace lightforcing::tensorrt
