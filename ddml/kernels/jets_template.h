/* The code of jets.c for one precision: included there with REAL, SUFFIX and the constants of tanh. */

typedef REAL NAME(vec) __attribute__((vector_size(BYTES)));
typedef REAL NAME(loose) __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
typedef INT NAME(ivec) __attribute__((vector_size(BYTES)));
#define vec NAME(vec)
#define loose NAME(loose)
#define ivec NAME(ivec)
#define LANES ((long)(BYTES / sizeof(REAL)))

typedef struct { /* numbers that stand (jets, points, features) in any order of memory */
    REAL *data;
    long jet, point, feature; /* strides */
} NAME(array);

typedef struct { /* what a stage works with */
    long inputs, outputs, activation, residual;
    REAL scale;
    REAL *weight, *transposed, *bias; /* times scale; the first (outputs, inputs), the second (inputs, outputs) */
    REAL *weight_bar, *bias_bar;      /* the gradients by weight and bias, NULL where nobody wants them */
} NAME(layer);

INLINE vec NAME(all)(REAL x) { return x - (vec){0}; }

INLINE vec NAME(select)(ivec where, vec yes, vec no) { return (vec)((where & (ivec)yes) | (~where & (ivec)no)); }

/* exp(2 x) = 2^n exp(r) with |r| <= ln(2) / 2, and tanh = E / (E + 2) with E = exp(2 x) - 1 by Taylor's series:
   relative errors of a few roundings for all x. NaN stays NaN. */
INLINE vec NAME(tanh)(vec x)
{
    const vec limit = NAME(all)(TANH_LIMIT);
    x = NAME(select)(x > limit, limit, x);
    x = NAME(select)(x < -limit, -limit, x);
    const vec shifted = x * (REAL)2.88539008177792681472 + NAME(all)(MAGIC);
    const vec n = shifted - NAME(all)(MAGIC);
    const vec r = (x + x - n * LN2_HIGH) - n * LN2_LOW;
    const vec scale = (vec)(((ivec)shifted << MANTISSA) + ((INT)EXPONENT_BIAS << MANTISSA));
    const vec r2 = r * r, r4 = r2 * r2;
#define PAIR(a, b) (NAME(all)((REAL)(1.0 / (a))) + r * (REAL)(1.0 / (b)))
    const vec low = PAIR(2.0, 6.0) + r2 * PAIR(24.0, 120.0);
    const vec middle = PAIR(720.0, 5040.0) + r2 * PAIR(40320.0, 362880.0);
#if TANH_TERMS > 8
    const vec high = PAIR(3628800.0, 39916800.0) + r2 * PAIR(479001600.0, 6227020800.0);
    const vec tail = low + r4 * (middle + r4 * high);
#else
    const vec tail = low + r4 * middle;
#endif
#undef PAIR
    const vec e = scale * (r + r2 * tail) + (scale - 1);
    return e / (e + 2);
}

/* The first `count` lanes of x, to any address. */
INLINE void NAME(store)(REAL *to, vec x, long count)
{
    if (count >= LANES)
        *(loose *)to = x;
    else
        memcpy(to, &x, count * sizeof(REAL));
}

INLINE REAL NAME(lanes)(vec x)
{
    REAL part[LANES];
    memcpy(part, &x, sizeof part);
    for (long width = LANES / 2; width; width /= 2)
        for (long i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

/* C[m][n] (+)= sum_i A[i][m] B[i][n] for m < M and n < N; rows of B and C have `jets` vectors. */
INLINE void NAME(product_tile)(const int M, const int N, const int add, long depth, const REAL *a, long lda,
                               const vec *b, vec *c, long jets)
{
    vec sum[8][6];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int n = 0; n < N; n++) sum[m][n] = add ? c[m * jets + n] : NAME(all)(0);
    for (long i = 0; i < depth; i++) {
        vec right[6];
        UNROLL for (int n = 0; n < N; n++) right[n] = b[i * jets + n];
        UNROLL for (int m = 0; m < M; m++) {
            const vec left = NAME(all)(a[i * lda + m]);
            UNROLL for (int n = 0; n < N; n++) sum[m][n] += left * right[n];
        }
    }
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int n = 0; n < N; n++) c[m * jets + n] = sum[m][n];
}

