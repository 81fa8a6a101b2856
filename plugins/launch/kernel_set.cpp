// Loading embedded images through the driver's context-independent library interface, and launching them.
#include "kernel_set.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <string>

#include "error.h"

namespace lightforcing {
namespace {

using cuda::check;
using cuda::driver;

constexpr std::uint32_t kDefaultSharedMemory = 48 * 1024;

/// All layers of a model share one copy of each image.
std::shared_ptr<const LoadedImage> loaded(const Image& image) {
    static std::mutex mutex;
    static std::map<const Image*, std::weak_ptr<const LoadedImage>> images;
    const std::lock_guard<std::mutex> lock(mutex);
    std::weak_ptr<const LoadedImage>& known = images[&image];
    std::shared_ptr<const LoadedImage> found = known.lock();
    if (found == nullptr) {
        found = std::make_shared<const LoadedImage>(image);
        known = found;
    }
    return found;
}

std::int32_t capabilityOf(cuda::Device device) {
    int major = 0;
    int minor = 0;
    check(driver().deviceGetAttribute(&major, cuda::kComputeCapabilityMajor, device),
          "read the compute capability");
    check(driver().deviceGetAttribute(&minor, cuda::kComputeCapabilityMinor, device),
          "read the compute capability");
    return 10 * major + minor;
}

} // namespace

LoadedImage::LoadedImage(const Image& image) : image_(image) {
    const std::string what = std::string("load kernel image ") + image.name;
    check(driver().libraryLoadData(&library_, image.cubin, nullptr, nullptr, 0, nullptr, nullptr, 0),
          what.c_str());
    if (const cuda::Result result = driver().libraryGetKernel(&kernel_, library_, image.entry);
        result != cuda::kSuccess) {
        driver().libraryUnload(library_);
        check(result, what.c_str());
    }
}

LoadedImage::~LoadedImage() {
    // The driver may have shut down already, and there is nobody to tell.
    driver().libraryUnload(library_);
}

void LoadedImage::prepareFor(cuda::Device device) const {
    if (image_.sharedMemory > kDefaultSharedMemory) {
        const std::string what = "give kernel image " + std::string(image_.name) + " " +
                                 std::to_string(image_.sharedMemory) + " bytes of shared memory";
        check(driver().kernelSetAttribute(cuda::kMaxDynamicSharedMemory,
                                          static_cast<int>(image_.sharedMemory), kernel_, device),
              what.c_str());
    }
    // The driver loads code lazily, at the first launch. That may be inside a capture, where loading is not
    // allowed.
    const std::string what = std::string("load kernel image ") + image_.name + " into the current context";
    cuda::Function function = nullptr;
    check(driver().kernelGetFunction(&function, kernel_), what.c_str());
    if (driver().funcLoad != nullptr) {
        check(driver().funcLoad(function), what.c_str());
    }
}

KernelSet::KernelSet(std::initializer_list<Kernel> kernels, const Sizes& known) {
    const cuda::Device device = cuda::currentDevice();
    architecture_ = &architectureFor(capabilityOf(device));
    for (const Image& image : architecture_->images) {
        if (std::find(kernels.begin(), kernels.end(), image.kernel) != kernels.end() &&
            serves(image, known)) {
            std::shared_ptr<const LoadedImage> ready = loaded(image);
            ready->prepareFor(device);
            loaded_.emplace_back(&image, std::move(ready));
        }
    }
}

void KernelSet::launch(Kernel kernel, const Sizes& sizes, const Values& values, cuda::Stream stream) const {
    Plan plan = makePlan(*architecture_, kernel, sizes, values);
    const auto found = std::find_if(loaded_.begin(), loaded_.end(),
                                    [&](const auto& entry) { return entry.first == plan.image; });
    if (found == loaded_.end()) {
        throw Error(LF_INTERNAL,
                    std::string("kernel image ") + plan.image->name + " was chosen and not loaded");
    }
    std::array<void*, LF_MAX_ARGUMENTS> arguments;
    std::transform(plan.arguments.begin(), plan.arguments.end(), arguments.begin(),
                   [](std::uint64_t& value) { return &value; });
    // A kernel of a library launches in the stream's context wherever a function of a module would.
    const auto function = reinterpret_cast<cuda::Function>(found->second->kernel());
    const cuda::Result result =
        driver().launchKernel(function, plan.grid[0], plan.grid[1], plan.grid[2], plan.image->threads, 1, 1,
                              plan.image->sharedMemory, stream, arguments.data(), nullptr);
    if (result != cuda::kSuccess) {
        check(result, (std::string("launch kernel ") + plan.image->name).c_str());
    }
}

DeviceTable::DeviceTable(const std::vector<std::int32_t>& values) {
    const std::size_t bytes = values.size() * sizeof(std::int32_t);
    check(driver().ctxGetCurrent(&context_), "read the current CUDA context");
    check(driver().memAlloc(&address_, bytes), "allocate device memory for the table of kept blocks");
    cuda::Result result = driver().memcpyHtoD(address_, values.data(), bytes);
    if (result == cuda::kSuccess) {
        // A small copy from pageable memory may return before it has arrived; other streams would not wait
        // for it.
        result = driver().streamSynchronize(nullptr);
    }
    if (result != cuda::kSuccess) {
        driver().memFree(address_);
        check(result, "copy the table of kept blocks to the device");
    }
}

DeviceTable::~DeviceTable() {
    // Plugins are destroyed in threads that have no context, or another one.
    if (driver().ctxPushCurrent(context_) == cuda::kSuccess) {
        driver().memFree(address_);
        driver().ctxPopCurrent(&context_);
    }
}

} // namespace lightforcing
