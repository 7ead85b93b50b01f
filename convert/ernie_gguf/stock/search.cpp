// The inner loops of the calibrated encoder of llama.cpp's own types, for CPUs. quantize/stock_kernels.py states what they
// compute, quantize/stock_torch.py has the slow path that they are tested against.
//
// Matrices are stored by columns, as in ccq2/search.cpp: a vector register holds the same column of LANES rows, and `width`
// is that of the registers in bytes. The search of a grid is the other way round: a register holds LANES of its entries,
// and rows come one by one, each with the signs of its target. So the squares |g| M |g| of all entries are made
// beforehand for every pattern of signs.

#include <cmath>
#include <cstdint>
#include <vector>

#define GROUP  64
#define SIGNS  16  // bit of a code where the signs begin
#define WIDEST 16  // most lanes
#define ROWS   4   // that are searched for at once

#define INLINE inline __attribute__((always_inline))

enum { NO_SIGNS, FREE, EVEN };

// A type as stock/types.py describes it: stock_cpu.py fills it in.
struct stock_kind {
    int32_t       dim, sub, words, signs, pair, ruled, tries, uniform;
    float         a, c, low, high;  // of the rule
    float         guess, middle, min_high;
    const float * grid;    // [dim, of a pair 4][words]: levels or entries
    const float * trials;  // [tries][3]: factor, delta, shift
};

// One group of columns of `n` rows, and what it is encoded with. `fed` is the target (feedback) or E H (descent): both are
// changed on the way.
struct stock_rows {
    int64_t       n, stride;
    const float * w;
    float *       e;
    const float * d;
    const float * dmin;
    int32_t *     codes;
    float *       step;
    float *       minimum;
    float *       scales;
    float *       mins;
    float *       fed;
    float *       cost;
};

template <int LANES> struct lanes_of;

#define LANES_OF(LANES)                                                             \
    template <> struct lanes_of<LANES> {                                            \
        typedef float   vfloat __attribute__((vector_size(4 * LANES)));             \
        typedef int32_t vint __attribute__((vector_size(4 * LANES)));               \
        typedef float   ufloat __attribute__((vector_size(4 * LANES), aligned(4))); \
        typedef int32_t uint_ __attribute__((vector_size(4 * LANES), aligned(4)));  \
    };

LANES_OF(4)
LANES_OF(8)
LANES_OF(16)

