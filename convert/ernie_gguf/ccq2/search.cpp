// The inner loops of the calibrated encoder, for CPUs. quantize/kernels.py states what they compute and has the slow path
// that they are tested against.
//
// Matrices are stored by columns: column i of all rows lies at i*stride, so that a vector register holds the same column
// of LANES rows. Blocks of 16 rows share a code map. `width` is that of the registers, in bytes, of those that the
// machine has; vectors wider than them would be taken apart, lane by lane.

#include "ggml-ccq-code.h"

#include <cmath>
#include <cstdint>

#define GROUP    CCQ_GROUP
#define QUADS    CCQ2_QUADS
#define ROWS     16  // that share a code map
#define STEPS    5   // scales tried around the estimate: -2 ... 2
#define BOOK_RMS ((float) CCQ2_BOOK_RMS)
#define BLOCKS   4  // registers of rows that descend together, so that the search has independent chains
#define ENTRY    5  // floats of a table entry: the codeword in the metric (4), minus half its square

#define INLINE inline __attribute__((always_inline))

struct code_map {
    uint32_t m, z;
};

// One group of columns of `n` rows, and what it is encoded with: kernels_cpu.py fills it in.
struct ccq_rows {
    int64_t          n, stride;
    const float *    w;       // by columns: the weights
    const float *    d;       // [n] super scales
    const int32_t *  member;  // [n/16] the code map of each block of rows
    const code_map * maps;
    const float *    tables;  // for each code map: [16][256][5], see ENTRY
    const float *    metric;  // [16][4][4] the metric's root for each code byte
    uint8_t *        codes;   // by columns
    uint8_t *        scales;  // [n]
    float *          e;       // by columns: errors of the weights
    float *          cost;    // [n]

    INLINE ccq_rows from(int64_t i) const {
        ccq_rows rest = *this;
        rest.w += i, rest.d += i, rest.codes += i, rest.scales += i, rest.e += i, rest.cost += i;
        return rest;
    }

    INLINE code_map map_of(int64_t i) const { return maps[member[i / ROWS]]; }

    INLINE const float * table_of(int64_t i) const { return tables + (int64_t) member[i / ROWS] * QUADS * 256 * ENTRY; }
};

template <int LANES> struct vectors;

#define VECTORS(LANES)                                                   \
    template <> struct vectors<LANES> {                                  \
        typedef float    vfloat __attribute__((vector_size(4 * LANES))); \
        typedef int32_t  vint __attribute__((vector_size(4 * LANES)));   \
        typedef uint32_t vuint __attribute__((vector_size(4 * LANES)));  \
    };

VECTORS(4)
VECTORS(8)
VECTORS(16)

