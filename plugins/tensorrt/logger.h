// Where messages of the plugins go.
#pragma once

#include <string>

#include <NvInferRuntime.h>

namespace lightforcing::tensorrt {

/// Remembers how TensorRT wants its logger to be found; it outlives the plugins.
void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

/// Reports an error through TensorRT's logger, or to stderr where TensorRT has given none.
void logError(const std::string& message) noexcept;

} // namespace lightforcing::tensorrt
