// Finding TensorRT's logger without linking its library.
#include "logger.h"

#include <atomic>
#include <cstdio>
#include <string>

#include "tensorrt_library.h"

namespace lightforcing::tensorrt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> loggerFinder{nullptr};

nvinfer1::ILogger* findLogger() {
    if (nvinfer1::ILoggerFinder* const finder = loggerFinder.load()) {
        if (nvinfer1::ILogger* const logger = finder->findLogger()) {
            return logger;
        }
    }
    // A library that was opened rather than registered gets no finder.
    void* const library = openTensorRT(false);
    if (library == nullptr) {
        return nullptr;
    }
    const auto getLogger = reinterpret_cast<nvinfer1::ILogger* (*)() noexcept>(dlsym(library, "getLogger"));
    dlclose(library); // gives the reference back; whoever loaded the library keeps it
    return getLogger != nullptr ? getLogger() : nullptr;
}

} // namespace

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
    loggerFinder.store(finder);
}

void logError(std::initializer_list<const char*> parts) noexcept {
    try {
        std::string text = "lightforcing: ";
        for (const char* part : parts) {
            text += part;
        }
        if (nvinfer1::ILogger* const logger = findLogger()) {
            logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
        } else {
            std::fprintf(stderr, "%s\n", text.c_str());
        }
    } catch (...) {
        std::fputs("lightforcing: an error could not be reported\n", stderr);
    }
}

} // namespace lightforcing::tensorrt
