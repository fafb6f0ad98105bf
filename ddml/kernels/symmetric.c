/* Dense symmetric matrices: the lower triangle, rows packed one behind the other, stored in double or single
   precision. One pass over the memory applies a rank-two change and multiplies by a vector. */

#include "vectors.h"


#define ROWS 6    /* at a time: the vectors are read once for all of them */
#define AHEAD 128 /* numbers that are asked for before they are needed: a sixth less time here */
#define LANES ((long)(BYTES / sizeof(double)))
typedef double vec __attribute__((vector_size(BYTES)));
typedef double loose __attribute__((vector_size(BYTES), aligned(sizeof(double)), may_alias));

INLINE vec all(double x) { return x - (vec){0}; }

/* Whole vectors of stored numbers. What `write` returns is what is stored. */
INLINE vec read_double(const double *from) { return *(const loose *)from; }
INLINE vec write_double(double *to, vec x) { return *(loose *)to = x; }

#if defined(__AVX512F__) || defined(__AVX__) /* the compiler's own conversions go through half as wide vectors */
#include <immintrin.h>
#if defined(__AVX512F__)
#define WIDEN(x) _mm512_cvtps_pd(x)
#define NARROW(x) _mm512_cvtpd_ps(x)
typedef __m256 half;
#else
#define WIDEN(x) _mm256_cvtps_pd(x)
#define NARROW(x) _mm256_cvtpd_ps(x)
typedef __m128 half;
#endif
#else
#define WIDEN(x) __builtin_convertvector(x, vec)
#define NARROW(x) __builtin_convertvector(x, half)
typedef float half __attribute__((vector_size(BYTES / 2)));
#endif

INLINE vec read_float(const float *from)
{
    half x;
    memcpy(&x, from, sizeof x);
    return WIDEN(x);
}

INLINE vec write_float(float *to, vec x)
{
    const half rounded = NARROW(x);
    memcpy(to, &rounded, sizeof rounded);
    return WIDEN(rounded);
}

#define SUFFIX double
#define STORE double
#include "symmetric_template.h"
#undef SUFFIX
#undef STORE

#define SUFFIX float
#define STORE float
#include "symmetric_template.h"
