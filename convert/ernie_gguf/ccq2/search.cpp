// The inner loops of the calibrated encoder, for CPUs. quantize/kernels.py states what they compute and has the slow path
// that they are tested against.
//
// Matrices are stored by columns: column i of all rows lies at i*stride, so that a vector register holds the same column
// of LANES rows. Blocks of 16 rows share a code map. `width` is that of the registers, in bytes, of those that the
// machine has; vectors wider than them would be taken apart, lane by lane.

#include <cmath>
#include <cstdint>

#define GROUP    64
#define QUADS    16  // code bytes of a group
#define ROWS     16  // that share a code map
#define STEPS    5   // scales tried around the estimate: -2 ... 2
#define BOOK_RMS 16.5f
#define BLOCKS   4  // registers of rows that descend together, so that the search has independent chains
#define ENTRY    5  // floats of a table entry: the codeword in the metric (4), minus half its square

#define INLINE inline __attribute__((always_inline))

struct code_map {
    uint32_t m, z;
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

    // The byte whose table entry e has the greatest score y·e + e[4], for each of `count` targets y; of equals the lowest.
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

    static INLINE void feedback_lanes(int64_t       stride,
                                      const float * w,
                                      const float * t,
                                      const float * super_scales,
                                      const float * metric,
                                      const float * feed,
                                      code_map      map,
                                      const float * table,
                                      uint8_t *     codes,
                                      uint8_t *     scales,
                                      float *       e,
                                      float *       cost) {
        const vfloat d = load(super_scales, 0, 0);
        vfloat       target[STEPS][GROUP], error[STEPS][GROUP], total[STEPS], scale[STEPS];
        vint         code[STEPS][QUADS];
        vfloat       square = { 0 };
        for (int i = 0; i < GROUP; i++) {
            const vfloat x = load(t, stride, i);
            square += x * x;
            for (int s = 0; s < STEPS; s++) {
                target[s][i] = x;
            }
        }
        vfloat rms;
        for (int lane = 0; lane < LANES; lane++) {
            rms[lane] = sqrtf(square[lane] / GROUP);
        }
        const vfloat guess = round_even(clamp(rms / (BOOK_RMS * d), 0, 100));
        for (int s = 0; s < STEPS; s++) {
            scale[s] = clamp(guess + (float) (s - STEPS / 2), 0, 15);
            total[s] = (vfloat) { 0 };
        }
        for (int q = 0; q < QUADS; q++) {
            vfloat y[STEPS][4];
            for (int s = 0; s < STEPS; s++) {
                times_4x4(&target[s][4 * q], metric + 16 * q, y[s]);
                const vfloat unit = 1.0f / (d * clamp(scale[s], 1, 15));
                for (int j = 0; j < 4; j++) {
                    y[s][j] *= unit;
                }
            }
            vint   best[STEPS];
            vfloat top[STEPS];
            nearest(table + 256 * ENTRY * q, STEPS, y, best, top);
            for (int s = 0; s < STEPS; s++) {
                vfloat v[4], rest[4], seen[4];
                code[s][q] = best[s];
                decode(best[s], map, v);
                const vfloat step = d * scale[s];
                for (int j = 0; j < 4; j++) {
                    error[s][4 * q + j] = load(w, stride, 4 * q + j) - step * v[j];
                    rest[j]             = target[s][4 * q + j] - step * v[j];
                }
                times_4x4(rest, metric + 16 * q, seen);
                total[s] += seen[0] * seen[0] + seen[1] * seen[1] + seen[2] * seen[2] + seen[3] * seen[3];
                for (int j = 0; j < 4; j++) {
                    const vfloat x = error[s][4 * q + j];
                    for (int i = 4 * q + 4; i < GROUP; i++) {
                        target[s][i] += x * feed[GROUP * (4 * q + j) + i];
                    }
                }
            }
        }
        vfloat least = total[0], chosen = scale[0];
        vint   which = { 0 };
        for (int s = 1; s < STEPS; s++) {
            const vint better = total[s] < least;
            least             = better ? total[s] : least;
            chosen            = better ? scale[s] : chosen;
            which             = better ? s - (vint) { 0 } : which;
        }
        for (int i = 0; i < GROUP; i++) {
            vfloat x = error[0][i];
            for (int s = 1; s < STEPS; s++) {
                x = which == s ? error[s][i] : x;
            }
            store(e, stride, i, x);
        }
        for (int q = 0; q < QUADS; q++) {
            vint x = code[0][q];
            for (int s = 1; s < STEPS; s++) {
                x = which == s ? code[s][q] : x;
            }
            store_bytes(codes + q * stride, x);
        }
        store_bytes(scales, __builtin_convertvector(chosen, vint));
        *(vfloat *) cost += least;
    }

