/* What a step of decoding does with few rows: y = x W^T at the speed at which W can be read, and norms.

   What limits such a product is how fast one thread can fetch W. Each thread therefore reads four distant parts of it side by side,
   which keeps four of the processor's prefetchers busy, and uses what it read for all rows at once. W lies as it is; nothing is packed.

   w [O, K] float or int8, x [R, K], scale [O] (int8 only) and bias [O] or null, y [R, O]. A sum's order depends on K alone, so that a
   row's result is the same to the bit whatever the rows beside it and however many threads there are. Built by native.py. */

#include <math.h>
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define WIDTH 8
typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));

static inline vec load_f32(const float *p) { return *(const vec *)p; }

static inline vec load_i8(const int8_t *p)
{
#if defined(__AVX2__) /* compilers make a dozen instructions of the loop below */
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vec v;
    for (int i = 0; i < WIDTH; i++) v[i] = p[i];
    return v;
#endif
}

/* Fused or not is written out and not left to the compiler, which decides anew for each number of rows. */
static inline vec add_product(vec sum, vec a, vec b)
{
#if defined(__AVX2__) && defined(__FMA__)
    return _mm256_fmadd_ps(a, b, sum);
#else
    return sum + a * b;
#endif
}

static inline float total(vec a) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }

/* The last `left` < 8 numbers, and zeros: the same sums in the same order for any number of rows. */
#define LOAD_END(NAME, T)                                                                                                                  \
    static inline vec end_##NAME(const T *p, long left)                                                                                    \
    {                                                                                                                                      \
        T part[WIDTH] = {0};                                                                                                               \
        for (long i = 0; i < left; i++) part[i] = p[i];                                                                                    \
        return load_##NAME(part);                                                                                                          \
    }
LOAD_END(f32, float)
LOAD_END(i8, int8_t)

/* R rows and S outputs that lie `apart` outputs from one another; their S R sums stay in registers. */
#define TILE(NAME, T, S, R)                                                                                                                \
    static inline void NAME##_##S##_##R(const T *w, const float *x, const float *scale, const float *bias, float *y, long K, long O,       \
                                        long apart)                                                                                        \
    {                                                                                                                                      \
        vec sums[S][R] = {}, rows[R];                                                                                                      \
        long k = 0;                                                                                                                        \
        for (; k + WIDTH <= K; k += WIDTH) {                                                                                               \
            for (int r = 0; r < R; r++) rows[r] = load_f32(x + r * K + k);                                                                 \
            for (int s = 0; s < S; s++) {                                                                                                  \
                vec weights = load_##NAME(w + s * apart * K + k);                                                                          \
                for (int r = 0; r < R; r++) sums[s][r] = add_product(sums[s][r], weights, rows[r]);                                        \
            }                                                                                                                              \
        }                                                                                                                                  \
        if (k < K) {                                                                                                                       \
            for (int r = 0; r < R; r++) rows[r] = end_f32(x + r * K + k, K - k);                                                           \
            for (int s = 0; s < S; s++) {                                                                                                  \
                vec weights = end_##NAME(w + s * apart * K + k, K - k);                                                                    \
                for (int r = 0; r < R; r++) sums[s][r] = add_product(sums[s][r], weights, rows[r]);                                        \
            }                                                                                                                              \
        }                                                                                                                                  \
        for (int s = 0; s < S; s++)                                                                                                        \
            for (int r = 0; r < R; r++) {                                                                                                  \
                float sum = total(sums[s][r]);                                                                                             \
                if (scale) sum *= scale[s * apart];                                                                                        \
                y[r * O + s * apart] = bias ? sum + bias[s * apart] : sum;                                                                 \
            }                                                                                                                              \
    }

struct job { const void *w; const float *x, *scale, *bias; float *y; long R, K, O; int is_parallel; };

static int (*thread_number)(void), (*team_size)(void); /* which may be less than was asked for */
static void (*run_in_parallel)(void (*)(void *), void *, unsigned, unsigned);

/* Thread n of N does the n-th part of each of the four quarters of the outputs, and the last thread the outputs that are left over. */
#define WORK(NAME, T)                                                                                                                      \
    TILE(NAME, T, 4, 1) TILE(NAME, T, 4, 2) TILE(NAME, T, 4, 3) TILE(NAME, T, 1, 1) TILE(NAME, T, 1, 2) TILE(NAME, T, 1, 3)                \
    static void work_##NAME(void *data)                                                                                                    \
    {                                                                                                                                      \
        const struct job *job = data;                                                                                                      \
        long K = job->K, O = job->O, R = job->R, quarter = O / 4;                                                                          \
        long n = job->is_parallel ? thread_number() : 0, num = job->is_parallel ? team_size() : 1;                                         \
        long end = quarter * (n + 1) / num;                                                                                                \
        for (long o = quarter * n / num; o < end; o++)                                                                                     \
            for (long r = 0; r < R; r += 3) /* all rows before the next output: its weights are still in the cache */                      \
                if (R - r == 1) NAME##_4_1(ARGUMENTS(T, o), quarter);                                                                      \
                else if (R - r == 2) NAME##_4_2(ARGUMENTS(T, o), quarter);                                                                 \
                else NAME##_4_3(ARGUMENTS(T, o), quarter);                                                                                 \
        if (n < num - 1) return;                                                                                                           \
        for (long o = 4 * quarter; o < O; o++)                                                                                             \
            for (long r = 0; r < R; r += 3)                                                                                                \
                if (R - r == 1) NAME##_1_1(ARGUMENTS(T, o), 0);                                                                            \
                else if (R - r == 2) NAME##_1_2(ARGUMENTS(T, o), 0);                                                                       \
                else NAME##_1_3(ARGUMENTS(T, o), 0);                                                                                       \
    }
#define ARGUMENTS(T, o)                                                                                                                    \
    (const T *)job->w + (o) * K, job->x + r * K, job->scale ? job->scale + (o) : 0, job->bias ? job->bias + (o) : 0, job->y + r * O + (o), \
        K, O

WORK(f32, float)
WORK(i8, int8_t)

/* The OpenMP runtime that torch runs on, handed over so that there is one team of threads. Without: one thread. */
void use_threads(void *parallel, void *number, void *size)
{
    run_in_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    thread_number = (int (*)(void))number, team_size = (int (*)(void))size;
}

void linear_rows(const void *w, const float *x, const float *scale, const float *bias, float *y, long R, long K, long O, int num_threads)
{
    struct job job = {w, x, scale, bias, y, R, K, O, run_in_parallel && num_threads > 1 && O * K >= 1 << 16};
    void (*work)(void *) = scale ? work_i8 : work_f32;
    if (job.is_parallel) run_in_parallel(work, &job, num_threads, 0);
    else work(&job);
}

/* y = x / sqrt(mean x^2 + eps) * weight, row by row: torch takes five kernels, each of which costs more than the sums. */
void rms_norm(const float *x, const float *weight, float *y, long R, long K, float eps)
{
    for (long r = 0; r < R; r++, x += K, y += K) {
        vec squares = {};
        long k = 0;
        for (; k + WIDTH <= K; k += WIDTH) squares = add_product(squares, load_f32(x + k), load_f32(x + k));
        if (k < K) squares = add_product(squares, end_f32(x + k, K - k), end_f32(x + k, K - k));
        float factor = 1 / sqrtf(total(squares) / K + eps);
        for (k = 0; k < K; k++) y[k] = x[k] * factor * weight[k];
    }
}