#define TILE(m) case m: if (m <= most) NAME(product_tile)(m, N, add, depth, a, lda, b, c, jets); break;
INLINE void NAME(product_rows)(const int N, const int most, const int add, long rows, long depth, const REAL *a,
                               const vec *b, vec *c, long jets)
{
    const long lda = rows;
    for (long left = rows, pieces = (rows + most - 1) / most; left; pieces--) {
        const long m = (left + pieces - 1) / pieces;
        switch (m) { TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) }
        a += m, c += m * jets, left -= m;
    }
}
#undef TILE

/* C (+)= A^T B for one group: A (depth, rows) numbers, B (depth, jets) and C (rows, jets) vectors. */
#define PANEL(n, most) case n: NAME(product_rows)(n, most, add, rows, depth, a, b, c, jets); break;
INLINE void NAME(product_panels)(const int add, long jets, long rows, long depth, const REAL *a, const vec *b, vec *c)
{
    for (long left = jets, pieces = (jets + 4) / 5; left; pieces--) {
        const long n = (left + pieces - 1) / pieces;
        switch (n) {
#if REGISTERS == 32
            PANEL(1, 8) PANEL(2, 8) PANEL(3, 8) PANEL(4, 6) PANEL(5, 5)
#else
            PANEL(1, 8) PANEL(2, 6) PANEL(3, 4) PANEL(4, 3) PANEL(5, 2)
#endif
        }
        b += n, c += n, left -= n;
    }
}
#undef PANEL

static void NAME(product)(long jets, long rows, long depth, const REAL *a, const vec *b, vec *c)
{
    NAME(product_panels)(0, jets, rows, depth, a, b, c);
}

static void NAME(add_product)(long jets, long rows, long depth, const REAL *a, const vec *b, vec *c)
{
    NAME(product_panels)(1, jets, rows, depth, a, b, c);
}

/* out[m][n] += sum over groups, jets and lanes of x[m] y[n] for m < M, n < N. */
INLINE void NAME(outer_tile)(const int M, const int N, long groups, long jets, const vec *x, long x_group,
                             const vec *y, long y_group, REAL *out, long ldo)
{
    vec sum[24];
    UNROLL for (int m = 0; m < M * N; m++) sum[m] = NAME(all)(0);
    for (long g = 0; g < groups; g++)
        for (long k = 0; k < jets; k++) {
            vec right[4];
            UNROLL for (int n = 0; n < N; n++) right[n] = y[g * y_group + n * jets + k];
            UNROLL for (int m = 0; m < M; m++) {
                const vec left = x[g * x_group + m * jets + k];
                UNROLL for (int n = 0; n < N; n++) sum[m * N + n] += left * right[n];
            }
        }
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int n = 0; n < N; n++) out[m * ldo + n] += NAME(lanes)(sum[m * N + n]);
}

#if REGISTERS == 32
#define MOST_OUTER 6, 4
#else
#define MOST_OUTER 4, 2
#endif
#define TILE(m) case m: if (m <= most) NAME(outer_tile)(m, N, groups, jets, x, rows * jets, y, columns * jets, out, columns); break;
INLINE void NAME(outer_rows)(const int N, const int most, long groups, long jets, long rows, long columns,
                             const vec *x, const vec *y, REAL *out)
{
    for (long left = rows, pieces = (rows + most - 1) / most; left; pieces--) {
        const long m = (left + pieces - 1) / pieces;
        switch (m) { TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) }
        x += m * jets, out += m * columns, left -= m;
    }
}
#undef TILE

/* out (rows, columns) += sum over groups, jets and lanes of x (groups, rows, jets) y (groups, columns, jets). */
#define PANEL(n) case n: if (n <= most_n) NAME(outer_rows)(n, most_m, groups, jets, rows, columns, x, y, out); break;
INLINE void NAME(outer_panels)(const int most_m, const int most_n, long groups, long jets, long rows, long columns,
                               const vec *x, const vec *y, REAL *out)
{
    for (long left = columns, pieces = (columns + most_n - 1) / most_n; left; pieces--) {
        const long n = (left + pieces - 1) / pieces;
        switch (n) { PANEL(1) PANEL(2) PANEL(3) PANEL(4) }
        y += n * jets, out += n, left -= n;
    }
}
#undef PANEL

