// The embedded kernel images and how to launch them: the C++ form of kernels.json (docs/kernels.md).
//
// The table itself is generated at build time (plugins/compile/embedding.py). Enumerators are spelled as in the image
// format, so that the generator can write them as they come; a name that is missing here fails to compile
// there.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lightforcing {

/// A constant array that lives elsewhere.
template <typename T>
struct View {
    const T* data = nullptr;
    std::size_t size = 0;

    constexpr View() = default;
    constexpr View(const T* first, std::size_t count) : data(first), size(count) {}
    template <std::size_t N>
    constexpr View(const T (&array)[N]) : data(array), size(N) {}

    constexpr const T* begin() const { return data; }
    constexpr const T* end() const { return data + size; }
    constexpr const T& operator[](std::size_t index) const { return data[index]; }
};

enum class Kernel : std::uint8_t { prepare, score, select, attend };
constexpr std::size_t kKernels = 4;

/// Integers that images are chosen by and that grids and integer arguments are made of. `dtype` is an
/// lf_dtype.
enum class Size : std::uint8_t {
    dtype,
    heads,
    head_dim,
    frame_tokens,
    chunk_frames,
    past_frames,
    frames,
    block_q,
    block_k,
    q_blocks,
    k_blocks,
    query_blocks,
    key_blocks,
    row_blocks,
    frame_elements,
    even,
};
constexpr std::size_t kSizes = 16;

/// Device addresses that the caller supplies.
enum class Buffer : std::uint8_t {
    qkv,
    bias,
    norm_q,
    norm_k,
    cos,
    sin,
    q,
    k,
    v,
    q_mean,
    k_mean,
    past_k,
    past_v,
    past_kmean,
    frame_slots,
    chunk,
    keep_q20,
    scores,
    lists,
    counts,
    out,
};
constexpr std::size_t kBuffers = 21;

/// Scalar arguments that are not sizes.
enum class Option : std::uint8_t { eps, scale, table_entries, keep_frames, sink_frames, near_frames };
constexpr std::size_t kOptions = 6;

enum class ArgumentType : std::uint8_t { pointer, int32, float32 };

/// Who supplies an argument; `null` is a pointer that is always zero.
enum class Source : std::uint8_t { buffer, option, size, null };

struct Argument {
    const char* name;
    ArgumentType type;
    Source source;
    std::uint8_t index; ///< of the Buffer, Option or Size; 0 for null
};

/// `fixed` thread blocks if that is not zero, else ceil(size / tile).
struct Axis {
    std::uint32_t fixed;
    Size size;
    std::int32_t tile;
};

/// The problem's `size` must be one of `values`.
struct Requirement {
    Size size;
    View<std::int32_t> values;
};

/// The problem's `size` must not exceed `most`.
struct Limit {
    Size size;
    std::int32_t most;
};

struct Image {
    const char* name;
    Kernel kernel;
    const unsigned char* cubin;
    std::size_t cubinBytes;
    const char* entry;
    std::uint32_t threads;
    std::uint32_t sharedMemory;
    Axis grid[3];
    View<Argument> arguments;
    View<Requirement> serves;
    View<Limit> limits;
};

struct Architecture {
    const char* target;      ///< such as "sm_90a"
    std::int32_t capability; ///< major * 10 + minor
    bool exact;              ///< runs on this capability only, not on later minor revisions
    View<Image> images;      ///< preferred ones first
};

/// The generated table.
View<Architecture> architectures();

const char* nameOf(Kernel kernel);
const char* nameOf(Size size);
const char* nameOf(Buffer buffer);
const char* nameOf(Option option);

} // namespace lightforcing
