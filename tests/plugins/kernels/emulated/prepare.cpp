// prepare_sm90.cu as a function of a library for a CPU.
#include KERNEL_SOURCE

alignas(16) uint8_t dynamic[1 << 18];

extern "C" void run(unsigned grid_x, unsigned grid_y, unsigned threads, uint32_t shared_bytes, uint16_t* q, uint16_t* k,
                    uint16_t* v, float* q_mean, float* k_mean, const uint16_t* qkv, const uint16_t* bias,
                    const uint16_t* norm_q, const uint16_t* norm_k, const float* cos, const float* sin,
                    int frame_tokens, int block_q, int block_k, int q_blocks, int k_blocks, int chunk_frames,
                    float eps) {
    launch(grid_x, grid_y, threads, shared_bytes, [=] {
        prepare(q, k, v, q_mean, k_mean, qkv, bias, norm_q, norm_k, cos, sin, frame_tokens, block_q, block_k,
                q_blocks, k_blocks, chunk_frames, eps);
    });
}
