// Contract, workspace and launches of both operators (docs/operators.md).
#include "operators.h"

#include <cmath>
#include <initializer_list>
#include <string>

#include "error.h"

using namespace lightforcing;

namespace {

constexpr const char* kAttention = "HierarchicalSparseAttention";
constexpr const char* kPrepare = "QKPrepare";
constexpr std::int32_t kDenseQ20 = 1 << 20;
constexpr std::int32_t kMostTableEntries = 65536;
constexpr std::size_t kAlignment = 16;

[[noreturn]] void refuse(const char* owner, const std::string& what) {
    throw Error(LF_INVALID_ARGUMENT, std::string(owner) + ": " + what);
}

void requireAtLeast(const char* owner, const char* name, std::int32_t value, std::int32_t least) {
    if (value < least) {
        refuse(owner, std::string(name) + " is " + std::to_string(value) + "; expected at least " +
                          std::to_string(least));
    }
}

void requirePositive(const char* owner, const char* name, float value) {
    if (!(value > 0.0F) || !std::isfinite(value)) {
        refuse(owner,
               std::string(name) + " is " + std::to_string(value) + "; expected a positive finite number");
    }
}

struct NamedAddress {
    Buffer buffer;
    const void* address;
    bool required = true;
};

/// Checks the addresses and adds them to `values`.
void setBuffers(const char* owner, Values& values, std::initializer_list<NamedAddress> buffers) {
    for (const NamedAddress& named : buffers) {
        if (named.address == nullptr && named.required) {
            refuse(owner, std::string(nameOf(named.buffer)) + " is NULL; expected a device address");
        }
        if (reinterpret_cast<std::uintptr_t>(named.address) % kAlignment != 0) {
            refuse(owner, std::string(nameOf(named.buffer)) +
                              " does not start at a multiple of 16 bytes, as the kernels need");
        }
        values.set(named.buffer, named.address);
    }
}

/// Throws unless an image of each of `kernels` serves `sizes` on some embedded architecture.
void requireServed(std::initializer_list<Kernel> kernels, const Sizes& sizes) {
    const View<Architecture> all = architectures();
    if (all.size == 0) {
        throw Error(LF_NOT_SERVED, "this library holds no kernels");
    }
    for (std::size_t index = 0; index < all.size; ++index) {
        try {
            for (Kernel kernel : kernels) {
                serving(all[index], kernel, sizes);
            }
            return;
        } catch (const Error&) {
            if (index + 1 == all.size) {
                throw;
            }
        }
    }
}

/// Where the three buffers that attention works in lie in its workspace.
struct Workspace {
    std::size_t lists;
    std::size_t counts;
    std::size_t bytes;

    explicit Workspace(const Sizes& sizes) {
        const auto rows = static_cast<std::size_t>(sizes[Size::heads]) *
                          static_cast<std::size_t>(sizes[Size::query_blocks]);
        const std::size_t entries = rows * static_cast<std::size_t>(sizes[Size::key_blocks]);
        lists = aligned(entries * sizeof(float)); // scores come first
        counts = lists + aligned(entries * sizeof(std::int32_t));
        bytes = counts + rows * sizeof(std::int32_t);
    }

    static std::size_t aligned(std::size_t bytes) {
        return (bytes + kAlignment - 1) / kAlignment * kAlignment;
    }
};

} // namespace

lf_attention::lf_attention(const lf_attention_attributes& attributes) : attributes_(attributes) {
    requireAtLeast(kAttention, "frame_tokens", attributes.frame_tokens, 1);
    requireAtLeast(kAttention, "block_q", attributes.block_q, 1);
    requireAtLeast(kAttention, "block_k", attributes.block_k, 1);
    requireAtLeast(kAttention, "keep_frames", attributes.keep_frames, 1);
    requireAtLeast(kAttention, "sink_frames", attributes.sink_frames, 0);
    requireAtLeast(kAttention, "near_frames", attributes.near_frames, 0);
    if (std::int64_t{attributes.sink_frames} + attributes.near_frames > attributes.keep_frames) {
        refuse(kAttention,
               "keep_frames " + std::to_string(attributes.keep_frames) +
                   " is smaller than sink_frames + near_frames = " + std::to_string(attributes.sink_frames) +
                   " + " + std::to_string(attributes.near_frames) +
                   "; raise keep_frames or lower the other two");
    }
    requirePositive(kAttention, "scale", attributes.scale);
    if (attributes.keep_q20 == nullptr || attributes.keep_q20_count < 1 ||
        attributes.keep_q20_count > kMostTableEntries) {
        refuse(kAttention,
               "keep_q20 has " +
                   std::to_string(attributes.keep_q20 == nullptr ? 0 : attributes.keep_q20_count) +
                   " entries; expected one per chunk, 1 to " + std::to_string(kMostTableEntries));
    }
    keepQ20_.assign(attributes.keep_q20, attributes.keep_q20 + attributes.keep_q20_count);
    for (std::size_t index = 0; index < keepQ20_.size(); ++index) {
        if (keepQ20_[index] < 0 || keepQ20_[index] > kDenseQ20) {
            refuse(kAttention,
                   "keep_q20[" + std::to_string(index) + "] is " + std::to_string(keepQ20_[index]) +
                       "; expected a kept fraction times 2^20, 0 to " + std::to_string(kDenseQ20));
        }
    }
    attributes_.keep_q20 = keepQ20_.data();
}

Sizes lf_attention::sizesOf(const lf_shape& shape) const {
    return Sizes(lf_problem{shape.dtype, shape.heads, shape.head_dim, attributes_.frame_tokens,
                            shape.chunk_frames, shape.past_frames, attributes_.block_q, attributes_.block_k});
}

