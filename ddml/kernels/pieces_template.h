/* The code of pieces.c for one precision, REAL, of all but what products are added to, in double precision. */

#define LANES ((long)(BYTES / sizeof(REAL)))
typedef REAL NAME(wide) __attribute__((vector_size(BYTES)));
typedef REAL NAME(place) __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));

/* `height` rows of a tile of `count` columns, the first of them at b, times `width` vectors of the tables' columns. */
INLINE void NAME(group)(const int height, const int width, const int twice, const REAL *b, long stride, long count,
                        long across, const REAL *of_rows, const REAL *of_columns, double *to_rows, REAL *sums)
{
    NAME(wide) sum[ROWS][PANELS], left[ROWS][PANELS];
    UNROLL for (int r = 0; r < height; r++) UNROLL for (int w = 0; w < width; w++) {
        sum[r][w] = (NAME(wide)){0};
        if (twice) left[r][w] = *(const NAME(place) *)(of_rows + r * across + w * LANES);
    }
    for (long j = 0; j < count; j++, of_columns += across, sums += width * LANES) {
        NAME(wide) right[PANELS], below[PANELS];
        UNROLL for (int w = 0; w < width; w++) {
            right[w] = *(const NAME(place) *)(of_columns + w * LANES);
            if (twice) below[w] = *(NAME(place) *)(sums + w * LANES);
        }
        if (j % LANES == 0) UNROLL for (int r = 0; r < height; r++) __builtin_prefetch(b + (r + height) * stride + j);
        UNROLL for (int r = 0; r < height; r++) {
            const NAME(wide) value = b[r * stride + j] - (NAME(wide)){0};
            UNROLL for (int w = 0; w < width; w++) {
                sum[r][w] += value * right[w];
                if (twice) below[w] += value * left[r][w];
            }
        }
        if (twice) UNROLL for (int w = 0; w < width; w++) *(NAME(place) *)(sums + w * LANES) = below[w];
    }
    for (int r = 0; r < height; r++) for (int w = 0; w < width; w++) {
        REAL part[LANES];
        memcpy(part, &sum[r][w], sizeof part);
        for (long l = 0; l < LANES; l++) to_rows[r * across + w * LANES + l] += part[l];
    }
}

INLINE void NAME(tile)(const int width, const int twice, const REAL *b, long rows, long stride, long count, long across,
                       const REAL *of_rows, const REAL *of_columns, double *to_rows, double *to_columns)
{
    REAL sums[TILE * BYTES / sizeof(REAL)] __attribute__((aligned(BYTES)));
    if (twice) memset(sums, 0, count * width * BYTES);
    long i = 0;
    for (; i + ROWS <= rows; i += ROWS)
        NAME(group)(ROWS, width, twice, b + i * stride, stride, count, across, of_rows + i * across, of_columns,
                    to_rows + i * across, sums);
    for (; i < rows; i++)
        NAME(group)(1, width, twice, b + i * stride, stride, count, across, of_rows + i * across, of_columns,
                    to_rows + i * across, sums);
    if (twice)
        for (long j = 0; j < count; j++)
            for (long l = 0; l < width * LANES; l++) to_columns[j * across + l] += sums[j * width * LANES + l];
}

/* Of a piece (rows, columns) at b: its product with of_columns (columns, across) is added to to_rows (rows, across), and
   that of its transpose with of_rows to to_columns, if there is that. `across` is a multiple of the lanes. */
void NAME(multiply_piece)(const REAL *b, long rows, long columns, long across, const REAL *of_rows,
                          const REAL *of_columns, double *to_rows, double *to_columns)
{
    const long tile = across > LANES ? TILE / PANELS : TILE;
    for (long begin = 0; begin < columns; begin += tile) {
        const long count = columns - begin < tile ? columns - begin : tile, at = begin * across;
        for (long p = 0; p < across; p += PANELS * LANES) {
            const REAL *right = of_columns + at + p, *left = of_rows + p;
            double *below = to_columns ? to_columns + at + p : NULL;
            const int whole = across - p >= PANELS * LANES;
            if (to_columns && whole)
                NAME(tile)(PANELS, 1, b + begin, rows, columns, count, across, left, right, to_rows + p, below);
            else if (to_columns)
                NAME(tile)(1, 1, b + begin, rows, columns, count, across, left, right, to_rows + p, below);
            else if (whole)
                NAME(tile)(PANELS, 0, b + begin, rows, columns, count, across, left, right, to_rows + p, below);
            else
                NAME(tile)(1, 0, b + begin, rows, columns, count, across, left, right, to_rows + p, below);
        }
    }
}

#undef LANES
