/* The code of symmetric.c for one precision of the stored numbers, STORE; all sums are in double precision. */

/* `height` rows from `row` on, the first of them at h; see below. */
INLINE void NAME(block)(const int height, const int change, STORE *h, long row, double keep, const double *s,
                        const double *q, const double *a, const double *b, const double *g, double *product)
{
    STORE *line[ROWS];
    vec sum[ROWS], left_s[ROWS], left_q[ROWS], left_g[ROWS];
    const vec kept = all(keep);
    UNROLL for (int r = 0; r < height; r++) {
        line[r] = r ? line[r - 1] + row + r : h;
        sum[r] = all(0), left_g[r] = all(g[row + r]);
        if (change) left_s[r] = all(s[row + r]), left_q[r] = all(q[row + r]);
    }
    long c = 0;
    for (; c + LANES <= row; c += LANES) {
        const vec right = *(const loose *)(g + c);
        vec right_a, right_b, below = *(const loose *)(product + c);
        if (change) right_a = *(const loose *)(a + c), right_b = *(const loose *)(b + c);
        UNROLL for (int r = 0; r < height; r++) {
            __builtin_prefetch(line[r] + c + AHEAD, change);
            vec value = NAME(read)(line[r] + c);
            if (change) {
                value = kept * value + left_s[r] * right_a + left_q[r] * right_b;
                value = NAME(write)(line[r] + c, value);
            }
            sum[r] += value * right;
            below += value * left_g[r];
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
            if (change) value = line[r][e] = (STORE)(keep * value + s[here] * a[e] + q[here] * b[e]);
            total += value * g[e];
            if (e < here) product[e] += value * g[here];
        }
        product[here] += total;
    }
}

INLINE void NAME(rows)(const int change, STORE *h, long begin, long end, double keep, const double *s,
                       const double *q, const double *a, const double *b, const double *g, double *product)
{
    long row = begin;
    for (; row + ROWS <= end; row += ROWS) {
        NAME(block)(ROWS, change, h, row, keep, s, q, a, b, g, product);
        for (int r = 0; r < ROWS; r++) h += row + r + 1;
    }
    for (; row < end; h += ++row) NAME(block)(1, change, h, row, keep, s, q, a, b, g, product);
}

/* For rows begin to end of a symmetric H, which lie at h: H <- keep H + s a^T + q b^T, which must be symmetric, and
   their share of H g is added to `product`. Without s nothing changes. */
void NAME(multiply_symmetric)(STORE *h, long begin, long end, double keep, const double *s, const double *q, const double *a,
                    const double *b, const double *g, double *product)
{
    if (s)
        NAME(rows)(1, h, begin, end, keep, s, q, a, b, g, product);
    else
        NAME(rows)(0, h, begin, end, keep, s, q, a, b, g, product);
}