static void NAME(outer)(long groups, long jets, long rows, long columns, const vec *x, const vec *y, REAL *out)
{
    NAME(outer_panels)(MOST_OUTER, groups, jets, rows, columns, x, y, out);
}
#undef MOST_OUTER

/* The jets of tanh for each neuron, from z = (t, z_1, ...) with t = tanh of the value. */
INLINE void NAME(jets_of_tanh)(const long firsts, const long seconds, const long *at, long neurons, const vec *z, vec *y)
{
    const long jets = 1 + firsts + seconds;
    for (long f = 0; f < neurons; f++, z += jets, y += jets) {
        const vec t = z[0], s = 1 - t * t, q = 2 * t;
        y[0] = t;
        for (long k = 1; k <= firsts; k++) y[k] = s * z[k];
        for (long p = 0; p < seconds; p++) y[1 + firsts + p] = s * (z[1 + firsts + p] - q * z[at[2 * p]] * z[at[2 * p + 1]]);
    }
}

/* The adjoint of z from that of y; see FusedJets in ddml/networks/fused.py for the formulas. */
INLINE void NAME(adjoint_of_tanh)(const long firsts, const long seconds, const long *at, long neurons, const vec *z,
                                  const vec *ybar, vec *zbar)
{
    const long jets = 1 + firsts + seconds;
    for (long f = 0; f < neurons; f++, z += jets, ybar += jets, zbar += jets) {
        const vec t = z[0], s = 1 - t * t;
        vec first = NAME(all)(0), second = NAME(all)(0);
        for (long k = 1; k < jets; k++) {
            const vec c = s * ybar[k];
            zbar[k] = c;
            first += c * z[k];
        }
        for (long p = 0; p < seconds; p++) {
            const vec c = zbar[1 + firsts + p], q = 2 * t * c, a = z[at[2 * p]], b = z[at[2 * p + 1]];
            second += c * a * b;
            zbar[at[2 * p]] -= q * b;
            zbar[at[2 * p + 1]] -= q * a;
        }
        zbar[0] = s * ybar[0] - 2 * (t * (first - 3 * t * second) + second);
    }
}

/* Both for the numbers of derivatives of usual equations as constants. */
#define USUAL(m, n) if (firsts == m && seconds == n) { CALL(m, n); return; }
#define ALL_USUAL USUAL(0, 0) USUAL(1, 0) USUAL(2, 0) USUAL(1, 1) USUAL(2, 1) USUAL(2, 2) USUAL(2, 3) USUAL(3, 2) USUAL(3, 3)
static void NAME(tanh_jets)(const network *net, long neurons, const vec *z, vec *y)
{
    const long seconds = net->seconds, firsts = net->jets - 1 - seconds;
#define CALL(m, n) NAME(jets_of_tanh)(m, n, net->second, neurons, z, y)
    ALL_USUAL
    CALL(firsts, seconds);
#undef CALL
}

static void NAME(tanh_adjoint)(const network *net, long neurons, const vec *z, const vec *ybar, vec *zbar)
{
    const long seconds = net->seconds, firsts = net->jets - 1 - seconds;
#define CALL(m, n) NAME(adjoint_of_tanh)(m, n, net->second, neurons, z, ybar, zbar)
    ALL_USUAL
    CALL(firsts, seconds);
#undef CALL
}
#undef USUAL
#undef ALL_USUAL

/* Behind the product with the weights: z becomes (t, z_1, ...) with t = tanh(z_0 + bias), y the jets of tanh. */
static void NAME(activate)(const network *net, const NAME(layer) * layer, const vec *h, vec *z, vec *y)
{
    const long jets = net->jets, out = layer->outputs;
    for (long f = 0; f < out; f++) z[f * jets] = NAME(tanh)(z[f * jets] + layer->bias[f]);
    NAME(tanh_jets)(net, out, z, y);
    if (layer->residual)
        for (long k = 0; k < out * jets; k++) y[k] += h[k];
}

