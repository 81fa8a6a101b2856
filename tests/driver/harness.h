// What TensorRT would bring: a logger, dimension expressions, and the way to a plugin's creators.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

namespace harness {

using nvinfer1::Dims;

/// Keeps what was logged.
class Logger final : public nvinfer1::ILogger {
  public:
    void log(Severity severity, const nvinfer1::AsciiChar* message) noexcept override;
    std::vector<std::string> messages;
};

/// A plugin library, opened as TensorRT's registry opens it. Stays open.
class Library {
  public:
    explicit Library(const char* path);
    nvinfer1::IPluginCreatorV3One& creator(const std::string& name) const;
    const std::vector<nvinfer1::IPluginCreatorV3One*>& creators() const { return creators_; }
    Logger& logger() { return logger_; }

  private:
    class Finder final : public nvinfer1::ILoggerFinder {
      public:
        explicit Finder(Logger& logger) : logger_(logger) {}
        nvinfer1::ILogger* findLogger() override { return &logger_; }

      private:
        Logger& logger_;
    };

    Logger logger_;
    Finder finder_{logger_};
    std::vector<nvinfer1::IPluginCreatorV3One*> creators_;
};

/// A plugin with its interfaces at hand.
struct Plugin {
    explicit Plugin(nvinfer1::IPluginV3* created);

    std::unique_ptr<nvinfer1::IPluginV3> object;
    nvinfer1::IPluginV3OneCore* core;
    nvinfer1::IPluginV3OneBuildV2* build;
    nvinfer1::IPluginV3OneRuntime* runtime;
};

/// Dimension expressions of constants. Expressions live as long as the builder.
class Expressions final : public nvinfer1::IExprBuilder {
  public:
    Expressions();
    ~Expressions() noexcept override;
    nvinfer1::DimsExprs of(const Dims& dims);

  private:
    class Implementation;
    std::unique_ptr<Implementation> implementation_;
};

/// The value of an expression that Expressions made.
Dims valueOf(const nvinfer1::DimsExprs& dims);

/// A tensor of `type` and `dims`, linear; its profile has this one shape.
nvinfer1::DynamicPluginTensorDesc describe(nvinfer1::DataType type, const Dims& dims);

} // namespace harness