template <int LANES> struct kernels {
    typedef typename vectors<LANES>::vfloat vfloat;
    typedef typename vectors<LANES>::vint   vint;
    typedef typename vectors<LANES>::vuint  vuint;

    // Column i of LANES rows.
    static INLINE vfloat load(const float * columns, int64_t stride, int64_t i) {
        return *(const vfloat *) (columns + i * stride);
    }

    static INLINE void store(float * columns, int64_t stride, int64_t i, vfloat x) { *(vfloat *) (columns + i * stride) = x; }

    static INLINE vfloat splat(float x) { return x - (vfloat) { 0 }; }

    static INLINE vfloat clamp(vfloat x, float low, float high) {
        x = x < low ? splat(low) : x;
        return x > high ? splat(high) : x;
    }

    static INLINE vfloat round_even(vfloat x) {  // |x| < 2^22
        const vfloat magic = splat(12582912.0f);
        return (x + magic) - magic;
    }

    static INLINE vint load_bytes(const uint8_t * bytes) {
        vint x;
        for (int lane = 0; lane < LANES; lane++) {
            x[lane] = bytes[lane];
        }
        return x;
    }

    static INLINE void store_bytes(uint8_t * bytes, vint x) {
        for (int lane = 0; lane < LANES; lane++) {
            bytes[lane] = (uint8_t) x[lane];
        }
    }

    // The four weights of a code byte, -32 ... 31.
    static INLINE void decode(vint code, code_map map, vfloat v[4]) {
        const vuint c = ((vuint) code * map.m + map.z) >> 17;
        for (int j = 0; j < 4; j++) {
            v[j] = __builtin_convertvector((vint) ((c >> (9 - 3 * j)) & 63) - 32, vfloat);
        }
    }

    // The byte whose table entry e has the greatest score y·e + e[4], for each of `count` targets y; ties go to the lowest.
    static INLINE void nearest(const float * __restrict table,
                               int count,
                               const vfloat (*__restrict y)[4],
                               vint * __restrict best,
                               vfloat * __restrict top) {
        for (int s = 0; s < count; s++) {
            top[s]  = splat(-INFINITY);
            best[s] = (vint) { 0 };
        }
        for (int code = 0; code < 256; code++) {
            const float * e    = table + ENTRY * code;
            const vint    here = code - (vint) { 0 };
            for (int s = 0; s < count; s++) {
                const vfloat score  = y[s][0] * e[0] + (y[s][1] * e[1] + (y[s][2] * e[2] + (y[s][3] * e[3] + e[4])));
                const vint   better = score > top[s];
                top[s]              = better ? score : top[s];
                best[s]             = better ? here : best[s];
            }
        }
    }

    // out = x A for a row vector x of 4 and A [4][4].
    static INLINE void times_4x4(const vfloat x[4], const float * a, vfloat out[4]) {
        for (int j = 0; j < 4; j++) {
            out[j] = x[0] * a[j] + x[1] * a[4 + j] + x[2] * a[8 + j] + x[3] * a[12 + j];
        }
    }

    // y = what times_4x4 gives, in units of the scale: what `nearest` compares with codewords.
    static INLINE void in_units(const vfloat x[4], const float * metric, vfloat d, vfloat scale, vfloat y[4]) {
        times_4x4(x, metric, y);
        const vfloat unit = 1.0f / (d * clamp(scale, 1, 15));
        for (int j = 0; j < 4; j++) {
            y[j] *= unit;
        }
    }

    // A group encoded with one of the scales that are tried.
    struct trial {
        vfloat target[GROUP], error[GROUP], total, scale;
        vint   code[QUADS];
    };

    static INLINE void begin_trials(const ccq_rows & rows, const float * target, trial * trials) {
        const vfloat d      = load(rows.d, 0, 0);
        vfloat       square = { 0 }, rms;
        for (int i = 0; i < GROUP; i++) {
            const vfloat x = load(target, rows.stride, i);
            square += x * x;
            for (int s = 0; s < STEPS; s++) {
                trials[s].target[i] = x;
            }
        }
        for (int lane = 0; lane < LANES; lane++) {
            rms[lane] = sqrtf(square[lane] / GROUP);
        }
        const vfloat guess = round_even(clamp(rms / (BOOK_RMS * d), 0, 100));
        for (int s = 0; s < STEPS; s++) {
            trials[s].scale = clamp(guess + (float) (s - STEPS / 2), 0, 15);
            trials[s].total = (vfloat) { 0 };
        }
    }

    // Take byte q as encoded by `best`, and feed its errors into the rest of the group.
    static INLINE void feed_byte(const ccq_rows & rows, const float * feed, code_map map, int q, vint best, trial * x) {
        vfloat v[4], rest[4], seen[4];
        x->code[q] = best;
        decode(best, map, v);
        const vfloat step = load(rows.d, 0, 0) * x->scale;
        for (int j = 0; j < 4; j++) {
            x->error[4 * q + j] = load(rows.w, rows.stride, 4 * q + j) - step * v[j];
            rest[j]             = x->target[4 * q + j] - step * v[j];
        }
        times_4x4(rest, rows.metric + 16 * q, seen);
        x->total += seen[0] * seen[0] + seen[1] * seen[1] + seen[2] * seen[2] + seen[3] * seen[3];
        for (int j = 0; j < 4; j++) {
            for (int i = 4 * q + 4; i < GROUP; i++) {
                x->target[i] += x->error[4 * q + j] * feed[GROUP * (4 * q + j) + i];
            }
        }
    }

    static INLINE void store_best(const ccq_rows & rows, const trial * trials) {
        vfloat least = trials[0].total, scale = trials[0].scale;
        vint   which = { 0 };
        for (int s = 1; s < STEPS; s++) {
            const vint better = trials[s].total < least;
            least             = better ? trials[s].total : least;
            scale             = better ? trials[s].scale : scale;
            which             = better ? s - (vint) { 0 } : which;
        }
        for (int i = 0; i < GROUP; i++) {
            vfloat x = trials[0].error[i];
            for (int s = 1; s < STEPS; s++) {
                x = which == s ? trials[s].error[i] : x;
            }
            store(rows.e, rows.stride, i, x);
        }
        for (int q = 0; q < QUADS; q++) {
            vint x = trials[0].code[q];
            for (int s = 1; s < STEPS; s++) {
                x = which == s ? trials[s].code[q] : x;
            }
            store_bytes(rows.codes + q * rows.stride, x);
        }
        store_bytes(rows.scales, __builtin_convertvector(scale, vint));
        *(vfloat *) rows.cost += least;
    }

    static INLINE void feedback_lanes(const ccq_rows & rows,
                                      const float *    target,
                                      const float *    feed,
                                      code_map         map,
                                      const float *    table) {
        const vfloat d = load(rows.d, 0, 0);
        trial        trials[STEPS];
        begin_trials(rows, target, trials);
        for (int q = 0; q < QUADS; q++) {
            vfloat y[STEPS][4], top[STEPS];
            vint   best[STEPS];
            for (int s = 0; s < STEPS; s++) {
                in_units(&trials[s].target[4 * q], rows.metric + 16 * q, d, trials[s].scale, y[s]);
            }
            nearest(table + 256 * ENTRY * q, STEPS, y, best, top);
            for (int s = 0; s < STEPS; s++) {
                feed_byte(rows, feed, map, q, best[s], &trials[s]);
            }
        }
        store_best(rows, trials);
    }

    static INLINE void feedback_group(const ccq_rows & rows, const float * target, const float * feed) {
        for (int64_t i = 0; i < rows.n; i += LANES) {
            feedback_lanes(rows.from(i), target + i, feed, rows.map_of(i), rows.table_of(i));
        }
    }

    struct descent {
        vfloat e[GROUP], p[GROUP], v[GROUP], d, scale, cost;
        vint   code[QUADS];
    };

    // Move the group's scale to the best integer for its codes.
    static INLINE void descend_scale(descent * x, const float * h) {
        vfloat vh[GROUP], slope = { 0 }, bend = { 0 };
        for (int i = 0; i < GROUP; i++) {
            vh[i] = (vfloat) { 0 };
        }
        for (int k = 0; k < GROUP; k++) {
            for (int i = 0; i < GROUP; i++) {
                vh[i] += x->v[k] * h[GROUP * k + i];
            }
        }
        for (int i = 0; i < GROUP; i++) {
            slope += x->p[i] * x->v[i];
            bend += vh[i] * x->v[i];
        }
        const vfloat ideal = x->scale + slope / (x->d * bend);
        const vfloat scale = round_even(clamp(ideal, 0, 15));
        const vfloat moved = (scale - x->scale) * x->d;
        for (int i = 0; i < GROUP; i++) {
            x->e[i] -= moved * x->v[i];
            x->p[i] -= moved * vh[i];
        }
        x->cost += moved * (moved * bend - 2 * slope);
        x->scale = scale;
    }

    static INLINE void load_descent(const ccq_rows & rows, const float * eh, code_map map, descent * x) {
        x->d     = load(rows.d, 0, 0);
        x->cost  = load(rows.cost, 0, 0);
        x->scale = __builtin_convertvector(load_bytes(rows.scales), vfloat);
        for (int i = 0; i < GROUP; i++) {
            x->e[i] = load(rows.e, rows.stride, i);
            x->p[i] = load(eh, rows.stride, i);
        }
        for (int q = 0; q < QUADS; q++) {
            x->code[q] = load_bytes(rows.codes + q * rows.stride);
            decode(x->code[q], map, &x->v[4 * q]);
        }
    }

    static INLINE void store_descent(const ccq_rows & rows, const descent & x) {
        for (int i = 0; i < GROUP; i++) {
            store(rows.e, rows.stride, i, x.e[i]);
        }
        for (int q = 0; q < QUADS; q++) {
            store_bytes(rows.codes + q * rows.stride, x.code[q]);
        }
        store_bytes(rows.scales, __builtin_convertvector(x.scale, vint));
        store(rows.cost, 0, 0, x.cost);
    }

    // The weights of byte q that would be best with everything else fixed.
    static INLINE void ideal_byte(const ccq_rows & rows,
                                  const float *    h,
                                  const float *    inverse,
                                  int              q,
                                  const descent &  x,
                                  vfloat           ideal[4]) {
        vfloat rest[4];
        for (int j = 0; j < 4; j++) {  // P_k - E_k H_kk
            rest[j] = x.p[4 * q + j];
            for (int i = 0; i < 4; i++) {
                rest[j] -= x.e[4 * q + i] * h[GROUP * (4 * q + i) + 4 * q + j];
            }
        }
        times_4x4(rest, inverse + 16 * q, ideal);
        for (int j = 0; j < 4; j++) {
            ideal[j] += load(rows.w, rows.stride, 4 * q + j);
        }
    }

    static INLINE void move_byte(const float * h, code_map map, int q, vint best, descent * x) {
        vfloat       v[4];
        const vfloat step = x->d * x->scale;
        x->code[q]        = best;
        decode(best, map, v);
        for (int j = 0; j < 4; j++) {
            const vfloat moved  = step * (v[j] - x->v[4 * q + j]);
            const vfloat before = x->p[4 * q + j];
            x->v[4 * q + j]     = v[j];
            x->e[4 * q + j] -= moved;
            for (int i = 0; i < GROUP; i++) {
                x->p[i] -= moved * h[GROUP * (4 * q + j) + i];
            }
            x->cost -= moved * (before + x->p[4 * q + j]);
        }
    }

    static INLINE void descend_lanes(int              blocks,
                                     const ccq_rows & rows,
                                     const float *    eh,
                                     const float *    h,
                                     const float *    inverse,
                                     code_map         map,
                                     const float *    table) {
        descent x[BLOCKS];
        for (int b = 0; b < blocks; b++) {
            load_descent(rows.from(LANES * b), eh + LANES * b, map, &x[b]);
            descend_scale(&x[b], h);
        }
        for (int q = 0; q < QUADS; q++) {
            vfloat y[BLOCKS][4], top[BLOCKS];
            vint   best[BLOCKS];
            for (int b = 0; b < BLOCKS; b++) {  // registers without rows repeat the first
                const int lanes = b < blocks ? b : 0;
                vfloat    ideal[4];
                ideal_byte(rows.from(LANES * lanes), h, inverse, q, x[lanes], ideal);
                in_units(ideal, rows.metric + 16 * q, x[lanes].d, x[lanes].scale, y[b]);
            }
            nearest(table + 256 * ENTRY * q, BLOCKS, y, best, top);
            for (int b = 0; b < blocks; b++) {
                move_byte(h, map, q, best[b], &x[b]);
            }
        }
        for (int b = 0; b < blocks; b++) {
            store_descent(rows.from(LANES * b), x[b]);
        }
    }

    static INLINE void descend_group(const ccq_rows & rows, const float * eh, const float * h, const float * inverse) {
        for (int64_t i = 0; i < rows.n;) {
            int blocks = 1;
            while (blocks < BLOCKS && i + LANES * blocks < rows.n &&
                   rows.member[(i + LANES * blocks) / ROWS] == rows.member[i / ROWS]) {
                blocks++;
            }
            descend_lanes(blocks, rows.from(i), eh + i, h, inverse, rows.map_of(i), rows.table_of(i));
            i += LANES * blocks;
        }
    }
};