template <int LANES> struct stock_kernels {
    typedef typename lanes_of<LANES>::vfloat vfloat;
    typedef typename lanes_of<LANES>::vint   vint;
    typedef typename lanes_of<LANES>::ufloat ufloat;
    typedef typename lanes_of<LANES>::uint_  uint_;

    static INLINE vfloat load(const float * x) { return *(const ufloat *) x; }

    static INLINE void store(float * x, vfloat values) { *(ufloat *) x = values; }

    static INLINE vfloat splat(float x) { return x - (vfloat) { 0 }; }

    static INLINE vfloat clamp(vfloat x, float low, float high) {
        x = x < low ? splat(low) : x;
        return x > high ? splat(high) : x;
    }

    static INLINE vfloat round_even(vfloat x) {  // |x| < 2^22
        const vfloat magic = splat(12582912.0f);
        return (x + magic) - magic;
    }

    static INLINE vfloat divided(vfloat x, vfloat by) {
        const vint none = by == 0.0f;
        return none ? splat(0) : x / (none ? splat(1) : by);
    }

    static INLINE vfloat square_root(vfloat x) {
        for (int lane = 0; lane < LANES; lane++) {
            x[lane] = sqrtf(x[lane]);
        }
        return x;
    }

    // --- steps and minima

    static INLINE void snap_step(const stock_kind & kind, vfloat ideal, vfloat d, float delta, vfloat * step, vfloat * scale) {
        if (!kind.ruled) {
            *step = ideal, *scale = splat(1);
            return;
        }
        const vfloat wanted = clamp((divided(ideal, d) - kind.c) / kind.a, -1e6f, 1e6f);
        *scale              = clamp(round_even(wanted) + delta, kind.low, kind.high);
        *step               = d * (kind.a * *scale + kind.c);
    }

    static INLINE void snap_minimum(const stock_kind & kind, vfloat ideal, vfloat dmin, vfloat * minimum, vfloat * integer) {
        *integer = round_even(clamp(divided(ideal, dmin), 0, kind.min_high));
        *minimum = dmin * *integer;
    }

    // --- the search

    // The entries g with the least squares[pattern] + line·g, for each of `count` items; ties go to the lowest.
    template <int D>
    static INLINE void least(const stock_kind & kind,
                             const float *      squares,
                             int                count,
                             const float (*line)[8],
                             const int * pattern,
                             int *       best,
                             float *     score) {
        for (int k = 0; k < count; k += ROWS) {
            vfloat        top[ROWS];
            vint          at[ROWS];
            const float * square[ROWS];
            const float * x[ROWS];
            vint          here;
            for (int lane = 0; lane < LANES; lane++) {
                here[lane] = lane;
            }
            for (int r = 0; r < ROWS; r++) {
                const int item = k + r < count ? k + r : k;
                top[r]         = splat(INFINITY);
                at[r]          = (vint) { 0 };
                square[r]      = squares + (int64_t) pattern[item] * kind.words;
                x[r]           = line[item];
            }
            for (int c = 0; c < kind.words; c += LANES) {
                vfloat g[D];
                for (int j = 0; j < D; j++) {
                    g[j] = load(kind.grid + j * kind.words + c);
                }
                for (int r = 0; r < ROWS; r++) {
                    vfloat s = load(square[r] + c);
                    for (int j = 0; j < D; j++) {
                        s += g[j] * x[r][j];
                    }
                    const vint better = s < top[r];
                    top[r]            = better ? s : top[r];
                    at[r]             = better ? here : at[r];
                }
                here += LANES;
            }
            for (int r = 0; r < ROWS && k + r < count; r++) {
                int found = 0;
                for (int lane = 1; lane < LANES; lane++) {
                    const bool less =
                        top[r][lane] < top[r][found] || (top[r][lane] == top[r][found] && at[r][lane] < at[r][found]);
                    found = less ? lane : found;
                }
                best[k + r]  = at[r][found];
                score[k + r] = top[r][found];
            }
        }
    }

    // squares [2^(D-1)][words] = |g| M |g| with the signs of a pattern; M has rows of `row` floats.
    template <int D> static INLINE void make_squares(const stock_kind & kind, const float * m, int row, float * squares) {
        for (int pattern = 0; pattern < 1 << (D - 1); pattern++) {
            float signed_m[D][D];
            for (int i = 0; i < D; i++) {
                for (int j = 0; j < D; j++) {
                    const int minus = (pattern >> i ^ pattern >> j) & 1;
                    signed_m[i][j]  = (i == j ? 1 : 2) * (minus ? -m[row * i + j] : m[row * i + j]);
                }
            }
            for (int c = 0; c < kind.words; c += LANES) {
                vfloat total = { 0 }, g[D];
                for (int i = 0; i < D; i++) {
                    g[i] = load(kind.grid + i * kind.words + c);
                }
                for (int i = 0; i < D; i++) {
                    vfloat part = g[i] * signed_m[i][i];
                    for (int j = i + 1; j < D; j++) {
                        part += g[j] * signed_m[i][j];
                    }
                    total += part * g[i];
                }
                store(squares + (int64_t) pattern * kind.words + c, total);
            }
        }
    }

    // A pattern and its opposite have the same squares.
    static INLINE int pattern_of(int signs, int d) { return (signs >> (d - 1) & 1 ? ~signs : signs) & ((1 << (d - 1)) - 1); }

    // What a block of columns needs for its search: the metric [dim][dim] and the squares of all entries.
    struct tables {
        const float *      metric;
        std::vector<float> squares, second;  // `second` of a pair's other half

        INLINE void make(const stock_kind & kind, const float * m) {
            metric = m;
            if (kind.dim == 1) {
                return;
            }
            const int d = kind.pair ? 4 : kind.dim;
            squares.resize((size_t) kind.words << (d - 1));
            if (d == 8) {
                make_squares<8>(kind, m, 8, squares.data());
                return;
            }
            make_squares<4>(kind, m, kind.dim, squares.data());
            if (kind.pair) {
                second.resize(squares.size());
                make_squares<4>(kind, m + 8 * 4 + 4, 8, second.data());
            }
        }
    };

    // A pair of entries for each item: one half, the other for it, then the first again. line holds -2 times the signed
    // target in the metric.
    static INLINE void least_pairs(const stock_kind & kind,
                                   const tables &     t,
                                   int                count,
                                   const float (*y)[8],
                                   const float (*line)[8],
                                   const int * signs,
                                   int *       best,
                                   float *     score) {
        constexpr int MOST = 8 * WIDEST;
        const float * m    = t.metric;
        float         x[MOST][8];
        int           pattern[2][MOST], low[MOST], high[MOST];
        for (int k = 0; k < count; k++) {
            pattern[0][k] = pattern_of(signs[k] & 15, 4);
            pattern[1][k] = pattern_of(signs[k] >> 4, 4);
            for (int j = 0; j < 4; j++) {
                float sum = 0;
                for (int i = 0; i < 4; i++) {
                    sum += y[k][4 + i] * m[8 * (4 + i) + 4 + j];
                }
                x[k][j] = (signs[k] >> (4 + j) & 1) ? 2 * sum : -2 * sum;
            }
        }
        least<4>(kind, t.second.data(), count, x, pattern[1], high, score);
        cross(kind, m + 4, 1, 8, count, line, signs, high, 4, x);
        least<4>(kind, t.squares.data(), count, x, pattern[0], low, score);
        float first[MOST];
        for (int k = 0; k < count; k++) {
            first[k] = t.squares[(int64_t) pattern[0][k] * kind.words + low[k]];
            for (int j = 0; j < 4; j++) {
                first[k] += line[k][j] * kind.grid[j * kind.words + low[k]];
            }
        }
        cross(kind, m + 4, 8, 1, count, line, signs, low, 0, x);
        least<4>(kind, t.second.data(), count, x, pattern[1], high, score);
        for (int k = 0; k < count; k++) {
            best[k] = low[k] | high[k] << 8;
            score[k] += first[k];
        }
    }

    // The lines of one half of a pair, given the entries of the other, whose weights begin at `from`: m[i*down + j*right]
    // is the metric between weight i of the other half and weight j of this one.
    static INLINE void cross(const stock_kind & kind,
                             const float *      m,
                             int                down,
                             int                right,
                             int                count,
                             const float (*line)[8],
                             const int * signs,
                             const int * other,
                             int         from,
                             float (*x)[8]) {
        const int to = 4 - from;
        for (int k = 0; k < count; k++) {
            for (int j = 0; j < 4; j++) {
                float sum = 0;
                for (int i = 0; i < 4; i++) {
                    const float g = kind.grid[i * kind.words + other[k]];
                    sum += (signs[k] >> (from + i) & 1 ? -g : g) * m[i * down + j * right];
                }
                x[k][j] = line[k][to + j] + 2 * ((signs[k] >> (to + j) & 1) ? -sum : sum);
            }
        }
    }

    static INLINE vfloat nearest_level(const stock_kind & kind, vfloat y, vint * code) {
        const float * levels = kind.grid;
        if (kind.uniform) {
            const vfloat x = clamp(y - levels[0], 0, (float) (kind.words - 1)) - 0.5f;
            vfloat       r = round_even(x);
            r              = r < x ? r + 1.0f : r;  // of two equally near the lower
            *code          = __builtin_convertvector(r, vint);
            return r + levels[0];
        }
        vint   at    = { 0 };
        vfloat value = splat(levels[0]);
        for (int c = 1; c < kind.words; c++) {
            const vint above = y > (levels[c - 1] + levels[c]) / 2;
            at               = above ? c - (vint) { 0 } : at;
            value            = above ? splat(levels[c]) : value;
        }
        *code = at;
        return value;
    }

    // The codewords v nearest to targets y of LANES rows.
    template <int D>
    static INLINE void nearest(const stock_kind & kind, const tables & t, const vfloat * y, vint * code, vfloat * v) {
        if (D == 1) {
            v[0] = nearest_level(kind, y[0], code);
            return;
        }
        constexpr int MOST = 8 * WIDEST;
        float         line[MOST][8], target[MOST][8], score[MOST];
        int           signs[MOST], pattern[MOST], best[MOST], first[LANES + 1], count = 0;
        for (int lane = 0; lane < LANES; lane++) {
            float row[D], in_metric[D];
            int   natural = 0;
            for (int j = 0; j < D; j++) {
                row[j] = y[j][lane];
                natural |= (row[j] < 0) << j;
            }
            for (int j = 0; j < D; j++) {
                in_metric[j] = 0;
                for (int i = 0; i < D; i++) {
                    in_metric[j] += row[i] * t.metric[D * i + j];
                }
            }
            first[lane]       = count;
            const bool uneven = kind.signs == EVEN && __builtin_parity(natural);
            for (int flip = 0; flip < (uneven ? D : 1); flip++, count++) {
                signs[count]   = uneven ? natural ^ 1 << flip : natural;
                pattern[count] = pattern_of(signs[count], D);
                for (int j = 0; j < D; j++) {
                    target[count][j] = row[j];
                    line[count][j]   = (signs[count] >> j & 1) ? 2 * in_metric[j] : -2 * in_metric[j];
                }
            }
        }
        first[LANES] = count;
        if (D == 8 && kind.pair) {
            least_pairs(kind, t, count, target, line, signs, best, score);
        } else {
            least<D>(kind, t.squares.data(), count, line, pattern, best, score);
        }
        for (int lane = 0; lane < LANES; lane++) {
            int k = first[lane];
            for (int other = k + 1; other < first[lane + 1]; other++) {
                k = score[other] < score[k] ? other : k;
            }
            (*code)[lane] = best[k] | signs[k] << SIGNS;
            for (int j = 0; j < D; j++) {
                v[j][lane] = value_of(kind, best[k], signs[k], j);
            }
        }
    }

    // (y - v) M (y - v)
    template <int D> static INLINE vfloat distance(const tables & t, const vfloat * y, const vfloat * v) {
        vfloat total = { 0 };
        for (int i = 0; i < D; i++) {
            vfloat part = { 0 };
            for (int j = 0; j < D; j++) {
                part += (y[j] - v[j]) * t.metric[D * j + i];
            }
            total += part * (y[i] - v[i]);
        }
        return total;
    }

    static INLINE float value_of(const stock_kind & kind, int entry, int signs, int j) {
        const float g = kind.pair ? kind.grid[(j & 3) * kind.words + (j < 4 ? entry & 255 : entry >> 8)] :
                                    kind.grid[j * kind.words + entry];
        return signs >> j & 1 ? -g : g;
    }

    template <int D> static INLINE void decode(const stock_kind & kind, const int32_t * codes, vfloat * v) {
        for (int lane = 0; lane < LANES; lane++) {
            for (int j = 0; j < D; j++) {
                v[j][lane] = value_of(kind, codes[lane] & ((1 << SIGNS) - 1), codes[lane] >> SIGNS, j);
            }
        }
    }

    // --- LDLQ

    struct trial {
        vfloat fed[GROUP], error[GROUP], total, step, minimum, scale, min;
        vint   code[GROUP];
    };

    template <int D>
    static INLINE void feed_trial(const stock_kind & kind,
                                  const stock_rows & rows,
                                  const tables *     t,
                                  const float *      root,
                                  const float *      feed,
                                  int                start,
                                  int64_t            i,
                                  trial *            x) {
        const int words = kind.sub / D;
        for (int q = 0; q < words; q++) {
            vfloat        y[D], v[D], rest[D];
            const float * a = root + (start / D + q) * D * D;
            for (int j = 0; j < D; j++) {
                y[j] = divided(x->fed[D * q + j] + x->minimum, x->step);
            }
            nearest<D>(kind, t[q], y, &x->code[q], v);
            for (int j = 0; j < D; j++) {
                const vfloat value  = x->step * v[j] - x->minimum;
                x->error[D * q + j] = load(rows.w + (start + D * q + j) * rows.stride + i) - value;
                rest[j]             = x->fed[D * q + j] - value;
            }
            for (int j = 0; j < D; j++) {
                vfloat seen = { 0 };
                for (int k = 0; k < D; k++) {
                    seen += rest[k] * a[D * k + j];
                }
                x->total += seen * seen;
            }
            for (int j = 0; j < D; j++) {
                const float * out = feed + GROUP * (start + D * q + j) + start;
                for (int k = D * (q + 1); k < kind.sub; k++) {
                    x->fed[k] += x->error[D * q + j] * out[k];
                }
            }
        }
    }

    static INLINE void keep_better(int sub, int words, const trial & x, trial * best) {
        const vint better = x.total < best->total;
        best->total       = better ? x.total : best->total;
        best->step        = better ? x.step : best->step;
        best->minimum     = better ? x.minimum : best->minimum;
        best->scale       = better ? x.scale : best->scale;
        best->min         = better ? x.min : best->min;
        for (int k = 0; k < sub; k++) {
            best->error[k] = better ? x.error[k] : best->error[k];
        }
        for (int q = 0; q < words; q++) {
            best->code[q] = better ? x.code[q] : best->code[q];
        }
    }

    template <int D>
    static INLINE void feedback_run(const stock_kind & kind,
                                    const stock_rows & rows,
                                    const tables *     t,
                                    const float *      root,
                                    const float *      feed,
                                    int                start,
                                    int64_t            i) {
        vfloat mean = { 0 }, square = { 0 };
        trial  x, best;
        for (int k = 0; k < kind.sub; k++) {
            mean += load(rows.fed + (start + k) * rows.stride + i);
        }
        mean = kind.min_high > 0 ? mean / (float) kind.sub : splat(0);
        for (int k = 0; k < kind.sub; k++) {
            const vfloat off = load(rows.fed + (start + k) * rows.stride + i) - mean;
            square += off * off;
        }
        const vfloat d = load(rows.d + i), dmin = load(rows.dmin + i);
        const vfloat guess = kind.guess * square_root(square / (float) kind.sub);
        best.step = best.minimum = best.scale = best.min = splat(0);
        best.total                                       = splat(INFINITY);
        for (int n = 0; n < kind.tries; n++) {
            const float * trial = kind.trials + 3 * n;
            snap_step(kind, guess * trial[0], d, trial[1], &x.step, &x.scale);
            x.minimum = x.min = x.total = splat(0);
            if (kind.min_high > 0) {
                snap_minimum(kind, (kind.middle + trial[2]) * x.step - mean, dmin, &x.minimum, &x.min);
            }
            for (int k = 0; k < kind.sub; k++) {
                x.fed[k] = load(rows.fed + (start + k) * rows.stride + i);
            }
            feed_trial<D>(kind, rows, t, root, feed, start, i, &x);
            keep_better(kind.sub, kind.sub / D, x, &best);
        }
        const int64_t run = start / kind.sub * rows.stride + i;
        store(rows.step + run, best.step);
        store(rows.minimum + run, best.minimum);
        store(rows.scales + run, best.scale);
        store(rows.mins + run, best.min);
        store(rows.cost + i, load(rows.cost + i) + best.total);
        for (int q = 0; q < kind.sub / D; q++) {
            *(uint_ *) (rows.codes + (start / D + q) * rows.stride + i) = best.code[q];
        }
        for (int k = 0; k < kind.sub; k++) {
            store(rows.e + (start + k) * rows.stride + i, best.error[k]);
        }
        for (int k = start + kind.sub; k < GROUP; k++) {
            vfloat target = load(rows.fed + k * rows.stride + i);
            for (int j = 0; j < kind.sub; j++) {
                target += best.error[j] * feed[GROUP * (start + j) + k];
            }
            store(rows.fed + k * rows.stride + i, target);
        }
    }

    // --- coordinate descent

    // Move a run's step, then its minimum, to the best that the type has for its codewords v.
    static INLINE void move_step(const stock_kind & kind,
                                 const stock_rows & rows,
                                 const float *      h,
                                 int                start,
                                 int64_t            i,
                                 const vfloat *     v,
                                 vfloat *           p) {
        const int64_t run   = start / kind.sub * rows.stride + i;
        const vfloat  old   = load(rows.step + run);
        vfloat        slope = { 0 }, bend = { 0 }, moved[GROUP], step, scale;
        for (int k = 0; k < kind.sub; k++) {
            vfloat vh = { 0 };
            for (int j = 0; j < kind.sub; j++) {
                vh += v[j] * h[GROUP * (start + j) + start + k];
            }
            slope += p[start + k] * v[k];
            bend += vh * v[k];
        }
        snap_step(kind, old + divided(slope, bend), load(rows.d + i), 0, &step, &scale);
        for (int k = 0; k < kind.sub; k++) {
            moved[k] = (step - old) * v[k];
        }
        store(rows.step + run, step);
        store(rows.scales + run, scale);
        if (kind.min_high > 0) {
            vfloat before = load(rows.minimum + run), pull = { 0 }, minimum, integer;
            float  weight = 0;
            for (int k = 0; k < kind.sub; k++) {
                pull += p[start + k];
                for (int j = 0; j < kind.sub; j++) {
                    pull -= moved[j] * h[GROUP * (start + j) + start + k];
                    weight += h[GROUP * (start + j) + start + k];
                }
            }
            snap_minimum(kind, before - pull / weight, load(rows.dmin + i), &minimum, &integer);
            for (int k = 0; k < kind.sub; k++) {
                moved[k] -= minimum - before;
            }
            store(rows.minimum + run, minimum);
            store(rows.mins + run, integer);
        }
        for (int k = 0; k < kind.sub; k++) {
            float * e = rows.e + (start + k) * rows.stride + i;
            store(e, load(e) - moved[k]);
            for (int j = 0; j < GROUP; j++) {
                p[j] -= moved[k] * h[GROUP * (start + k) + j];
            }
        }
    }

    template <int D>
    static INLINE void descend_run(const stock_kind & kind,
                                   const stock_rows & rows,
                                   const tables *     t,
                                   const float *      h,
                                   const float *      inverse,
                                   int                start,
                                   int64_t            i) {
        vfloat p[GROUP], v[GROUP];
        for (int k = 0; k < GROUP; k++) {
            p[k] = load(rows.fed + k * rows.stride + i);
        }
        for (int q = 0; q < kind.sub / D; q++) {
            decode<D>(kind, rows.codes + (start / D + q) * rows.stride + i, v + D * q);
        }
        move_step(kind, rows, h, start, i, v, p);
        const int64_t run  = start / kind.sub * rows.stride + i;
        const vfloat  step = load(rows.step + run), minimum = load(rows.minimum + run);
        for (int q = 0; q < kind.sub / D; q++) {
            const int     at = start + D * q;
            const float * a  = inverse + at / D * D * D;
            vfloat        rest[D], y[D], found[D];
            vint          code;
            for (int j = 0; j < D; j++) {  // P_k - E_k H_kk
                rest[j] = p[at + j];
                for (int k = 0; k < D; k++) {
                    rest[j] -= load(rows.e + (at + k) * rows.stride + i) * h[GROUP * (at + k) + at + j];
                }
            }
            for (int j = 0; j < D; j++) {
                y[j] = load(rows.w + (at + j) * rows.stride + i) + minimum;
                for (int k = 0; k < D; k++) {
                    y[j] += rest[k] * a[D * k + j];
                }
                y[j] = divided(y[j], step);
            }
            nearest<D>(kind, t[q], y, &code, found);
            uint_ *    codes = (uint_ *) (rows.codes + at / D * rows.stride + i);
            const vint keep  = distance<D>(t[q], y, v + D * q) < distance<D>(t[q], y, found);
            *codes           = keep ? (vint) *codes : code;  // the rule of signs may forbid what stands there
            for (int j = 0; j < D; j++) {
                found[j] = keep ? v[D * q + j] : found[j];
            }
            for (int j = 0; j < D; j++) {
                float *      e     = rows.e + (at + j) * rows.stride + i;
                const vfloat fresh = load(rows.w + (at + j) * rows.stride + i) - (step * found[j] - minimum);
                const vfloat moved = load(e) - fresh;
                store(e, fresh);
                for (int k = 0; k < GROUP; k++) {
                    p[k] -= moved * h[GROUP * (at + j) + k];
                }
            }
        }
        for (int k = 0; k < GROUP; k++) {
            store(rows.fed + k * rows.stride + i, p[k]);
        }
    }

    // --- a group, run by run

    // a and b are root and feed, or h and inverse.
    template <int D, bool DESCENT>
    static INLINE void group_of(const stock_kind & kind,
                                const stock_rows & rows,
                                const float *      metric,
                                const float *      a,
                                const float *      b) {
        const int           words = kind.sub / D;
        std::vector<tables> t(words);
        for (int start = 0; start < GROUP; start += kind.sub) {
            for (int q = 0; q < words; q++) {
                t[q].make(kind, metric + (start / D + q) * D * D);
            }
            for (int64_t i = 0; i < rows.n; i += LANES) {
                if constexpr (DESCENT) {
                    descend_run<D>(kind, rows, t.data(), a, b, start, i);
                } else {
                    feedback_run<D>(kind, rows, t.data(), a, b, start, i);
                }
            }
        }
    }

    template <bool DESCENT>
    static INLINE void group(const stock_kind & kind,
                             const stock_rows & rows,
                             const float *      metric,
                             const float *      a,
                             const float *      b) {
        if (kind.dim == 1) {
            group_of<1, DESCENT>(kind, rows, metric, a, b);
        } else if (kind.dim == 4) {
            group_of<4, DESCENT>(kind, rows, metric, a, b);
        } else {
            group_of<8, DESCENT>(kind, rows, metric, a, b);
        }
    }

    template <class... T> static INLINE void feedback_group(const T &... x) { group<false>(x...); }

    template <class... T> static INLINE void descend_group(const T &... x) { group<true>(x...); }
};

