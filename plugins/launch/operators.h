// The two operators as sequences of launches, behind the handles of the C interface.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernel_set.h"
#include "lightforcing_launch.h"
#include "plan.h"

/// HierarchicalSparseAttention: score, select, attend.
struct lf_attention {
  public:
    explicit lf_attention(const lf_attention_attributes& attributes);

    std::size_t workspace(const lf_shape& shape) const;
    void load();
    void enqueue(const lf_shape& shape, const lf_attention_buffers& buffers, void* workspace,
                 std::size_t bytes, void* stream) const;

  private:
    struct OnDevice {
        lightforcing::KernelSet kernels;
        lightforcing::DeviceTable table;
    };

    lightforcing::Sizes sizesOf(const lf_shape& shape) const;

    lf_attention_attributes attributes_;
    std::vector<std::int32_t> keepQ20_;
    std::unique_ptr<const OnDevice> onDevice_;
};

/// QKPrepare: one kernel.
struct lf_prepare {
  public:
    explicit lf_prepare(const lf_prepare_attributes& attributes);

    void check(const lf_shape& shape) const;
    void load();
    void enqueue(const lf_shape& shape, const lf_prepare_buffers& buffers, void* stream) const;

  private:
    lightforcing::Sizes sizesOf(const lf_shape& shape) const;

    lf_prepare_attributes attributes_;
    std::unique_ptr<const lightforcing::KernelSet> kernels_;
};
