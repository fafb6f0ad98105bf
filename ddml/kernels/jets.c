/* Jets of chains of dense stages, forward and backward, in double and in single precision.

   A jet is a value and some partial derivatives up to second order (see ddml/jets/evaluator.py).
   Points are taken in groups of as many as fit a vector register, groups in blocks that fit the
   cache. Within a block the jets of a layer lie as [group][neuron][jet] vectors, so that a product
   with the weights reads one short contiguous panel per group and the gradient of the weights is a
   sum of products of vectors.

   The file is compiled once per instruction set, with the widest vectors of each. */

#include "vectors.h"

#include <math.h>

#define GROUPS (512 / BYTES) /* in a block: 64 points in double precision */

/* The same in ddml/networks/compiled.py. A stage is y = [h +] [tanh] (c (W h + b)) with c = 10 a, or 1 without slope. */
typedef struct {
    long inputs, outputs, activation, residual;
    long weight, bias, slope; /* where they begin in the vector of parameters; slope -1: none */
    long active;              /* whether its gradient is wanted */
} stage;

typedef struct {
    long jets;               /* the value, the first derivatives, then the second ones */
    long seconds;            /* how many of these */
    const long *second;      /* (seconds, 2): positions of the jets i and j of each second derivative ij */
    long stages;
    const stage *stage;
} network;

/* What is done with the jets at each point, as straight-line code on numbered values: the weight of a squared
   residual times two, the jets that count (leaves), numbers given for each point (arrays), numbers (scalars), then
   the results of the operations. The same in ddml/problems/program.py. */
enum code { ADD, SUB, MUL, DIV, NEG, WHERE, GT, GE, LT, LE, EQ, POW, SQRT, ABS, SGN, TANH, SIN, COS, EXP, LOG, SINH, COSH };

typedef struct {
    long code, a, b, c; /* the numbers of its arguments */
} operation;

typedef struct {
    long leaves, arrays, scalars, operations;
    long forward; /* operations that the residuals need; the others are for the adjoints */
    long residuals;
    const long *leaf; /* (leaves, 2): position of the jet, and which output of the network */
    const operation *operation;
    const long *residual;   /* (residuals,): their numbers */
    const long *leaf_bar;   /* (leaves,): numbers of the derivatives of the weighted squares by the leaves; -1: zero */
    const long *scalar_bar; /* (scalars,): the same by the scalars, for each point; -1: zero or not wanted */
} program;

#define SUFFIX double
#define REAL double
#define INT int64_t
#define TANH_TERMS 12
#define TANH_LIMIT 20.0
#define MAGIC 0x1.8p52
#define MANTISSA 52
#define EXPONENT_BIAS 1023
#define LN2_HIGH 6.93147180369123816490e-01
#define LN2_LOW 1.90821492927058770002e-10
#include "jets_template.h"
#undef SUFFIX
#undef REAL
#undef INT
#undef TANH_TERMS
#undef TANH_LIMIT
#undef MAGIC
#undef MANTISSA
#undef EXPONENT_BIAS
#undef LN2_HIGH
#undef LN2_LOW

#define SUFFIX float
#define REAL float
#define INT int32_t
#define TANH_TERMS 8
#define TANH_LIMIT 10.0f
#define MAGIC 0x1.8p23f
#define MANTISSA 23
#define EXPONENT_BIAS 127
#define LN2_HIGH 6.9313812256e-01f
#define LN2_LOW 9.0580006145e-06f
#include "jets_template.h"