// NAME_64 and so on: a kernel in code for registers of so many bytes.
#if defined(__x86_64__)
#define COMPILE(name)                                                                                                \
    template <class... T> __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void name##_64(T... x) { \
        stock_kernels<16>::name(x...);                                                                               \
    }                                                                                                                \
    template <class... T> __attribute__((target("avx2,fma"))) void name##_32(T... x) {                               \
        stock_kernels<8>::name(x...);                                                                                \
    }                                                                                                                \
    template <class... T> void name##_16(T... x) {                                                                   \
        stock_kernels<4>::name(x...);                                                                                \
    }
#define CALL(name, ...) width == 64 ? name##_64(__VA_ARGS__) : width == 32 ? name##_32(__VA_ARGS__) : name##_16(__VA_ARGS__)
#else
#define COMPILE(name)
#define CALL(name, ...) (void) width, stock_kernels<4>::name(__VA_ARGS__)
#endif

COMPILE(feedback_group)
COMPILE(descend_group)

// LDLQ of a group. metric, root [64/dim][dim][dim]: what a block's errors cost and its root; feed [64][64].
extern "C" void stock_feedback_group(int                width,
                                     const stock_kind * kind,
                                     const stock_rows * rows,
                                     const float *      metric,
                                     const float *      root,
                                     const float *      feed) {
    CALL(feedback_group, *kind, *rows, metric, root, feed);
}

// Coordinate descent of a group. metric, inverse [64/dim][dim][dim]: the diagonal blocks of H and their inverses; h [64][64].
extern "C" void stock_descend_group(int                width,
                                    const stock_kind * kind,
                                    const stock_rows * rows,
                                    const float *      metric,
                                    const float *      h,
                                    const float *      inverse) {
    CALL(descend_group, *kind, *rows, metric, h, inverse);
}
