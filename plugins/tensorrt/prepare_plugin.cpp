// QKPrepare: fields, shapes and the call into the launch library.
#include "prepare_plugin.h"

#include <stdexcept>

namespace lightforcing::tensorrt {
namespace {

enum Input { qkv, bias, normQ, normK, cos, sin };
enum Output { q, k, v, qMean, kMean };

const std::vector<Tensor> kInputs = {
    {"qkv", Element::compute},    {"bias", Element::compute}, {"norm_q", Element::compute},
    {"norm_k", Element::compute}, {"cos", Element::float32},  {"sin", Element::float32},
};
const std::vector<Tensor> kOutputs = {
    {"q", Element::compute},      {"k", Element::compute},      {"v", Element::compute},
    {"q_mean", Element::float32}, {"k_mean", Element::float32},
};

} // namespace

const std::vector<const char*>& PreparePlugin::fieldNames() {
    static const std::vector<const char*> names = {"heads", "frame_tokens", "block_q", "block_k", "eps"};
    return names;
}

std::unique_ptr<OperatorPlugin> PreparePlugin::create(const nvinfer1::PluginFieldCollection* fields) {
    const FieldReader reader(kName, fields, fieldNames());
    lf_prepare_attributes attributes{};
    attributes.heads = reader.integer("heads");
    attributes.frame_tokens = reader.integer("frame_tokens");
    attributes.block_q = reader.integer("block_q");
    attributes.block_k = reader.integer("block_k");
    attributes.eps = reader.real("eps");
    return std::unique_ptr<OperatorPlugin>(new PreparePlugin(attributes));
}

PreparePlugin::PreparePlugin(const lf_prepare_attributes& attributes)
    : OperatorPlugin(kName, kInputs, kOutputs), attributes_(attributes) {
    lf_prepare* prepare = nullptr;
    require(lf_prepare_create(&attributes_, &prepare));
    prepare_.reset(prepare);
    fields().add("heads", attributes_.heads);
    fields().add("frame_tokens", attributes_.frame_tokens);
    fields().add("block_q", attributes_.block_q);
    fields().add("block_k", attributes_.block_k);
    fields().add("eps", attributes_.eps);
}

std::unique_ptr<OperatorPlugin> PreparePlugin::copy() const {
    return std::unique_ptr<OperatorPlugin>(new PreparePlugin(attributes_));
}

void PreparePlugin::describeOutputs(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                                    nvinfer1::IExprBuilder& expressions) const {
    if (inputs[qkv].nbDims != 2 || inputs[normQ].nbDims != 1) {
        throw std::invalid_argument("qkv and norm_q have " + std::to_string(inputs[qkv].nbDims) + " and " +
                                    std::to_string(inputs[normQ].nbDims) +
                                    " dimensions; expected [T, 3 H D] and [H D]");
    }
    using nvinfer1::DimensionOperation;
    const auto divided = [&](const nvinfer1::IDimensionExpr& size, std::int32_t divisor) {
        return expressions.operation(DimensionOperation::kFLOOR_DIV, size, *expressions.constant(divisor));
    };
    const nvinfer1::IDimensionExpr* const heads = expressions.constant(attributes_.heads);
    const nvinfer1::IDimensionExpr* const headDim = divided(*inputs[normQ].d[0], attributes_.heads);
    const nvinfer1::IDimensionExpr* const frames = divided(*inputs[qkv].d[0], attributes_.frame_tokens);
    for (const Output output : {q, k, v}) {
        outputs[output] = {3, {inputs[qkv].d[0], heads, headDim}};
    }
    const std::int64_t qBlocks = blocksOf(attributes_.frame_tokens, attributes_.block_q);
    const std::int64_t kBlocks = blocksOf(attributes_.frame_tokens, attributes_.block_k);
    outputs[qMean] = {4, {frames, expressions.constant(qBlocks), heads, headDim}};
    outputs[kMean] = {4, {frames, expressions.constant(kBlocks), heads, headDim}};
}

lf_shape PreparePlugin::checkShapes(std::int32_t dtype, const std::vector<nvinfer1::Dims>& dims) const {
    expectRank(kName, "qkv", dims[qkv], 2);
    const std::int64_t heads = attributes_.heads;
    const std::int64_t tokens = dims[qkv].d[0];
    const std::int64_t width = dims[qkv].d[1];
    const std::int64_t frames = framesOf(kName, "qkv", tokens, attributes_.frame_tokens);
    if (width == 0 || width % (6 * heads) != 0) {
        throw std::invalid_argument(std::string(kName) + ": qkv has width " + std::to_string(width) +
                                    "; expected 3 * heads * head_dim with heads = " + std::to_string(heads) +
                                    " and an even head_dim (RoPE rotates pairs)");
    }
    const std::int64_t headDim = width / (3 * heads);
    expectDims(kName, "bias", dims[bias], dimsOf({width}));
    expectDims(kName, "norm_q", dims[normQ], dimsOf({heads * headDim}));
    expectDims(kName, "norm_k", dims[normK], dimsOf({heads * headDim}));
    expectDims(kName, "cos", dims[cos], dimsOf({tokens, headDim / 2}));
    expectDims(kName, "sin", dims[sin], dimsOf({tokens, headDim / 2}));
    return {dtype, attributes_.heads, narrow(kName, "head_dim", headDim),
            narrow(kName, "chunk_frames", frames), 0};
}

std::size_t PreparePlugin::workspaceFor(const lf_shape& shape) const {
    require(lf_prepare_check(prepare_.get(), &shape));
    return 0;
}

void PreparePlugin::load() {
    require(lf_prepare_load(prepare_.get()));
}

void PreparePlugin::launch(const lf_shape& shape, const void* const* inputs, void* const* outputs, void*,
                           void* stream) const {
    const lf_prepare_buffers buffers = {inputs[qkv], inputs[bias],   inputs[normQ], inputs[normK],
                                        inputs[cos], inputs[sin],    outputs[q],    outputs[k],
                                        outputs[v],  outputs[qMean], outputs[kMean]};
    require(lf_prepare_enqueue(prepare_.get(), &shape, &buffers, stream));
}

} // namespace lightforcing::tensorrt
