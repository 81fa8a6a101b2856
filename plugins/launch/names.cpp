// Names of the image format's vocabulary, for messages and for the planning interface.
#include "images.h"

#include <iterator>

namespace lightforcing {
namespace {

constexpr const char* kKernelNames[] = {"prepare", "score", "select", "attend"};
static_assert(std::size(kKernelNames) == kKernels);

constexpr const char* kSizeNames[] = {
    "dtype",      "heads",      "head_dim",       "frame_tokens", "chunk_frames", "past_frames",
    "frames",     "block_q",    "block_k",        "q_blocks",     "k_blocks",     "query_blocks",
    "key_blocks", "row_blocks", "frame_elements", "even",
};
static_assert(std::size(kSizeNames) == kSizes);

constexpr const char* kBufferNames[] = {
    "qkv",         "bias",  "norm_q",   "norm_k", "cos",    "sin",    "q",
    "k",           "v",     "q_mean",   "k_mean", "past_k", "past_v", "past_kmean",
    "frame_slots", "chunk", "keep_q20", "scores", "lists",  "counts", "out",
};
static_assert(std::size(kBufferNames) == kBuffers);

constexpr const char* kOptionNames[] = {"eps",         "scale",       "table_entries",
                                        "keep_frames", "sink_frames", "near_frames"};
static_assert(std::size(kOptionNames) == kOptions);

} // namespace

const char* nameOf(Kernel kernel) {
    return kKernelNames[static_cast<std::size_t>(kernel)];
}

const char* nameOf(Size size) {
    return kSizeNames[static_cast<std::size_t>(size)];
}

const char* nameOf(Buffer buffer) {
    return kBufferNames[static_cast<std::size_t>(buffer)];
}

const char* nameOf(Option option) {
    return kOptionNames[static_cast<std::size_t>(option)];
}

} // namespace lightforcing