// NAME_64 and so on: a kernel in code for registers of so many bytes.
#if defined(__x86_64__)
#define COMPILE(name)                                                                                                \
    template <class... T> __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void name##_64(T... x) { \
        kernels<16>::name(x...);                                                                                     \
    }                                                                                                                \
    template <class... T> __attribute__((target("avx2,fma"))) void name##_32(T... x) {                               \
        kernels<8>::name(x...);                                                                                      \
    }                                                                                                                \
    template <class... T> void name##_16(T... x) {                                                                   \
        kernels<4>::name(x...);                                                                                      \
    }
#define CALL(name, ...) width == 64 ? name##_64(__VA_ARGS__) : width == 32 ? name##_32(__VA_ARGS__) : name##_16(__VA_ARGS__)
#else
#define COMPILE(name)
#define CALL(name, ...) (void) width, kernels<4>::name(__VA_ARGS__)
#endif

COMPILE(feedback_group)
COMPILE(descend_group)

// Encode the group with the error fed forward inside it. `target` by columns, `feed` [64][64]: see kernels.feedback_group.
extern "C" void ccq_feedback_group(int width, const ccq_rows * rows, const float * target, const float * feed) {
    CALL(feedback_group, *rows, target, feed);
}

// Revisit the group's scale and codes. `eh` by columns, `h` [64][64], the inverses of its diagonal blocks [16][4][4]: see
// kernels.descend_group.
extern "C" void ccq_descend_group(int width, const ccq_rows * rows, const float * eh, const float * h, const float * inverse) {
    CALL(descend_group, *rows, eh, h, inverse);
}