/* The tangent of y from those of z and h. */
static void NAME(activate_tangent)(const network *net, const NAME(layer) * layer, const vec *z, const vec *dz,
                                   const vec *dh, vec *dy)
{
    const long jets = net->jets, start = jets - net->seconds;
    for (long f = 0; f < layer->outputs; f++, z += jets, dz += jets, dy += jets) {
        const vec t = z[0], s = 1 - t * t, dt = s * dz[0], ds = -2 * t * dt;
        dy[0] = dt;
        for (long k = 1; k < jets; k++) dy[k] = ds * z[k] + s * dz[k];
        for (long p = 0; p < net->seconds; p++) {
            const long i = net->second[2 * p], j = net->second[2 * p + 1];
            dy[start + p] -= 2 * ((ds * t + s * dt) * z[i] * z[j] + s * t * (dz[i] * z[j] + z[i] * dz[j]));
        }
        if (layer->residual)
            for (long k = 0; k < jets; k++) dy[k] += dh[f * jets + k];
    }
}

/* One group of points behind one layer. */
static void NAME(pass)(const network *net, const NAME(layer) * layer, const vec *h, vec *z, vec *y)
{
    const long jets = net->jets;
    NAME(product)(jets, layer->outputs, layer->inputs, layer->transposed, h, layer->activation ? z : y);
    if (layer->activation)
        NAME(activate)(net, layer, h, z, y);
    else
        for (long f = 0; f < layer->outputs; f++) y[f * jets] += layer->bias[f];
}

/* Points from `begin` of `total`; behind the last one zeros, or with `repeat` that point again. */
static void NAME(load)(const network *net, const NAME(array) * from, long begin, long total, long groups,
                       long features, int repeat, vec *to)
{
    for (long p = begin; p < begin + groups * LANES; p += LANES)
        for (long f = 0; f < features; f++)
            for (long k = 0; k < net->jets; k++, to++) {
                const REAL *const source = from->data + k * from->jet + f * from->feature;
                if (from->point == 1 && p + LANES <= total) {
                    *to = *(const loose *)(source + p);
                    continue;
                }
                REAL lane[LANES];
                for (long l = 0; l < LANES; l++)
                    lane[l] = p + l < total ? source[(p + l) * from->point] : repeat ? source[(total - 1) * from->point] : 0;
                memcpy(to, lane, sizeof lane);
            }
}

static void NAME(save)(const network *net, const NAME(array) * to, long begin, long total, long groups, long features,
                       const vec *from)
{
    for (long p = begin; p < begin + groups * LANES; p += LANES)
        for (long f = 0; f < features; f++)
            for (long k = 0; k < net->jets; k++, from++) {
                REAL *const target = to->data + k * to->jet + f * to->feature;
                if (to->point == 1) {
                    NAME(store)(target + p, *from, total - p);
                    continue;
                }
                REAL lane[LANES];
                memcpy(lane, from, sizeof lane);
                for (long l = 0; l < LANES && p + l < total; l++) target[(p + l) * to->point] = lane[l];
            }
}

static long NAME(widest)(const network *net)
{
    long width = 0;
    for (long i = 0; i < net->stages; i++) {
        if (net->stage[i].inputs > width) width = net->stage[i].inputs;
        if (net->stage[i].outputs > width) width = net->stage[i].outputs;
    }
    return width;
}

#define ROUNDED(numbers) (((numbers) + LANES - 1) / LANES * LANES)

/* Bytes of work space that the functions below need. */
long NAME(workspace)(const network *net)
{
    long vectors = 4 * NAME(widest)(net), numbers = 0;
    for (long i = 0; i < net->stages; i++) {
        const stage *const s = net->stage + i;
        vectors += 2 * s->outputs;
        numbers += 5 * (ROUNDED(s->outputs * s->inputs) + ROUNDED(s->outputs));
    }
    if (vectors < 6 * NAME(widest)(net)) vectors = 6 * NAME(widest)(net);
    return vectors * net->jets * GROUPS * (long)sizeof(vec) + numbers * (long)sizeof(REAL) + BYTES;
}

/* Lay the layers out at the beginning of the work space; returns what is free behind them.
   With a direction the weights are those of the derivative of c W and c b in it. */
