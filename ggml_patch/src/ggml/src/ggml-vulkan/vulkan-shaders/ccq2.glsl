// ccq2 in shaders: see ggml-ccq.h for the rows.
//
// A row is a whole number of units of 16 bytes: the header (M, Z, d, 0), one unit of codes for each group of 64 weights,
// then the group scales, four bits each. So the shaders see ccq2 as a type with blocks of 64 weights and 16 bytes, whose
// rows are longer than their weights: strides and offsets are counted in such blocks, block 0 of a row is its header.

#define QUANT_K_CCQ2 64
#define QUANT_R_CCQ2 1

#define CCQ2_HEADER 1u  // units before the codes

// Code byte b as u = b*M + Z: the four windows of the code lie at bits 26, 23, 20 and 17.
uint ccq2_code(const uint codes, const uint b, const uint M, const uint Z) {
    return bitfieldExtract(codes, int(8u * b), 8) * M + Z;
}

// The four weights of code byte b of a word of codes, times four, as signed bytes in order.
//
// A window in the top six bits of a byte is four times its value: u and u << 6 bring two of them to the top of their high
// halves, a further << 3 the other two. Flipping the top bit takes the offset of 32 off.
int32_t ccq2_unpack(const uint codes, const uint b, const uint M, const uint Z) {
    const uint u     = ccq2_code(codes, b, M, Z);
    const uint pairs = (u >> 16) | ((u << 6) & 0xFFFF0000u);
    return int32_t((((pairs >> 8) & 0x00FC00FCu) | ((pairs << 3) & 0xFC00FC00u)) ^ 0x80808080u);
}

// what the unpacked weights are too large by
#define CCQ2_UNPACKED 4.0

// The four weights of code byte b of a word of codes, plus CCQ2_ABOVE, without scale: a window is the top of the mantissa
// of a number from 64 to 127.
vec4 ccq2_values(const uint codes, const uint b, const uint M, const uint Z) {
    const uint u = ccq2_code(codes, b, M, Z);
    return uintBitsToFloat((uvec4(u >> 9, u >> 6, u >> 3, u) & 0x007E0000u) | 0x42800000u);
}

#define CCQ2_ABOVE 96.0

// In the words of a row of k weights: where the scale of weight i is, and its first bit there.
uint ccq2_scale_word(const uint k, const uint i) {
    return 4u * CCQ2_HEADER + k / 16u + i / 512u;
}
uint ccq2_scale_bit(const uint i) {
    return (8u * ((i >> 7) & 3u)) | (4u - 4u * ((i >> 6) & 1u));
}