    static INLINE void feedback_group(int64_t          n,
                                      int64_t          stride,
                                      const uint32_t * maps,
                                      const float *    w,
                                      const float *    t,
                                      const float *    d,
                                      const float *    metric,
                                      const float *    feed,
                                      const float *    tables,
                                      const int32_t *  member,
                                      uint8_t *        codes,
                                      uint8_t *        scales,
                                      float *          e,
                                      float *          cost) {
        for (int64_t i = 0; i < n; i += LANES) {
            const int32_t  p   = member[i / ROWS];
            const code_map map = { maps[2 * p], maps[2 * p + 1] };
            feedback_lanes(stride, w + i, t + i, d + i, metric, feed, map, tables + (int64_t) p * QUADS * 256 * ENTRY,
                           codes + i, scales + i, e + i, cost + i);
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

    static INLINE void descend_lanes(int           blocks,
                                     int64_t       stride,
                                     const float * w,
                                     const float * d,
                                     const float * h,
                                     const float * inverse,
                                     const float * metric,
                                     code_map      map,
                                     const float * table,
                                     const float * p,
                                     uint8_t *     codes,
                                     uint8_t *     scales,
                                     float *       e,
                                     float *       cost) {
        descent x[BLOCKS];
        for (int b = 0; b < blocks; b++) {
            x[b].d     = *(const vfloat *) (d + LANES * b);
            x[b].cost  = *(const vfloat *) (cost + LANES * b);
            x[b].scale = __builtin_convertvector(load_bytes(scales + LANES * b), vfloat);
            for (int i = 0; i < GROUP; i++) {
                x[b].e[i] = load(e + LANES * b, stride, i);
                x[b].p[i] = load(p + LANES * b, stride, i);
            }
            for (int q = 0; q < QUADS; q++) {
                x[b].code[q] = load_bytes(codes + q * stride + LANES * b);
                decode(x[b].code[q], map, &x[b].v[4 * q]);
            }
            descend_scale(&x[b], h);
        }
        for (int q = 0; q < QUADS; q++) {
            vfloat y[STEPS][4];
            vint   best[STEPS];
            vfloat top[STEPS];
            for (int b = 0; b < BLOCKS; b++) {
                const descent * lanes = &x[b < blocks ? b : 0];
                vfloat          rest[4], back[4];
                for (int j = 0; j < 4; j++) {  // P_k - E_k H_kk
                    rest[j] = lanes->p[4 * q + j];
                    for (int i = 0; i < 4; i++) {
                        rest[j] -= lanes->e[4 * q + i] * h[GROUP * (4 * q + i) + 4 * q + j];
                    }
                }
                times_4x4(rest, inverse + 16 * q, back);
                for (int j = 0; j < 4; j++) {
                    back[j] += load(w + LANES * (b < blocks ? b : 0), stride, 4 * q + j);
                }
                times_4x4(back, metric + 16 * q, y[b]);
                const vfloat unit = 1.0f / (lanes->d * clamp(lanes->scale, 1, 15));
                for (int j = 0; j < 4; j++) {
                    y[b][j] *= unit;
                }
            }
            nearest(table + 256 * ENTRY * q, BLOCKS, y, best, top);
            for (int b = 0; b < blocks; b++) {
                vfloat       v[4];
                const vfloat step = x[b].d * x[b].scale;
                x[b].code[q]      = best[b];
                decode(best[b], map, v);
                for (int j = 0; j < 4; j++) {
                    const vfloat moved  = step * (v[j] - x[b].v[4 * q + j]);
                    const vfloat before = x[b].p[4 * q + j];
                    x[b].v[4 * q + j]   = v[j];
                    x[b].e[4 * q + j] -= moved;
                    for (int i = 0; i < GROUP; i++) {
                        x[b].p[i] -= moved * h[GROUP * (4 * q + j) + i];
                    }
                    x[b].cost -= moved * (before + x[b].p[4 * q + j]);
                }
            }
        }
        for (int b = 0; b < blocks; b++) {
            for (int i = 0; i < GROUP; i++) {
                store(e + LANES * b, stride, i, x[b].e[i]);
            }
            for (int q = 0; q < QUADS; q++) {
                store_bytes(codes + q * stride + LANES * b, x[b].code[q]);
            }
            store_bytes(scales + LANES * b, __builtin_convertvector(x[b].scale, vint));
            *(vfloat *) (cost + LANES * b) = x[b].cost;
        }
    }

    static INLINE void descend_group(int64_t          n,
                                     int64_t          stride,
                                     const uint32_t * maps,
                                     const float *    w,
                                     const float *    p,
                                     const float *    d,
                                     const float *    h,
                                     const float *    inverse,
                                     const float *    metric,
                                     const float *    tables,
                                     const int32_t *  member,
                                     uint8_t *        codes,
                                     uint8_t *        scales,
                                     float *          e,
                                     float *          cost) {
        for (int64_t i = 0; i < n;) {
            const int32_t a      = member[i / ROWS];
            int           blocks = 1;
            while (blocks < BLOCKS && i + LANES * blocks < n && member[(i + LANES * blocks) / ROWS] == a) {
                blocks++;
            }
            const code_map map = { maps[2 * a], maps[2 * a + 1] };
            descend_lanes(blocks, stride, w + i, d + i, h, inverse, metric, map, tables + (int64_t) a * QUADS * 256 * ENTRY,
                          p + i, codes + i, scales + i, e + i, cost + i);
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

// Encode one group of columns of `n` rows, with the error fed forward inside the group. See kernels.feedback_group.
extern "C" void ccq_feedback_group(int              width,
                                   int64_t          n,
                                   int64_t          stride,
                                   const uint32_t * maps,
                                   const float *    w,
                                   const float *    t,
                                   const float *    d,
                                   const float *    metric,
                                   const float *    feed,
                                   const float *    tables,
                                   const int32_t *  member,
                                   uint8_t *        codes,
                                   uint8_t *        scales,
                                   float *          e,
                                   float *          cost) {
    CALL(feedback_group, n, stride, maps, w, t, d, metric, feed, tables, member, codes, scales, e, cost);
}

// Revisit scale and codes of one group of columns of `n` rows. See kernels.descend_group.
extern "C" void ccq_descend_group(int              width,
                                  int64_t          n,
                                  int64_t          stride,
                                  const uint32_t * maps,
                                  const float *    w,
                                  const float *    p,
                                  const float *    d,
                                  const float *    h,
                                  const float *    inverse,
                                  const float *    metric,
                                  const float *    tables,
                                  const int32_t *  member,
                                  uint8_t *        codes,
                                  uint8_t *        scales,
                                  float *          e,
                                  float *          cost) {
    CALL(descend_group, n, stride, maps, w, p, d, h, inverse, metric, tables, member, codes, scales, e, cost);
}
