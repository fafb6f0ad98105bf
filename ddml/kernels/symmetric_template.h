/* The code of symmetric.c for one precision of the stored numbers, STORE; all sums are in double precision. */

/* Changes of rank two: `count` times the vectors s, q, a, b, all of n numbers, one behind the other. */
typedef struct {
    long count, n;
    double keep;
    const double *vectors;
} NAME(changes);

/* `height` rows from `row` on, the first of them at h; see below. */
INLINE void NAME(block)(const int height, const int change, STORE *h, long row, const NAME(changes) *changes,
                        const double *g, double *product)
{
    STORE *line[ROWS];
    vec sum[ROWS], left_g[ROWS];
    const long count = change ? changes->count : 0, n = change ? changes->n : 0;
    const double *vectors = change ? changes->vectors : NULL;
    const double keep = change ? changes->keep : 1.0;
    const vec kept = all(keep);
    UNROLL for (int r = 0; r < height; r++) {
        line[r] = r ? line[r - 1] + row + r : h;
        sum[r] = all(0), left_g[r] = all(g[row + r]);
    }
    long c = 0;
    for (; c + LANES <= row; c += LANES) {
        const vec right = *(const loose *)(g + c);
        vec value[ROWS], below = *(const loose *)(product + c);
        UNROLL for (int r = 0; r < height; r++) {
            __builtin_prefetch(line[r] + c + AHEAD, change);
            value[r] = NAME(read)(line[r] + c);
            if (change) value[r] *= kept;
        }
        if (change)
            for (long j = 0; j < count; j++) {
                const double *s = vectors + 4 * j * n, *q = s + n, *a = q + n, *b = a + n;
                const vec right_a = *(const loose *)(a + c), right_b = *(const loose *)(b + c);
                UNROLL for (int r = 0; r < height; r++)
                    value[r] += all(s[row + r]) * right_a + all(q[row + r]) * right_b;
            }
        UNROLL for (int r = 0; r < height; r++) {
            if (change) value[r] = NAME(write)(line[r] + c, value[r]);
            sum[r] += value[r] * right;
            below += value[r] * left_g[r];
        }
        *(loose *)(product + c) = below;
    }
    for (int r = 0; r < height; r++) {
        double part[LANES], total = 0;
        memcpy(part, &sum[r], sizeof part);
        for (long l = 0; l < LANES; l++) total += part[l];
        const long here = row + r;
        for (long e = c; e <= here; e++) {
            double value = line[r][e];
            if (change) {
                value *= keep;
                for (long j = 0; j < count; j++) {
                    const double *s = vectors + 4 * j * n, *q = s + n, *a = q + n, *b = a + n;
                    value += s[here] * a[e] + q[here] * b[e];
                }
                value = line[r][e] = (STORE)value;
            }
            total += value * g[e];
            if (e < here) product[e] += value * g[here];
        }
        product[here] += total;
    }
}

INLINE void NAME(rows)(const int change, STORE *h, long begin, long end, const NAME(changes) *changes, const double *g,
                       double *product)
{
    long row = begin;
    for (; row + ROWS <= end; row += ROWS) {
        NAME(block)(ROWS, change, h, row, changes, g, product);
        for (int r = 0; r < ROWS; r++) h += row + r + 1;
    }
    for (; row < end; h += ++row) NAME(block)(1, change, h, row, changes, g, product);
}

/* For rows begin to end of a symmetric H, which lie at h: H <- keep H + the sum of s a^T + q b^T over `count` changes,
   which must be symmetric, and their share of H g is added to `product`. Without changes nothing is written. */
void NAME(multiply_symmetric)(STORE *h, long begin, long end, double keep, long count, long n, const double *vectors,
                              const double *g, double *product)
{
    const NAME(changes) changes = {count, n, keep, vectors};
    if (count)
        NAME(rows)(1, h, begin, end, &changes, g, product);
    else
        NAME(rows)(0, h, begin, end, &changes, g, product);
}
