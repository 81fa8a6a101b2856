// The plugin creators, and the entry points through which TensorRT finds them.
//
// Two ways lead here. TensorRT's registry loads the library (IPluginRegistry::loadLibrary, trtexec
// --dynamicPlugins) and asks getCreators. Others only open it (trtexec --staticPlugins, Polygraphy --plugins,
// Triton's plugins=) and expect it to register itself; it does so where libnvinfer is in the process or the
// dynamic linker finds it. TensorRT-RTX has no plugins: nothing is ever registered there by itself.
#include <array>
#include <vector>

#include <NvInferRuntime.h>

#include "attention_plugin.h"
#include "logger.h"
#include "prepare_plugin.h"
#include "tensorrt_library.h"

namespace lightforcing::tensorrt {
namespace {

template <typename Plugin>
class Creator final : public nvinfer1::IPluginCreatorV3One {
  public:
    Creator() {
        for (const char* name : Plugin::fieldNames()) {
            fields_.emplace_back(name);
        }
        collection_.nbFields = static_cast<std::int32_t>(fields_.size());
        collection_.fields = fields_.data();
    }

    nvinfer1::IPluginV3* createPlugin(const nvinfer1::AsciiChar* name,
                                      const nvinfer1::PluginFieldCollection* fc,
                                      nvinfer1::TensorRTPhase) noexcept override {
        // An engine stores the attributes as the network had them: both phases read the same fields.
        try {
            return Plugin::create(fc).release();
        } catch (const std::exception& error) {
            logError({"cannot create plugin '", name != nullptr ? name : "", "': ", error.what()});
        } catch (...) {
            logError({"cannot create plugin '", name != nullptr ? name : "", "': unknown error"});
        }
        return nullptr;
    }

    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    const nvinfer1::AsciiChar* getPluginName() const noexcept override { return Plugin::kName; }
    const nvinfer1::AsciiChar* getPluginVersion() const noexcept override { return kVersion; }
    const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override { return kNamespace; }

  private:
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

std::array<nvinfer1::IPluginCreatorInterface*, 2>& creators() {
    // Never destroyed: TensorRT may ask for them while the process ends.
    static auto& attention = *new Creator<AttentionPlugin>;
    static auto& prepare = *new Creator<PreparePlugin>;
    static std::array<nvinfer1::IPluginCreatorInterface*, 2> all = {&attention, &prepare};
    return all;
}

/// The registry with which this library has registered itself; null if it has not.
nvinfer1::IPluginRegistry* ownRegistry = nullptr;

/// Registers when the library is opened, as a library that links libnvinfer would with
/// REGISTER_TENSORRT_PLUGIN.
__attribute__((constructor)) void registerWhenOpened() {
    // Polygraphy opens plugins before TensorRT. The registry keeps our creators: its library stays.
    void* const library = openTensorRT(true);
    using GetRegistry = nvinfer1::IPluginRegistry* (*)() noexcept;
    const auto getRegistry =
        library != nullptr ? reinterpret_cast<GetRegistry>(dlsym(library, "getPluginRegistry")) : nullptr;
    nvinfer1::IPluginRegistry* const registry = getRegistry != nullptr ? getRegistry() : nullptr;
    if (registry == nullptr) {
        return;
    }
    for (nvinfer1::IPluginCreatorInterface* creator : creators()) {
        registry->registerCreator(*creator, kNamespace);
    }
    ownRegistry = registry;
}

} // namespace

nvinfer1::IPluginCreatorInterface* const* handOver(std::int32_t& count) noexcept {
    // TensorRT registers what it is given and fails where it is registered already: take our registration
    // back.
    if (ownRegistry != nullptr) {
        for (nvinfer1::IPluginCreatorInterface* creator : creators()) {
            ownRegistry->deregisterCreator(*creator);
        }
        ownRegistry = nullptr;
    }
    count = static_cast<std::int32_t>(creators().size());
    return creators().data();
}

} // namespace lightforcing::tensorrt

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const*
getCreators(std::int32_t& nbCreators) {
    return lightforcing::tensorrt::handOver(nbCreators);
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    lightforcing::tensorrt::setLoggerFinder(finder);
}