static vec *NAME(lay)(const network *net, const REAL *theta, const REAL *direction, int gradient, void *work,
                      NAME(layer) * layers)
{
    REAL *free = (REAL *)(((uintptr_t)work + BYTES - 1) / BYTES * BYTES);
    for (long i = 0; i < net->stages; i++) {
        const stage *const s = net->stage + i;
        const long rows = s->outputs, columns = s->inputs, size = ROUNDED(rows * columns);
        const REAL c = s->slope < 0 ? 1 : 10 * theta[s->slope];
        const REAL dc = s->slope < 0 || !direction ? 0 : 10 * direction[s->slope];
        NAME(layer) *const l = layers + i;
        l->inputs = columns, l->outputs = rows, l->activation = s->activation, l->residual = s->residual, l->scale = c;
        l->weight = free, l->transposed = l->weight + size, l->bias = l->transposed + size;
        free = l->bias + ROUNDED(rows);
        const REAL *const w = theta + s->weight, *const b = theta + s->bias;
        const REAL *const dw = direction ? direction + s->weight : w, *const db = direction ? direction + s->bias : b;
        for (long f = 0; f < rows; f++) {
            for (long e = 0; e < columns; e++) {
                const REAL value = c * dw[f * columns + e] + dc * w[f * columns + e];
                l->weight[f * columns + e] = l->transposed[e * rows + f] = value;
            }
            l->bias[f] = c * db[f] + dc * b[f];
        }
        l->weight_bar = l->bias_bar = NULL;
        if (gradient && s->active) {
            l->weight_bar = free, l->bias_bar = free + size, free = l->bias_bar + ROUNDED(rows);
            memset(l->weight_bar, 0, (char *)free - (char *)l->weight_bar);
        }
    }
    return (vec *)free;
}

/* Jets behind stage `end` - 1 from those that enter stage `begin`. */
void NAME(forward)(const network *net, const REAL *theta, long begin, long end, const NAME(array) * inputs,
                   long points, const NAME(array) * outputs, void *work)
{
    NAME(layer) layers[net->stages];
    const long size = NAME(widest)(net) * net->jets;
    vec *const z = NAME(lay)(net, theta, NULL, 0, work, layers);
    for (long at = 0; at < points; at += LANES) {
        vec *h = z + size, *y = h + size;
        NAME(load)(net, inputs, at, points, 1, net->stage[begin].inputs, 1, h);
        for (long i = begin; i < end; i++) {
            NAME(pass)(net, layers + i, h, z, y);
            vec *const swap = h;
            h = y, y = swap;
        }
        NAME(save)(net, outputs, at, points, 1, net->stage[end - 1].outputs, h);
    }
}

/* The gradient by the parameters of one stage from the adjoint of what its product gives. */
static void NAME(stage_gradient)(const network *net, const NAME(layer) * layer, long groups, const vec *bar,
                                 const vec *h)
{
    const long jets = net->jets;
    NAME(outer)(groups, jets, layer->outputs, layer->inputs, bar, h, layer->weight_bar);
    for (long f = 0; f < layer->outputs; f++) {
        vec sum = bar[f * jets];
        for (long g = 1; g < groups; g++) sum += bar[(g * layer->outputs + f) * jets];
        layer->bias_bar[f] += NAME(lanes)(sum);
    }
}

/* The same for each point on its own: entry i of the gradient at point p goes to rows[i * points + p]. */
static void NAME(stage_rows)(const network *net, const NAME(layer) * layer, const stage *stage, const REAL *theta,
                             long groups, const vec *bar, const vec *h, long at, long points, REAL *rows)
{
    const long jets = net->jets, in = layer->inputs, out = layer->outputs;
    for (long g = 0; g < groups; g++, at += LANES, bar += out * jets, h += in * jets) {
        const long count = points - at;
        vec by_scale = NAME(all)(0);
        for (long f = 0; f < out; f++) {
            for (long e = 0; e < in; e++) {
                const long entry = stage->weight + f * in + e;
                vec sum = bar[f * jets] * h[e * jets];
                for (long k = 1; k < jets; k++) sum += bar[f * jets + k] * h[e * jets + k];
                by_scale += sum * theta[entry];
                NAME(store)(rows + entry * points + at, sum * layer->scale, count);
            }
            by_scale += bar[f * jets] * theta[stage->bias + f];
            NAME(store)(rows + (stage->bias + f) * points + at, bar[f * jets] * layer->scale, count);
        }
        if (stage->slope >= 0) NAME(store)(rows + stage->slope * points + at, by_scale * 10, count);
    }
}

