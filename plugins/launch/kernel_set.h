// Kernels on a device: loading the images that an operator may need, and launching them.
#pragma once

#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

#include "driver.h"
#include "plan.h"

namespace lightforcing {

/// One image, loaded into the process. Unloaded when the last operator that uses it is gone.
class LoadedImage {
  public:
    explicit LoadedImage(const Image& image);
    ~LoadedImage();
    LoadedImage(const LoadedImage&) = delete;
    LoadedImage& operator=(const LoadedImage&) = delete;

    /// Makes the image launchable in the current context, dynamic shared memory included.
    void prepareFor(cuda::Device device) const;

    cuda::Kernel kernel() const { return kernel_; }

  private:
    const Image& image_;
    cuda::Library library_ = nullptr;
    cuda::Kernel kernel_ = nullptr;
};

/// The images of an operator on the device that was current when the set was made.
class KernelSet {
  public:
    /// Loads every image of `kernels` that may serve `known` on the current device: which of them is launched
    /// depends on tensors, which come later. Throws if there is no device, or no image for it.
    KernelSet(std::initializer_list<Kernel> kernels, const Sizes& known);

    const Architecture& architecture() const { return *architecture_; }

    /// Launches `kernel` asynchronously. Throws if no loaded image serves, or the driver refuses.
    void launch(Kernel kernel, const Sizes& sizes, const Values& values, cuda::Stream stream) const;

  private:
    const Architecture* architecture_;
    std::vector<std::pair<const Image*, std::shared_ptr<const LoadedImage>>> loaded_;
};

/// An array of int32 in device memory.
class DeviceTable {
  public:
    /// Allocates in the current context and waits until the copy is done.
    explicit DeviceTable(const std::vector<std::int32_t>& values);
    ~DeviceTable();
    DeviceTable(const DeviceTable&) = delete;
    DeviceTable& operator=(const DeviceTable&) = delete;

    cuda::Address address() const { return address_; }

  private:
    cuda::Context context_ = nullptr;
    cuda::Address address_ = 0;
};

} // namespace lightforcing
