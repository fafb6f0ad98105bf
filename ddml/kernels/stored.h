/* Vectors of doubles, read from and written to numbers that are stored in double or single precision. */

#include "vectors.h"

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
