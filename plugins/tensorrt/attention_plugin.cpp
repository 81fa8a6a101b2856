// HierarchicalSparseAttention: fields, shapes and the call into the launch library.
#include "attention_plugin.h"

#include <stdexcept>
#include <utility>

namespace lightforcing::tensorrt {
namespace {

enum Input { q, k, v, qMean, kMean, pastK, pastV, pastKMean, frameSlots, chunk };

const std::vector<Tensor> kInputs = {
    {"q", Element::compute},      {"k", Element::compute},          {"v", Element::compute},
    {"q_mean", Element::float32}, {"k_mean", Element::float32},     {"past_k", Element::compute},
    {"past_v", Element::compute}, {"past_kmean", Element::float32}, {"frame_slots", Element::int32},
    {"chunk", Element::int32},
};
const std::vector<Tensor> kOutputs = {{"out", Element::compute}};

} // namespace

const std::vector<const char*>& AttentionPlugin::fieldNames() {
    static const std::vector<const char*> names = {"frame_tokens", "block_q",     "block_k", "keep_frames",
                                                   "sink_frames",  "near_frames", "scale",   "keep_q20"};
    return names;
}

std::unique_ptr<OperatorPlugin> AttentionPlugin::create(const nvinfer1::PluginFieldCollection* fields) {
    const FieldReader reader(kName, fields, fieldNames());
    lf_attention_attributes attributes{};
    attributes.frame_tokens = reader.integer("frame_tokens");
    attributes.block_q = reader.integer("block_q");
    attributes.block_k = reader.integer("block_k");
    attributes.keep_frames = reader.integer("keep_frames");
    attributes.sink_frames = reader.integer("sink_frames");
    attributes.near_frames = reader.integer("near_frames");
    attributes.scale = reader.real("scale");
    return std::unique_ptr<OperatorPlugin>(new AttentionPlugin(attributes, reader.integers("keep_q20")));
}

AttentionPlugin::AttentionPlugin(const lf_attention_attributes& attributes, std::vector<std::int32_t> keepQ20)
    : OperatorPlugin(kName, kInputs, kOutputs), attributes_(attributes), keepQ20_(std::move(keepQ20)) {
    attributes_.keep_q20 = keepQ20_.data();
    attributes_.keep_q20_count = static_cast<std::int32_t>(keepQ20_.size());
    lf_attention* attention = nullptr;
    require(lf_attention_create(&attributes_, &attention));
    attention_.reset(attention);
    fields().add("frame_tokens", attributes_.frame_tokens);
    fields().add("block_q", attributes_.block_q);
    fields().add("block_k", attributes_.block_k);
    fields().add("keep_frames", attributes_.keep_frames);
    fields().add("sink_frames", attributes_.sink_frames);
    fields().add("near_frames", attributes_.near_frames);
    fields().add("scale", attributes_.scale);
    fields().add("keep_q20", keepQ20_);
}

std::unique_ptr<OperatorPlugin> AttentionPlugin::copy() const {
    return std::unique_ptr<OperatorPlugin>(new AttentionPlugin(attributes_, keepQ20_));
}

void AttentionPlugin::describeOutputs(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                                      nvinfer1::IExprBuilder&) const {
    if (inputs[q].nbDims != 3) {
        throw std::invalid_argument("q has " + std::to_string(inputs[q].nbDims) +
                                    " dimensions; expected [T, H, D]");
    }
    outputs[0] = inputs[q];
}

lf_shape AttentionPlugin::checkShapes(std::int32_t dtype, const std::vector<nvinfer1::Dims>& dims) const {
    expectRank(kName, "q", dims[q], 3);
    expectRank(kName, "past_k", dims[pastK], 4);
    expectRank(kName, "frame_slots", dims[frameSlots], 1);
    const std::int32_t frameTokens = attributes_.frame_tokens;
    const std::int64_t heads = dims[q].d[1];
    const std::int64_t headDim = dims[q].d[2];
    const std::int64_t frames = framesOf(kName, "q", dims[q].d[0], frameTokens);
    const std::int64_t slots = dims[pastK].d[0];
    const std::int64_t qBlocks = blocksOf(frameTokens, attributes_.block_q);
    const std::int64_t kBlocks = blocksOf(frameTokens, attributes_.block_k);
    const nvinfer1::Dims cache = dimsOf({slots, frameTokens, heads, headDim});
    expectDims(kName, "k", dims[k], dims[q]);
    expectDims(kName, "v", dims[v], dims[q]);
    expectDims(kName, "q_mean", dims[qMean], dimsOf({frames, qBlocks, heads, headDim}));
    expectDims(kName, "k_mean", dims[kMean], dimsOf({frames, kBlocks, heads, headDim}));
    expectDims(kName, "past_k", dims[pastK], cache);
    expectDims(kName, "past_v", dims[pastV], cache);
    expectDims(kName, "past_kmean", dims[pastKMean], dimsOf({slots, kBlocks, heads, headDim}));
    expectDims(kName, "chunk", dims[chunk], dimsOf({}));
    return {dtype, narrow(kName, "heads", heads), narrow(kName, "head_dim", headDim),
            narrow(kName, "chunk_frames", frames), narrow(kName, "past_frames", dims[frameSlots].d[0])};
}

std::size_t AttentionPlugin::workspaceFor(const lf_shape& shape) const {
    std::size_t bytes = 0;
    require(lf_attention_workspace(attention_.get(), &shape, &bytes));
    return bytes;
}

void AttentionPlugin::load() {
    require(lf_attention_load(attention_.get()));
}

void AttentionPlugin::launch(const lf_shape& shape, const void* const* inputs, void* const* outputs,
                             void* workspace, void* stream) const {
    const lf_attention_buffers buffers = {inputs[q],          inputs[k],     inputs[v],     inputs[qMean],
                                          inputs[kMean],      inputs[pastK], inputs[pastV], inputs[pastKMean],
                                          inputs[frameSlots], inputs[chunk], outputs[0]};
    // TensorRT provides what getWorkspaceSize asked for.
    const std::size_t bytes = workspaceFor(shape);
    require(lf_attention_enqueue(attention_.get(), &shape, &buffers, workspace, bytes, stream));
}

} // namespace lightforcing::tensorrt
