// Choosing an image and laying out its launch.
#include "plan.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <set>
#include <vector>

#include "error.h"

namespace lightforcing {
namespace {

constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();

std::int64_t ceilDiv(std::int64_t value, std::int64_t divisor) {
    return (value + divisor - 1) / divisor;
}

/// The product of two numbers that are not negative, or kMost + 1 where it is larger than kMost.
std::int64_t product(std::int64_t first, std::int64_t second) {
    return first != 0 && second > kMost / first ? kMost + 1 : first * second;
}

const char* nameOfDtype(std::int64_t dtype) {
    return dtype == LF_FLOAT32 ? "float32" : dtype == LF_FLOAT16 ? "float16" : "bfloat16";
}

std::string textOf(Size size, std::int64_t value) {
    return size == Size::dtype ? nameOfDtype(value) : std::to_string(value);
}

std::string join(const std::vector<std::string>& parts, const char* separator) {
    std::string text;
    for (const std::string& part : parts) {
        text += text.empty() ? part : separator + part;
    }
    return text;
}

/// What the images of a kernel serve between them.
std::string describeServed(const Architecture& architecture, Kernel kernel) {
    std::vector<std::string> parts;
    for (std::size_t index = 0; index < kSizes; ++index) {
        const auto size = static_cast<Size>(index);
        std::set<std::string> values;
        std::int32_t most = 0;
        for (const Image& image : architecture.images) {
            if (image.kernel != kernel) {
                continue;
            }
            for (const Requirement& requirement : image.serves) {
                if (requirement.size == size) {
                    for (std::int32_t value : requirement.values) {
                        values.insert(textOf(size, value));
                    }
                }
            }
            for (const Limit& limit : image.limits) {
                most = limit.size == size ? std::max(most, limit.most) : most;
            }
        }
        if (!values.empty()) {
            parts.push_back(std::string(nameOf(size)) + " " + join({values.begin(), values.end()}, ", "));
        }
        if (most > 0) {
            parts.push_back(std::string(nameOf(size)) + " up to " + std::to_string(most));
        }
    }
    return parts.empty() ? "there are no images of this kernel"
                         : "its images serve (not in every combination) " + join(parts, "; ");
}

std::uint64_t bitsOf(const Argument& argument, double number) {
    std::uint64_t bits = 0;
    if (argument.type == ArgumentType::int32) {
        const auto value = static_cast<std::int32_t>(number);
        std::memcpy(&bits, &value, sizeof value);
    } else {
        const auto value = static_cast<float>(number);
        std::memcpy(&bits, &value, sizeof value);
    }
    return bits;
}

std::uint64_t bitsOf(const Argument& argument, const Sizes& sizes, const Values& values) {
    switch (argument.source) {
    case Source::buffer:
        return values.address(argument.index);
    case Source::option:
        return bitsOf(argument, values.number(argument.index));
    case Source::size:
        return bitsOf(argument, static_cast<double>(sizes[static_cast<Size>(argument.index)]));
    case Source::null:
        break;
    }
    return 0;
}

} // namespace

Sizes::Sizes(const lf_problem& problem) : Sizes() {
    const struct {
        const char* name;
        std::int32_t value;
        std::int32_t least;
    } given[] = {
        {"heads", problem.heads, 1},
        {"head_dim", problem.head_dim, 1},
        {"frame_tokens", problem.frame_tokens, 1},
        {"chunk_frames", problem.chunk_frames, 1},
        {"past_frames", problem.past_frames, 0},
        {"block_q", problem.block_q, 1},
        {"block_k", problem.block_k, 1},
    };
    if (problem.dtype != LF_FLOAT32 && problem.dtype != LF_FLOAT16 && problem.dtype != LF_BFLOAT16) {
        throw Error(LF_INVALID_ARGUMENT, "dtype is " + std::to_string(problem.dtype) +
                                             "; expected 0 (float32), 1 (float16) or 2 (bfloat16)");
    }
    for (const auto& size : given) {
        if (size.value < size.least) {
            throw Error(LF_INVALID_ARGUMENT, std::string(size.name) + " is " + std::to_string(size.value) +
                                                 "; expected at least " + std::to_string(size.least));
        }
    }
    setBlocks(problem.frame_tokens, problem.block_q, problem.block_k);
    const std::int64_t frames = std::int64_t{problem.past_frames} + problem.chunk_frames;
    const std::int64_t qBlocks = (*this)[Size::q_blocks];
    const std::int64_t kBlocks = (*this)[Size::k_blocks];
    set(Size::dtype, problem.dtype);
    set(Size::heads, problem.heads);
    set(Size::head_dim, problem.head_dim);
    set(Size::chunk_frames, problem.chunk_frames);
    set(Size::past_frames, problem.past_frames);
    set(Size::frames, frames);
    set(Size::query_blocks, product(problem.chunk_frames, qBlocks));
    set(Size::key_blocks, product(frames, kBlocks));
    set(Size::row_blocks, product(problem.chunk_frames, std::max(qBlocks, kBlocks)));
    set(Size::frame_elements, product(problem.frame_tokens, product(problem.heads, problem.head_dim)));
    for (std::size_t index = 0; index < kSizes; ++index) {
        if (values_[index] > kMost) {
            throw Error(LF_INVALID_ARGUMENT, std::string(nameOf(static_cast<Size>(index))) +
                                                 " is larger than " + std::to_string(kMost) +
                                                 "; the kernels count in 32 bits");
        }
    }
}

Sizes Sizes::ofBlocks(std::int32_t frameTokens, std::int32_t blockQ, std::int32_t blockK,
                      std::int32_t heads) {
    Sizes sizes;
    sizes.setBlocks(frameTokens, blockQ, blockK);
    if (heads > 0) {
        sizes.set(Size::heads, heads);
    }
    return sizes;
}

void Sizes::setBlocks(std::int64_t frameTokens, std::int64_t blockQ, std::int64_t blockK) {
    set(Size::frame_tokens, frameTokens);
    set(Size::block_q, blockQ);
    set(Size::block_k, blockK);
    set(Size::q_blocks, ceilDiv(frameTokens, blockQ));
    set(Size::k_blocks, ceilDiv(frameTokens, blockK));
    set(Size::even, frameTokens % blockQ == 0 && frameTokens % blockK == 0);
}

std::string Sizes::describe() const {
    std::vector<std::string> parts;
    for (Size size : {Size::dtype, Size::heads, Size::head_dim, Size::frame_tokens, Size::chunk_frames,
                      Size::past_frames, Size::block_q, Size::block_k}) {
        if (knows(size)) {
            parts.push_back(std::string(nameOf(size)) + " " + textOf(size, (*this)[size]));
        }
    }
    return join(parts, ", ");
}

void Values::set(Buffer buffer, std::uint64_t address) {
    const auto index = static_cast<std::size_t>(buffer);
    addresses_[index] = address;
    hasAddress_.set(index);
}

void Values::set(Option option, double number) {
    const auto index = static_cast<std::size_t>(option);
    numbers_[index] = number;
    hasNumber_.set(index);
}

bool Values::has(const Argument& argument) const {
    switch (argument.source) {
    case Source::buffer:
        return hasAddress_[argument.index];
    case Source::option:
        return hasNumber_[argument.index];
    case Source::size:
    case Source::null:
        break;
    }
    return true;
}

const Architecture& architectureFor(std::int32_t capability) {
    const Architecture* best = nullptr;
    std::vector<std::string> held;
    for (const Architecture& offered : architectures()) {
        held.push_back(offered.target);
        const bool runs =
            offered.exact ? capability == offered.capability
                          : capability / 10 == offered.capability / 10 && capability >= offered.capability;
        if (runs && (best == nullptr || offered.capability > best->capability)) {
            best = &offered;
        }
    }
    if (best == nullptr) {
        throw Error(LF_NOT_SERVED,
                    "this library holds kernels for " + (held.empty() ? "none" : join(held, ", ")) +
                        "; the device has compute capability " + std::to_string(capability / 10) + "." +
                        std::to_string(capability % 10) +
                        ". Build it with `python -m plugins build --tensorrt --arch sm_...`");
    }
    return *best;
}

bool serves(const Image& image, const Sizes& sizes) {
    const auto among = [&](const Requirement& requirement) {
        const auto& values = requirement.values;
        return !sizes.knows(requirement.size) ||
               std::find(values.begin(), values.end(), sizes[requirement.size]) != values.end();
    };
    const auto within = [&](const Limit& limit) { return sizes[limit.size] <= limit.most; };
    return std::all_of(image.serves.begin(), image.serves.end(), among) &&
           std::all_of(image.limits.begin(), image.limits.end(), within);
}

const Image& serving(const Architecture& architecture, Kernel kernel, const Sizes& sizes) {
    for (const Image& image : architecture.images) {
        if (image.kernel == kernel && serves(image, sizes)) {
            return image;
        }
    }
    throw Error(LF_NOT_SERVED, std::string("no '") + nameOf(kernel) + "' kernel for " + architecture.target +
                                   " serves " + sizes.describe() + "; " +
                                   describeServed(architecture, kernel) +
                                   ". Build the missing specialisation or change the block sizes");
}

Plan makePlan(const Architecture& architecture, Kernel kernel, const Sizes& sizes, const Values& values) {
    Plan plan{};
    const Image& image = serving(architecture, kernel, sizes);
    plan.image = &image;
    for (std::size_t axis = 0; axis < plan.grid.size(); ++axis) {
        const Axis& wanted = image.grid[axis];
        plan.grid[axis] = wanted.fixed != 0
                              ? wanted.fixed
                              : static_cast<std::uint32_t>(ceilDiv(sizes[wanted.size], wanted.tile));
    }
    std::vector<std::string> missing;
    for (std::size_t position = 0; position < image.arguments.size; ++position) {
        const Argument& argument = image.arguments[position];
        if (!values.has(argument)) {
            missing.emplace_back(argument.name);
        }
        plan.arguments[position] = bitsOf(argument, sizes, values);
    }
    if (!missing.empty()) {
        throw Error(LF_INVALID_ARGUMENT, std::string("image ") + image.name + " needs argument(s) " +
                                             join(missing, ", ") + " that the caller does not supply");
    }
    return plan;
}

} // namespace lightforcing
