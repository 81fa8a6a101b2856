// The C interface: argument checks at the door, and no exception past it.
#include <algorithm>
#include <cstring>
#include <string>

#include "error.h"
#include "lightforcing_launch.h"
#include "operators.h"
#include "plan.h"

using namespace lightforcing;

namespace {

template <typename T>
T& dereference(T* pointer, const char* name) {
    if (pointer == nullptr) {
        throw Error(LF_INVALID_ARGUMENT, std::string(name) + " is NULL");
    }
    return *pointer;
}

/// The enumerator of that name, or `count` if there is none.
template <typename Enum>
std::size_t indexOf(const char* name, std::size_t count) {
    std::size_t index = 0;
    while (index < count && std::strcmp(nameOf(static_cast<Enum>(index)), name) != 0) {
        ++index;
    }
    return index;
}

Values valuesOf(const lf_value* values, std::size_t count) {
    Values known;
    const lf_value* const first = count == 0 ? nullptr : &dereference(values, "values");
    for (const lf_value& given : View<lf_value>(first, count)) {
        const char* name = &dereference(given.name, "the name of a value");
        const std::size_t buffer = indexOf<Buffer>(name, kBuffers);
        const std::size_t option = indexOf<Option>(name, kOptions);
        if (buffer < kBuffers) {
            known.set(static_cast<Buffer>(buffer), given.address);
        } else if (option < kOptions) {
            known.set(static_cast<Option>(option), given.number);
        } else {
            throw Error(LF_INVALID_ARGUMENT, std::string("no kernel has a buffer or option '") + name + "'");
        }
    }
    return known;
}

} // namespace

const char* lf_architectures(void) {
    static const std::string text = [] {
        std::string joined;
        for (const Architecture& architecture : architectures()) {
            joined += (joined.empty() ? "" : " ") + std::string(architecture.target);
        }
        return joined;
    }();
    return text.c_str();
}

int lf_serves_dtype(int32_t dtype) {
    for (const Architecture& architecture : architectures()) {
        for (const Image& image : architecture.images) {
            for (const Requirement& requirement : image.serves) {
                const auto& values = requirement.values;
                if (requirement.size == Size::dtype &&
                    std::find(values.begin(), values.end(), dtype) != values.end()) {
                    return 1;
                }
            }
        }
    }
    return 0;
}

lf_status lf_attention_create(const lf_attention_attributes* attributes, lf_attention** attention) {
    return guarded([&] {
        lf_attention*& handle = dereference(attention, "attention");
        handle = nullptr;
        handle = new lf_attention(dereference(attributes, "attributes"));
    });
}

void lf_attention_destroy(lf_attention* attention) {
    delete attention;
}

lf_status lf_attention_workspace(const lf_attention* attention, const lf_shape* shape, size_t* bytes) {
    return guarded([&] {
        dereference(bytes, "bytes") =
            dereference(attention, "attention").workspace(dereference(shape, "shape"));
    });
}

lf_status lf_attention_load(lf_attention* attention) {
    return guarded([&] { dereference(attention, "attention").load(); });
}

lf_status lf_attention_enqueue(const lf_attention* attention, const lf_shape* shape,
                               const lf_attention_buffers* buffers, void* workspace, size_t workspace_bytes,
                               void* stream) {
    return guarded([&] {
        dereference(attention, "attention")
            .enqueue(dereference(shape, "shape"), dereference(buffers, "buffers"), workspace, workspace_bytes,
                     stream);
    });
}

lf_status lf_prepare_create(const lf_prepare_attributes* attributes, lf_prepare** prepare) {
    return guarded([&] {
        lf_prepare*& handle = dereference(prepare, "prepare");
        handle = nullptr;
        handle = new lf_prepare(dereference(attributes, "attributes"));
    });
}

void lf_prepare_destroy(lf_prepare* prepare) {
    delete prepare;
}

lf_status lf_prepare_check(const lf_prepare* prepare, const lf_shape* shape) {
    return guarded([&] { dereference(prepare, "prepare").check(dereference(shape, "shape")); });
}

lf_status lf_prepare_load(lf_prepare* prepare) {
    return guarded([&] { dereference(prepare, "prepare").load(); });
}

lf_status lf_prepare_enqueue(const lf_prepare* prepare, const lf_shape* shape,
                             const lf_prepare_buffers* buffers, void* stream) {
    return guarded([&] {
        dereference(prepare, "prepare")
            .enqueue(dereference(shape, "shape"), dereference(buffers, "buffers"), stream);
    });
}

lf_status lf_make_plan(int32_t capability, const char* kernel, const lf_problem* problem,
                       const lf_value* values, size_t value_count, lf_plan* plan) {
    return guarded([&] {
        const char* name = &dereference(kernel, "kernel");
        const std::size_t index = indexOf<Kernel>(name, kKernels);
        if (index == kKernels) {
            throw Error(LF_INVALID_ARGUMENT, std::string("there is no kernel '") + name +
                                                 "'; expected prepare, score, select or attend");
        }
        const Plan made = makePlan(architectureFor(capability), static_cast<Kernel>(index),
                                   Sizes(dereference(problem, "problem")), valuesOf(values, value_count));
        lf_plan& result = dereference(plan, "plan");
        result.image = made.image->name;
        result.cubin = made.image->cubin;
        result.cubin_bytes = made.image->cubinBytes;
        std::copy(made.grid.begin(), made.grid.end(), result.grid);
        result.threads = made.image->threads;
        result.shared_memory = made.image->sharedMemory;
        result.argument_count = static_cast<std::uint32_t>(made.image->arguments.size);
        std::copy(made.arguments.begin(), made.arguments.end(), result.arguments);
    });
}