/* Memory of a backward pass over one block after another. */
typedef struct {
    NAME(layer) *layers;
    long begin, lowest;      /* the stage that the inputs enter, and the lowest one whose gradient is wanted */
    vec **h, **z;            /* what enters each stage, and what its product gives */
    vec *ybar, *hbar, *zbar; /* adjoints */
} NAME(pass_memory);

/* Lay out a backward pass; `ends` and `products` have room for stages + 1 pointers each. */
static NAME(pass_memory) NAME(lay_pass)(const network *net, const REAL *theta, long begin, void *work,
                                        NAME(layer) * layers, vec **ends, vec **products)
{
    const long jets = net->jets, size = NAME(widest)(net) * jets * GROUPS;
    vec *free = NAME(lay)(net, theta, NULL, 1, work, layers);
    NAME(pass_memory) memory = {layers, begin, begin, ends, products, free, free + size, free + 2 * size};
    free += 3 * size;
    ends[begin] = free, free += layers[begin].inputs * jets * GROUPS;
    for (long i = begin; i < net->stages; i++) {
        products[i] = free, ends[i + 1] = free + layers[i].outputs * jets * GROUPS;
        free = ends[i + 1] + layers[i].outputs * jets * GROUPS;
    }
    while (memory.lowest < net->stages && !net->stage[memory.lowest].active) memory.lowest++;
    return memory;
}

/* A block of points through the network, everything kept; the last of `stages` stages is the last one done. */
static void NAME(block_forward)(const network *net, const NAME(pass_memory) * m, const NAME(array) * inputs, long at,
                                long points, long groups, long stages)
{
    const long jets = net->jets;
    NAME(load)(net, inputs, at, points, groups, m->layers[m->begin].inputs, 1, m->h[m->begin]);
    for (long i = m->begin; i < stages; i++)
        for (long g = 0; g < groups; g++) {
            const long in = g * m->layers[i].inputs * jets, out = g * m->layers[i].outputs * jets;
            NAME(pass)(net, m->layers + i, m->h[i] + in, m->z[i] + out, m->h[i + 1] + out);
        }
}

/* And back again from the adjoint of the jets in ybar. */
static void NAME(block_backward)(const network *net, NAME(pass_memory) * m, const REAL *theta, long at, long points,
                                 long groups, REAL *rows)
{
    const long jets = net->jets;
    vec *ybar = m->ybar, *hbar = m->hbar;
    for (long i = net->stages - 1; i >= m->lowest; i--) {
        const NAME(layer) *const l = m->layers + i;
        const long out = l->outputs * jets, in = l->inputs * jets;
        const vec *bar = ybar;
        if (l->activation) {
            NAME(tanh_adjoint)(net, groups * l->outputs, m->z[i], ybar, m->zbar);
            bar = m->zbar;
        }
        if (l->weight_bar && rows)
            NAME(stage_rows)(net, l, net->stage + i, theta, groups, bar, m->h[i], at, points, rows);
        else if (l->weight_bar)
            NAME(stage_gradient)(net, l, groups, bar, m->h[i]);
        if (i == m->lowest) break;
        if (l->residual) memcpy(hbar, ybar, groups * in * sizeof(vec));
        for (long g = 0; g < groups; g++)
            (l->residual ? NAME(add_product) : NAME(product))(jets, l->inputs, l->outputs, l->weight, bar + g * out,
                                                             hbar + g * in);
        vec *const swap = ybar;
        ybar = hbar, hbar = swap;
    }
}

/* Add what the layers collected to the gradient by theta. */
static void NAME(collect)(const network *net, const NAME(pass_memory) * m, const REAL *theta, REAL *gradient)
{
    for (long i = m->lowest; i < net->stages; i++) {
        const stage *const s = net->stage + i;
        const NAME(layer) *const l = m->layers + i;
        if (!l->weight_bar) continue;
        REAL by_scale = 0;
        for (long e = 0; e < l->outputs * l->inputs; e++) {
            gradient[s->weight + e] += l->scale * l->weight_bar[e];
            by_scale += theta[s->weight + e] * l->weight_bar[e];
        }
        for (long f = 0; f < l->outputs; f++) {
            gradient[s->bias + f] += l->scale * l->bias_bar[f];
            by_scale += theta[s->bias + f] * l->bias_bar[f];
        }
        if (s->slope >= 0) gradient[s->slope] += 10 * by_scale;
    }
}

