// Stand-ins for TensorRT's side of the plugin interface.
#include "harness.h"

#include <dlfcn.h>

namespace harness {

void Logger::log(Severity, const nvinfer1::AsciiChar* message) noexcept {
    messages.emplace_back(message);
}

Library::Library(const char* path) {
    void* const handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        throw std::runtime_error(dlerror());
    }
    using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(std::int32_t&);
    using SetLoggerFinder = void (*)(nvinfer1::ILoggerFinder*);
    const auto getCreators = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"));
    const auto setLoggerFinder = reinterpret_cast<SetLoggerFinder>(dlsym(handle, "setLoggerFinder"));
    if (getCreators == nullptr || setLoggerFinder == nullptr) {
        throw std::runtime_error("the library has no getCreators or no setLoggerFinder");
    }
    setLoggerFinder(&finder_);
    std::int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* const creators = getCreators(count);
    for (std::int32_t index = 0; index < count; ++index) {
        if (std::strcmp(creators[index]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) {
            throw std::runtime_error("a creator is not of the interface V3One");
        }
        creators_.push_back(static_cast<nvinfer1::IPluginCreatorV3One*>(creators[index]));
    }
}

nvinfer1::IPluginCreatorV3One& Library::creator(const std::string& name) const {
    for (nvinfer1::IPluginCreatorV3One* creator : creators_) {
        if (name == creator->getPluginName()) {
            return *creator;
        }
    }
    throw std::runtime_error("there is no creator of " + name);
}

Plugin::Plugin(nvinfer1::IPluginV3* created) : object(created) {
    if (created == nullptr) {
        throw std::runtime_error("no plugin was created");
    }
    using Type = nvinfer1::PluginCapabilityType;
    core = static_cast<nvinfer1::IPluginV3OneCore*>(object->getCapabilityInterface(Type::kCORE));
    build = static_cast<nvinfer1::IPluginV3OneBuildV2*>(object->getCapabilityInterface(Type::kBUILD));
    runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(object->getCapabilityInterface(Type::kRUNTIME));
    if (core == nullptr || build == nullptr || runtime == nullptr) {
        throw std::runtime_error("the plugin lacks an interface");
    }
    const nvinfer1::InterfaceInfo info = build->getInterfaceInfo();
    if (std::strcmp(info.kind, "PLUGIN_V3ONE_BUILD") != 0 || info.major != 2) {
        throw std::runtime_error("the build interface is not V2");
    }
}

namespace {

class Constant final : public nvinfer1::IDimensionExpr {
  public:
    explicit Constant(std::int64_t value) : implementation_(value) { mImpl = &implementation_; }
    ~Constant() noexcept override = default;

  private:
    class Implementation final : public nvinfer1::apiv::VDimensionExpr {
      public:
        explicit Implementation(std::int64_t value) : value_(value) {}
        bool isConstant() const override { return true; }
        std::int64_t getConstantValue() const override { return value_; }
        bool isSizeTensor() const override { return false; }

      private:
        std::int64_t value_;
    };

    Implementation implementation_;
};

} // namespace

class Expressions::Implementation final : public nvinfer1::apiv::VExprBuilder {
  public:
    const nvinfer1::IDimensionExpr* constant(std::int64_t value) override {
        made_.push_back(std::make_unique<Constant>(value));
        return made_.back().get();
    }

    const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation operation,
                                              const nvinfer1::IDimensionExpr& first,
                                              const nvinfer1::IDimensionExpr& second) override {
        if (operation != nvinfer1::DimensionOperation::kFLOOR_DIV || second.getConstantValue() == 0) {
            return nullptr;
        }
        return constant(first.getConstantValue() / second.getConstantValue());
    }

    const nvinfer1::IDimensionExpr* declareSizeTensor(std::int32_t, const nvinfer1::IDimensionExpr&,
                                                      const nvinfer1::IDimensionExpr&) override {
        return nullptr;
    }

  private:
    std::deque<std::unique_ptr<Constant>> made_;
};

Expressions::Expressions() : implementation_(std::make_unique<Implementation>()) {
    mImpl = implementation_.get();
}

Expressions::~Expressions() noexcept = default;

nvinfer1::DimsExprs Expressions::of(const Dims& dims) {
    nvinfer1::DimsExprs result{};
    result.nbDims = dims.nbDims;
    for (std::int32_t axis = 0; axis < dims.nbDims; ++axis) {
        result.d[axis] = implementation_->constant(dims.d[axis]);
    }
    return result;
}

Dims valueOf(const nvinfer1::DimsExprs& dims) {
    Dims result{};
    result.nbDims = dims.nbDims;
    for (std::int32_t axis = 0; axis < dims.nbDims; ++axis) {
        result.d[axis] = dims.d[axis]->getConstantValue();
    }
    return result;
}

nvinfer1::DynamicPluginTensorDesc describe(nvinfer1::DataType type, const Dims& dims) {
    return {{dims, type, nvinfer1::TensorFormat::kLINEAR, 1.0F}, dims, dims, dims};
}

} // namespace harness
