// attend_sm90.cu as a function of a library for a CPU.
#include KERNEL_SOURCE

uint8_t dynamic[1 << 18];

extern "C" void run(unsigned grid_x, unsigned grid_y, unsigned threads, uint32_t shared_bytes, uint16_t* out, const uint16_t* q,
                    const uint16_t* k, const uint16_t* v, const uint16_t* past_k, const uint16_t* past_v,
                    const int* frame_slots, const int* lists, const int* counts, int heads, int frame_tokens,
                    int past_frames, int query_blocks, int q_blocks, int key_blocks, int block_k, float scale) {
    launch(grid_x, grid_y, threads, shared_bytes, [=] {
        attend(out, q, k, v, past_k, past_v, frame_slots, lists, counts, heads, frame_tokens, past_frames, query_blocks,
               q_blocks, key_blocks, block_k, scale);
    });
}
