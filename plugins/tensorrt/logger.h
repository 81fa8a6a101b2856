// Where messages of the plugins go.
#pragma once

#include <initializer_list>

#include <NvInferRuntime.h>

namespace lightforcing::tensorrt {

/// Remembers how TensorRT wants its logger to be found; it outlives the plugins.
void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

/// Reports an error, the text of all parts, through TensorRT's logger, or to stderr where TensorRT has given
/// none.
void logError(std::initializer_list<const char*> parts) noexcept;

} // namespace lightforcing::tensorrt