std::size_t lf_attention::workspace(const lf_shape& shape) const {
    const Sizes sizes = sizesOf(shape);
    if (onDevice_ == nullptr) {
        requireServed({Kernel::score, Kernel::select, Kernel::attend}, sizes);
    } else {
        for (Kernel kernel : {Kernel::score, Kernel::select, Kernel::attend}) {
            serving(onDevice_->kernels.architecture(), kernel, sizes);
        }
    }
    return Workspace(sizes).bytes;
}

void lf_attention::load() {
    if (onDevice_ == nullptr) {
        const Sizes known =
            Sizes::ofBlocks(attributes_.frame_tokens, attributes_.block_q, attributes_.block_k, 0);
        onDevice_.reset(new OnDevice{KernelSet({Kernel::score, Kernel::select, Kernel::attend}, known),
                                     DeviceTable(keepQ20_)});
    }
}

void lf_attention::enqueue(const lf_shape& shape, const lf_attention_buffers& buffers, void* workspace,
                           std::size_t bytes, void* stream) const {
    if (onDevice_ == nullptr) {
        throw Error(LF_NOT_LOADED,
                    std::string(kAttention) + ": its kernels are not loaded; call lf_attention_load first");
    }
    const Sizes sizes = sizesOf(shape);
    const Workspace layout(sizes);
    if (bytes < layout.bytes) {
        refuse(kAttention, "the workspace has " + std::to_string(bytes) + " bytes; expected " +
                               std::to_string(layout.bytes));
    }
    auto* const base = static_cast<unsigned char*>(workspace);
    if (base == nullptr) {
        refuse(kAttention, "the workspace is NULL; expected a device address");
    }
    const bool past = shape.past_frames > 0;
    Values values;
    setBuffers(kAttention, values,
               {{Buffer::q, buffers.q},
                {Buffer::k, buffers.k},
                {Buffer::v, buffers.v},
                {Buffer::q_mean, buffers.q_mean},
                {Buffer::k_mean, buffers.k_mean},
                {Buffer::past_k, buffers.past_k, false},
                {Buffer::past_v, buffers.past_v, false},
                {Buffer::past_kmean, buffers.past_kmean, false},
                {Buffer::frame_slots, buffers.frame_slots, past},
                {Buffer::chunk, buffers.chunk},
                {Buffer::out, buffers.out},
                {Buffer::scores, base},
                {Buffer::lists, base + layout.lists},
                {Buffer::counts, base + layout.counts}});
    values.set(Buffer::keep_q20, std::uint64_t{onDevice_->table.address()});
    values.set(Option::table_entries, static_cast<double>(keepQ20_.size()));
    values.set(Option::keep_frames, attributes_.keep_frames);
    values.set(Option::sink_frames, attributes_.sink_frames);
    values.set(Option::near_frames, attributes_.near_frames);
    values.set(Option::scale, attributes_.scale);
    for (Kernel kernel : {Kernel::score, Kernel::select, Kernel::attend}) {
        onDevice_->kernels.launch(kernel, sizes, values, static_cast<cuda::Stream>(stream));
    }
}

lf_prepare::lf_prepare(const lf_prepare_attributes& attributes) : attributes_(attributes) {
    requireAtLeast(kPrepare, "heads", attributes.heads, 1);
    requireAtLeast(kPrepare, "frame_tokens", attributes.frame_tokens, 1);
    requireAtLeast(kPrepare, "block_q", attributes.block_q, 1);
    requireAtLeast(kPrepare, "block_k", attributes.block_k, 1);
    requirePositive(kPrepare, "eps", attributes.eps);
}

Sizes lf_prepare::sizesOf(const lf_shape& shape) const {
    if (shape.heads != attributes_.heads) {
        refuse(kPrepare, "the tensors have " + std::to_string(shape.heads) +
                             " heads; expected its attribute heads = " + std::to_string(attributes_.heads));
    }
    return Sizes(lf_problem{shape.dtype, shape.heads, shape.head_dim, attributes_.frame_tokens,
                            shape.chunk_frames, 0, attributes_.block_q, attributes_.block_k});
}

void lf_prepare::check(const lf_shape& shape) const {
    const Sizes sizes = sizesOf(shape);
    if (kernels_ == nullptr) {
        requireServed({Kernel::prepare}, sizes);
    } else {
        serving(kernels_->architecture(), Kernel::prepare, sizes);
    }
}

void lf_prepare::load() {
    if (kernels_ == nullptr) {
        const Sizes known = Sizes::ofBlocks(attributes_.frame_tokens, attributes_.block_q,
                                            attributes_.block_k, attributes_.heads);
        kernels_ = std::make_unique<const KernelSet>(std::initializer_list<Kernel>{Kernel::prepare}, known);
    }
}

void lf_prepare::enqueue(const lf_shape& shape, const lf_prepare_buffers& buffers, void* stream) const {
    if (kernels_ == nullptr) {
        throw Error(LF_NOT_LOADED,
                    std::string(kPrepare) + ": its kernels are not loaded; call lf_prepare_load first");
    }
    Values values;
    setBuffers(kPrepare, values,
               {{Buffer::qkv, buffers.qkv},
                {Buffer::bias, buffers.bias},
                {Buffer::norm_q, buffers.norm_q},
                {Buffer::norm_k, buffers.norm_k},
                {Buffer::cos, buffers.cos},
                {Buffer::sin, buffers.sin},
                {Buffer::q, buffers.q},
                {Buffer::k, buffers.k},
                {Buffer::v, buffers.v},
                {Buffer::q_mean, buffers.q_mean},
                {Buffer::k_mean, buffers.k_mean}});
    values.set(Option::eps, attributes_.eps);
    kernels_->launch(Kernel::prepare, sizesOf(shape), values, static_cast<cuda::Stream>(stream));
}
