/* The code of factored.c for one precision of the stored numbers, STORE; all sums are in double precision. */

/* `height` rows, the first of them at f; see below. */
INLINE void NAME(block)(const int height, const int change, STORE *f, long size, double keep, const double *alpha,
                        const double *beta, const double *a, const double *b, const double *g, double *image,
                        double *product)
{
    vec sum[ROWS], left_a[ROWS], left_b[ROWS];
    const vec kept = all(keep);
    UNROLL for (int r = 0; r < height; r++) {
        sum[r] = all(0);
        if (change) left_a[r] = all(alpha[r]), left_b[r] = all(beta[r]);
    }
    const long whole = size - size % LANES;
    for (long c = 0; c < whole; c += LANES) {
        const vec right = *(const loose *)(g + c);
        vec right_a, right_b;
        if (change) right_a = *(const loose *)(a + c), right_b = *(const loose *)(b + c);
        UNROLL for (int r = 0; r < height; r++) {
            STORE *here = f + r * size + c;
            __builtin_prefetch(here + AHEAD, change);
            vec value = NAME(read)(here);
            if (change) value = NAME(write)(here, kept * value + left_a[r] * right_a + left_b[r] * right_b);
            sum[r] += value * right;
        }
    }
    UNROLL for (int r = 0; r < height; r++) {
        double part[LANES], total = 0;
        memcpy(part, &sum[r], sizeof part);
        for (long l = 0; l < LANES; l++) total += part[l];
        STORE *line = f + r * size;
        for (long c = whole; c < size; c++) {
            if (change) line[c] = (STORE)(keep * line[c] + alpha[r] * a[c] + beta[r] * b[c]);
            total += line[c] * g[c];
        }
        image[r] = total;
        sum[r] = all(total);
    }
    for (long c = 0; c < whole; c += LANES) {
        vec below = *(const loose *)(product + c);
        UNROLL for (int r = 0; r < height; r++) below += sum[r] * NAME(read)(f + r * size + c);
        *(loose *)(product + c) = below;
    }
    for (long c = whole; c < size; c++)
        for (int r = 0; r < height; r++) product[c] += image[r] * f[r * size + c];
}

INLINE void NAME(rows)(const int change, STORE *f, long count, long size, double keep, const double *alpha,
                       const double *beta, const double *a, const double *b, const double *g, double *image,
                       double *product)
{
    long row = 0;
    for (; row + ROWS <= count; row += ROWS)
        NAME(block)(ROWS, change, f + row * size, size, keep, alpha + row, beta + row, a, b, g, image + row, product);
    for (; row < count; row++)
        NAME(block)(1, change, f + row * size, size, keep, alpha + row, beta + row, a, b, g, image + row, product);
}

/* For `count` rows of length `size` at f: F <- keep F + alpha a^T + beta b^T, F g is written to `image` (count) and
   F^T F g is added to `product` (size). Without alpha nothing changes. */
void NAME(multiply_factored)(STORE *f, long count, long size, double keep, const double *alpha, const double *beta,
                             const double *a, const double *b, const double *g, double *image, double *product)
{
    if (alpha)
        NAME(rows)(1, f, count, size, keep, alpha, beta, a, b, g, image, product);
    else
        NAME(rows)(0, f, count, size, keep, image, image, g, g, g, image, product);
}
