// Dimensions and types.
#include "shapes.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace lightforcing::tensorrt {

using nvinfer1::DataType;
using nvinfer1::Dims;

DataType typeOf(Element element, DataType compute) {
    switch (element) {
    case Element::float32:
        return DataType::kFLOAT;
    case Element::int32:
        return DataType::kINT32;
    case Element::compute:
        break;
    }
    return compute;
}

std::int32_t dtypeOf(DataType type) {
    switch (type) {
    case DataType::kFLOAT:
        return LF_FLOAT32;
    case DataType::kHALF:
        return LF_FLOAT16;
    case DataType::kBF16:
        return LF_BFLOAT16;
    default:
        return -1;
    }
}

Dims dimsOf(std::initializer_list<std::int64_t> sizes) {
    Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), dims.d);
    return dims;
}

std::string describe(const Dims& dims) {
    std::string text = "[";
    for (std::int32_t axis = 0; axis < std::clamp(dims.nbDims, 0, Dims::MAX_DIMS); ++axis) {
        text += (axis == 0 ? "" : ", ") + std::to_string(dims.d[axis]);
    }
    return text + "]";
}

void expectDims(const char* owner, const char* name, const Dims& found, const Dims& expected) {
    if (found.nbDims != expected.nbDims || !std::equal(expected.d, expected.d + expected.nbDims, found.d)) {
        throw std::invalid_argument(std::string(owner) + ": " + name + " has shape " + describe(found) +
                                    "; expected " + describe(expected));
    }
}

void expectRank(const char* owner, const char* name, const Dims& found, std::int32_t rank) {
    if (found.nbDims != rank ||
        std::any_of(found.d, found.d + rank, [](std::int64_t size) { return size < 0; })) {
        throw std::invalid_argument(std::string(owner) + ": " + name + " has shape " + describe(found) +
                                    "; expected " + std::to_string(rank) + " known dimensions");
    }
}

std::int32_t narrow(const char* owner, const char* name, std::int64_t value) {
    if (value < 0 || value > std::numeric_limits<std::int32_t>::max()) {
        throw std::invalid_argument(std::string(owner) + ": " + name + " is " + std::to_string(value) +
                                    "; the kernels count in 32 bits");
    }
    return static_cast<std::int32_t>(value);
}

std::int64_t framesOf(const char* owner, const char* name, std::int64_t tokens, std::int32_t frameTokens) {
    if (tokens <= 0 || tokens % frameTokens != 0) {
        throw std::invalid_argument(std::string(owner) + ": " + name + " has " + std::to_string(tokens) +
                                    " tokens; expected whole frames, a positive multiple of frame_tokens = " +
                                    std::to_string(frameTokens));
    }
    return tokens / frameTokens;
}

} // namespace lightforcing::tensorrt
