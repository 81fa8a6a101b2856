// Tensors of an operator, and checking them against its contract.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "lightforcing_launch.h"

namespace lightforcing::tensorrt {

/// `compute` is the type of the operator's first input.
enum class Element { compute, float32, int32 };

struct Tensor {
    const char* name;
    Element element;
};

/// The type of a tensor, given that of the first input.
nvinfer1::DataType typeOf(Element element, nvinfer1::DataType compute);

/// The launch library's name of a type; -1 if it has none.
std::int32_t dtypeOf(nvinfer1::DataType type);

nvinfer1::Dims dimsOf(std::initializer_list<std::int64_t> sizes);

std::string describe(const nvinfer1::Dims& dims);

/// Throws std::invalid_argument unless `found` is `expected`.
void expectDims(const char* owner, const char* name, const nvinfer1::Dims& found,
                const nvinfer1::Dims& expected);

/// Throws std::invalid_argument unless `found` has `rank` dimensions, none of them negative.
void expectRank(const char* owner, const char* name, const nvinfer1::Dims& found, std::int32_t rank);

/// `value` as int32. Throws std::invalid_argument if it does not fit.
std::int32_t narrow(const char* owner, const char* name, std::int64_t value);

/// Frames in `tokens`. Throws std::invalid_argument unless they are whole frames, at least one.
std::int64_t framesOf(const char* owner, const char* name, std::int64_t tokens, std::int32_t frameTokens);

constexpr std::int64_t blocksOf(std::int64_t tokens, std::int64_t block) {
    return (tokens + block - 1) / block;
}

} // namespace lightforcing::tensorrt