/* Add <adjoint, d jets / d theta> to the gradient of the active stages from `begin` on; the forward pass is
   repeated block by block. With `rows` the gradient is (parameters, points), and nothing is summed over the points. */
void NAME(backward)(const network *net, const REAL *theta, long begin, const NAME(array) * inputs, long points,
                    const NAME(array) * adjoint, REAL *gradient, long rows, void *work)
{
    NAME(layer) layers[net->stages];
    vec *ends[net->stages + 1], *products[net->stages + 1];
    NAME(pass_memory) memory = NAME(lay_pass)(net, theta, begin, work, layers, ends, products);
    const NAME(layer) *const last = layers + net->stages - 1;
    for (long at = 0; at < points; at += GROUPS * LANES) {
        const long count = points - at < GROUPS * LANES ? points - at : GROUPS * LANES;
        const long groups = (count + LANES - 1) / LANES;
        NAME(block_forward)(net, &memory, inputs, at, points, groups, net->stages - !last->activation);
        NAME(load)(net, adjoint, at, points, groups, last->outputs, 0, memory.ybar);
        NAME(block_backward)(net, &memory, theta, at, points, groups, rows ? gradient : NULL);
    }
    if (!rows) NAME(collect)(net, &memory, theta, gradient);
}

/* One operation on one vector of points. */
INLINE vec NAME(operate)(const operation *o, const vec *value)
{
    const vec a = value[o->a], b = value[o->b], one = NAME(all)(1), zero = NAME(all)(0);
    REAL x[LANES], y[LANES];
    vec result;
#define EACH(expression) \
    memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y); \
    for (long l = 0; l < LANES; l++) x[l] = (REAL)(expression); \
    memcpy(&result, x, sizeof x); \
    return result
    switch ((enum code)o->code) {
    case ADD: return a + b;
    case SUB: return a - b;
    case MUL: return a * b;
    case DIV: return a / b;
    case NEG: return -a;
    case WHERE: return NAME(select)(a != zero, b, value[o->c]);
    case GT: return NAME(select)(a > b, one, zero);
    case GE: return NAME(select)(a >= b, one, zero);
    case LT: return NAME(select)(a < b, one, zero);
    case LE: return NAME(select)(a <= b, one, zero);
    case EQ: return NAME(select)(a == b, one, zero);
    case TANH: return NAME(tanh)(a);
    case SGN: EACH(x[l] > 0 ? 1 : x[l] < 0 ? -1 : x[l]);
    case POW: EACH(pow(x[l], y[l]));
    case SQRT: EACH(sqrt(x[l]));
    case ABS: EACH(fabs(x[l]));
    case SIN: EACH(sin(x[l]));
    case COS: EACH(cos(x[l]));
    case EXP: EACH(exp(x[l]));
    case LOG: EACH(log(x[l]));
    case SINH: EACH(sinh(x[l]));
    case COSH: EACH(cosh(x[l]));
    }
#undef EACH
    return zero;
}

/* `scale` times the sum over the points of the squared residuals. With a gradient, that by theta is added to it, and
   that by the scalars to `scalar_gradient`. The arrays have a number for each point. */
