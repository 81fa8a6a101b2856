// Which image serves a problem, and with what grid and arguments: the rules of runtime/program/kernels.py.
#pragma once

#include <array>
#include <bitset>
#include <cstdint>
#include <string>

#include "images.h"
#include "lightforcing_launch.h"

namespace lightforcing {

/// The integers that follow from a problem. Unknown ones suit every image.
class Sizes {
  public:
    /// Everything is known. Throws LF_INVALID_ARGUMENT if a size is out of range.
    explicit Sizes(const lf_problem& problem);

    /// Only the geometry of blocks is known, before any tensor has been seen; heads too if positive.
    static Sizes ofBlocks(std::int32_t frameTokens, std::int32_t blockQ, std::int32_t blockK,
                          std::int32_t heads);

    std::int64_t operator[](Size size) const { return values_[static_cast<std::size_t>(size)]; }
    bool knows(Size size) const { return (*this)[size] != kUnknown; }

    /// `dtype bfloat16, heads 12, ...`: what the caller chose, for messages.
    std::string describe() const;

  private:
    static constexpr std::int64_t kUnknown = -1;

    Sizes() { values_.fill(kUnknown); }
    void set(Size size, std::int64_t value) { values_[static_cast<std::size_t>(size)] = value; }
    void setBlocks(std::int64_t frameTokens, std::int64_t blockQ, std::int64_t blockK);

    std::array<std::int64_t, kSizes> values_;
};

/// Arguments of the caller: device addresses and options. An option is exact as int32 and as float32.
class Values {
  public:
    void set(Buffer buffer, const void* address) { set(buffer, reinterpret_cast<std::uintptr_t>(address)); }
    void set(Buffer buffer, std::uint64_t address);
    void set(Option option, double number);

    bool has(const Argument& argument) const;
    std::uint64_t address(std::size_t buffer) const { return addresses_[buffer]; }
    double number(std::size_t option) const { return numbers_[option]; }

  private:
    std::array<std::uint64_t, kBuffers> addresses_{};
    std::array<double, kOptions> numbers_{};
    std::bitset<kBuffers> hasAddress_;
    std::bitset<kOptions> hasNumber_;
};

/// One launch. `arguments` holds the bits of each, 32-bit ones in the lower half.
struct Plan {
    const Image* image;
    std::array<std::uint32_t, 3> grid;
    std::array<std::uint64_t, LF_MAX_ARGUMENTS> arguments;
};

/// The embedded images for a device of compute capability `capability` (major * 10 + minor).
const Architecture& architectureFor(std::int32_t capability);

/// Whether `image` serves a problem of these sizes; sizes that are not known yet are taken to fit.
bool serves(const Image& image, const Sizes& sizes);

/// The first image of `kernel` that serves `sizes`. Throws LF_NOT_SERVED with what is served.
const Image& serving(const Architecture& architecture, Kernel kernel, const Sizes& sizes);

/// Chooses an image and lays out its launch. Throws if no image serves, or an argument is missing.
Plan makePlan(const Architecture& architecture, Kernel kernel, const Sizes& sizes, const Values& values);

} // namespace lightforcing