double NAME(squares)(const network *net, const REAL *theta, long begin, const NAME(array) * inputs, long points,
                     const program *code, const REAL *const *arrays, const REAL *scalars, double scale,
                     REAL *gradient, REAL *scalar_gradient, void *work)
{
    NAME(layer) layers[net->stages];
    vec *ends[net->stages + 1], *products[net->stages + 1], sum = NAME(all)(0);
    NAME(pass_memory) memory = NAME(lay_pass)(net, theta, begin, work, layers, ends, products);
    const long jets = net->jets, outputs = layers[net->stages - 1].outputs;
    const long first_array = 1 + code->leaves, first_scalar = first_array + code->arrays;
    const long first_result = first_scalar + code->scalars, operations = gradient ? code->operations : code->forward;
    vec value[first_result + code->operations], scalar_bar[code->scalars + 1];
    for (long i = 0; i < code->scalars; i++) value[first_scalar + i] = NAME(all)(scalars[i]), scalar_bar[i] = NAME(all)(0);
    for (long at = 0; at < points; at += GROUPS * LANES) {
        const long count = points - at < GROUPS * LANES ? points - at : GROUPS * LANES;
        const long groups = (count + LANES - 1) / LANES;
        NAME(block_forward)(net, &memory, inputs, at, points, groups, net->stages);
        if (gradient) memset(memory.ybar, 0, groups * outputs * jets * sizeof(vec));
        for (long g = 0; g < groups; g++) {
            const long p = at + g * LANES;
            for (long l = 0; l < LANES; l++) value[0][l] = p + l < points ? (REAL)(2 * scale) : 0;
            for (long i = 0; i < code->leaves; i++) {
                const long place = (g * outputs + code->leaf[2 * i + 1]) * jets + code->leaf[2 * i];
                value[1 + i] = memory.h[net->stages][place];
            }
            for (long i = 0; i < code->arrays; i++) {
                if (p + LANES <= points)
                    value[first_array + i] = *(const loose *)(arrays[i] + p);
                else
                    for (long l = 0; l < LANES; l++)
                        value[first_array + i][l] = arrays[i][p + l < points ? p + l : points - 1];
            }
            for (long i = 0; i < operations; i++) value[first_result + i] = NAME(operate)(code->operation + i, value);
            for (long i = 0; i < code->residuals; i++) {
                const vec r = value[code->residual[i]];
                sum += value[0] * r * r;
            }
            for (long i = 0; gradient && i < code->leaves; i++)
                if (code->leaf_bar[i] >= 0)
                    memory.ybar[(g * outputs + code->leaf[2 * i + 1]) * jets + code->leaf[2 * i]] =
                        value[code->leaf_bar[i]];
            for (long i = 0; gradient && i < code->scalars; i++)
                if (code->scalar_bar[i] >= 0) scalar_bar[i] += value[code->scalar_bar[i]];
        }
        if (gradient) NAME(block_backward)(net, &memory, theta, at, points, groups, NULL);
    }
    if (gradient) {
        NAME(collect)(net, &memory, theta, gradient);
        for (long i = 0; i < code->scalars; i++) scalar_gradient[i] += NAME(lanes)(scalar_bar[i]);
    }
    return 0.5 * NAME(lanes)(sum);
}

/* The derivative of the jets by theta in a direction. */
void NAME(tangent)(const network *net, const REAL *theta, const REAL *direction, const NAME(array) * inputs,
                   long points, const NAME(array) * outputs, void *work)
{
    const long jets = net->jets, size = NAME(widest)(net) * jets;
    NAME(layer) layers[net->stages], moved[net->stages];
    vec *const between = NAME(lay)(net, theta, NULL, 0, work, layers);
    vec *const z = NAME(lay)(net, theta, direction, 0, between, moved), *const dz = z + size;
    for (long at = 0; at < points; at += LANES) {
        vec *h = dz + size, *y = h + size, *dh = y + size, *dy = dh + size;
        NAME(load)(net, inputs, at, points, 1, layers[0].inputs, 1, h);
        memset(dh, 0, layers[0].inputs * jets * sizeof(vec));
        for (long i = 0; i < net->stages; i++) {
            const NAME(layer) *const l = layers + i;
            vec *const to = l->activation ? dz : dy, *swap;
            NAME(pass)(net, l, h, z, y);
            NAME(product)(jets, l->outputs, l->inputs, l->transposed, dh, to);
            NAME(add_product)(jets, l->outputs, l->inputs, moved[i].transposed, h, to);
            for (long f = 0; f < l->outputs; f++) to[f * jets] += moved[i].bias[f];
            if (l->activation) NAME(activate_tangent)(net, l, z, dz, dh, dy);
            swap = h, h = y, y = swap;
            swap = dh, dh = dy, dy = swap;
        }
        NAME(save)(net, outputs, at, points, 1, layers[net->stages - 1].outputs, dh);
    }
}

#undef ROUNDED
#undef vec
#undef loose
#undef ivec
#undef LANES
