/* Vectors of PETSc that compute the same bits on any number of ranks.

   The entries of a vector are cut into pieces in a way that does not depend on the ranks, each of which owns whole
   pieces. A dot product is summed piece by piece, and the pieces' sums in their order. What PETSc leaves to BLAS entry
   by entry is done here, too: there the rounding of an entry may depend on its distance from the end of the local
   array, where products and sums are no longer fused. Duplicates of a vector inherit all of this, so that PETSc's own
   solvers compute the same bits, too.

   Compiled without contraction of products and sums, see setup.py. */

#include <petsc/private/vecimpl.h>

#define LANES 8
#define AHEAD 256   /* entries that are asked for before they are needed (our choice) */
#define CACHED 1024 /* entries that are worked on at a time where several vectors are read */

typedef double lanes __attribute__((vector_size(LANES * sizeof(double)), aligned(sizeof(double)), may_alias));

typedef struct {
    PetscInt pieces, first, count; /* of the whole vector; the number of the first one here, and how many are here */
    PetscInt edges[];              /* (count + 1,) where they begin in the local array */
} cut;

static const char NAME[] = "ddml_cut";

static double sum_of(lanes a)
{
    return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}

static double product(const double *x, const double *y, PetscInt n)
{
    lanes total = {0};
    PetscInt i = 0;
    for (; i + LANES <= n; i += LANES) {
        __builtin_prefetch(y + i + AHEAD);
        total += *(const lanes *)(x + i) * *(const lanes *)(y + i);
    }
    double rest = 0;
    for (; i < n; i++) rest += x[i] * y[i];
    return sum_of(total) + rest;
}

static double absolute(const double *x, PetscInt n)
{
    double total[LANES] = {0};
    for (PetscInt i = 0; i < n; i++) total[i % LANES] += PetscAbsReal(x[i]);
    return ((total[0] + total[4]) + (total[2] + total[6])) + ((total[1] + total[5]) + (total[3] + total[7]));
}

/* The sums of count rows of pieces, of which each rank has its own, the others being zero: what is added to a number
   then is nothing but zeros. */
static PetscErrorCode total(Vec x, const cut *c, PetscInt count, double *rows, double *sums)
{
    PetscMPIInt length, ranks;
    MPI_Comm comm;

    PetscFunctionBegin;
    PetscCall(PetscObjectGetComm((PetscObject)x, &comm));
    PetscCallMPI(MPI_Comm_size(comm, &ranks));
    if (ranks > 1) {
        PetscCall(PetscMPIIntCast(count * c->pieces, &length));
        PetscCallMPI(MPI_Allreduce(MPI_IN_PLACE, rows, length, MPI_DOUBLE, MPI_SUM, comm));
    }
    for (PetscInt j = 0; j < count; j++) {
        double sum = 0;
        for (PetscInt k = 0; k < c->pieces; k++) sum += rows[j * c->pieces + k];
        sums[j] = sum;
    }
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode dots(Vec x, PetscInt count, const Vec y[], PetscScalar *sums)
{
    const double *a, **b;
    double *rows;
    cut *c = NULL;

    PetscFunctionBegin;
    if (count == 0) PetscFunctionReturn(PETSC_SUCCESS);
    PetscCall(PetscObjectContainerQuery((PetscObject)x, NAME, &c));
    PetscCheck(c, PetscObjectComm((PetscObject)x), PETSC_ERR_ARG_WRONGSTATE, "A vector has lost its cut");
    PetscCall(PetscCalloc1(count * c->pieces, &rows));
    PetscCall(PetscMalloc1(count, &b));
    PetscCall(VecGetArrayRead(x, &a));
    for (PetscInt j = 0; j < count; j++) PetscCall(VecGetArrayRead(y[j], &b[j]));
    for (PetscInt p = 0; p < c->count; p++) {
        PetscInt begin = c->edges[p], size = c->edges[p + 1] - begin;
        for (PetscInt j = 0; j < count; j++)
            rows[j * c->pieces + c->first + p] = product(a + begin, b[j] + begin, size);
    }
    for (PetscInt j = 0; j < count; j++) PetscCall(VecRestoreArrayRead(y[j], &b[j]));
    PetscCall(VecRestoreArrayRead(x, &a));
    PetscCall(PetscFree(b));
    PetscCall(total(x, c, count, rows, sums));
    PetscCall(PetscFree(rows));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode dot(Vec x, Vec y, PetscScalar *sum)
{
    PetscFunctionBegin;
    PetscCall(dots(x, 1, &y, sum));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode absolutes(Vec x, PetscReal *sum)
{
    const double *a;
    double *rows;
    cut *c = NULL;

    PetscFunctionBegin;
    PetscCall(PetscObjectContainerQuery((PetscObject)x, NAME, &c));
    PetscCheck(c, PetscObjectComm((PetscObject)x), PETSC_ERR_ARG_WRONGSTATE, "A vector has lost its cut");
    PetscCall(PetscCalloc1(c->pieces, &rows));
    PetscCall(VecGetArrayRead(x, &a));
    for (PetscInt p = 0; p < c->count; p++)
        rows[c->first + p] = absolute(a + c->edges[p], c->edges[p + 1] - c->edges[p]);
    PetscCall(VecRestoreArrayRead(x, &a));
    PetscCall(total(x, c, 1, rows, sum));
    PetscCall(PetscFree(rows));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode norm(Vec x, NormType type, PetscReal *value)
{
    PetscFunctionBegin;
    if (type == NORM_INFINITY) {
        const double *a;
        PetscInt n;
        double most = 0;
        PetscCall(VecGetLocalSize(x, &n));
        PetscCall(VecGetArrayRead(x, &a));
        for (PetscInt i = 0; i < n; i++) {
            double size = PetscAbsReal(a[i]);
            if (!(size <= most)) most = size; /* also where it is not a number, which stays */
            if (PetscIsNanReal(most)) break;
        }
        PetscCall(VecRestoreArrayRead(x, &a));
        /* MPI_MAX may lose what is not a number */
        double pair[2] = {PetscIsNanReal(most) ? 0.0 : most, PetscIsNanReal(most) ? 1.0 : 0.0};
        PetscCallMPI(MPI_Allreduce(MPI_IN_PLACE, pair, 2, MPI_DOUBLE, MPI_MAX, PetscObjectComm((PetscObject)x)));
        *value = pair[1] > 0 ? NAN : pair[0];
        PetscFunctionReturn(PETSC_SUCCESS);
    }
    if (type == NORM_1 || type == NORM_1_AND_2) PetscCall(absolutes(x, value));
    if (type != NORM_1) {
        double *target = type == NORM_1_AND_2 ? value + 1 : value;
        PetscCall(dots(x, 1, &x, target));
        *target = PetscSqrtReal(*target);
    }
    PetscFunctionReturn(PETSC_SUCCESS);
}

/* What PETSc takes for a rank's share of a sum where it puts several reductions into one: the first rank's is the
   whole, the others' are nothing. */
static PetscErrorCode share(Vec x, PetscInt count, PetscScalar *sums)
{
    PetscMPIInt rank;

    PetscFunctionBegin;
    PetscCallMPI(MPI_Comm_rank(PetscObjectComm((PetscObject)x), &rank));
    for (PetscInt j = 0; rank > 0 && j < count; j++) sums[j] = 0;
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode dot_share(Vec x, Vec y, PetscScalar *sum)
{
    PetscFunctionBegin;
    PetscCall(dot(x, y, sum));
    PetscCall(share(x, 1, sum));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode dots_share(Vec x, PetscInt count, const Vec y[], PetscScalar *sums)
{
    PetscFunctionBegin;
    PetscCall(dots(x, count, y, sums));
    PetscCall(share(x, count, sums));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode norm_share(Vec x, NormType type, PetscReal *value)
{
    PetscFunctionBegin;
    PetscCall(norm(x, type, value));
    if (type != NORM_INFINITY) PetscCall(share(x, type == NORM_1_AND_2 ? 2 : 1, value));
    PetscFunctionReturn(PETSC_SUCCESS);
}

/* y = sum over j of alpha[j] x[j] + beta y */
static PetscErrorCode combine(Vec y, PetscInt count, const PetscScalar *alpha, PetscScalar beta, Vec *x)
{
    const double **a;
    double *b;
    PetscInt n;

    PetscFunctionBegin;
    PetscCall(PetscMalloc1(count, &a));
    for (PetscInt j = 0; j < count; j++) PetscCall(VecGetArrayRead(x[j], &a[j]));
    PetscCall(VecGetLocalSize(y, &n));
    PetscCall(VecGetArray(y, &b));
    for (PetscInt begin = 0; begin < n; begin += CACHED) {
        PetscInt end = PetscMin(begin + CACHED, n);
        if (beta == 0)
            for (PetscInt i = begin; i < end; i++) b[i] = 0;
        else if (beta != 1)
            for (PetscInt i = begin; i < end; i++) b[i] *= beta;
        for (PetscInt j = 0; j < count; j++) {
            const double s = alpha[j], *restrict v = a[j];
            PetscInt i = begin;
            for (; i + LANES <= end; i += LANES) {
                __builtin_prefetch(v + i + AHEAD);
                *(lanes *)(b + i) += s * *(const lanes *)(v + i);
            }
            for (; i < end; i++) b[i] += s * v[i];
        }
    }
    PetscCall(VecRestoreArray(y, &b));
    for (PetscInt j = 0; j < count; j++) PetscCall(VecRestoreArrayRead(x[j], &a[j]));
    PetscCall(PetscFree(a));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode maxpy(Vec y, PetscInt count, const PetscScalar *alpha, Vec *x)
{
    PetscFunctionBegin;
    PetscCall(combine(y, count, alpha, 1.0, x));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode maxpby(Vec y, PetscInt count, const PetscScalar *alpha, PetscScalar beta, Vec *x)
{
    PetscFunctionBegin;
    PetscCall(combine(y, count, alpha, beta, x));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode axpy(Vec y, PetscScalar alpha, Vec x)
{
    PetscFunctionBegin;
    PetscCall(combine(y, 1, &alpha, 1.0, &x));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode axpby(Vec y, PetscScalar alpha, PetscScalar beta, Vec x)
{
    PetscFunctionBegin;
    PetscCall(combine(y, 1, &alpha, beta, &x));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode aypx(Vec y, PetscScalar beta, Vec x)
{
    const PetscScalar one = 1.0;

    PetscFunctionBegin;
    PetscCall(combine(y, 1, &one, beta, &x));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode waxpy(Vec w, PetscScalar alpha, Vec x, Vec y)
{
    const double *a, *b;
    double *c;
    PetscInt n;

    PetscFunctionBegin;
    PetscCall(VecGetLocalSize(w, &n));
    PetscCall(VecGetArrayRead(x, &a));
    PetscCall(VecGetArrayRead(y, &b));
    PetscCall(VecGetArray(w, &c));
    for (PetscInt i = 0; i < n; i++) c[i] = b[i] + alpha * a[i];
    PetscCall(VecRestoreArray(w, &c));
    PetscCall(VecRestoreArrayRead(y, &b));
    PetscCall(VecRestoreArrayRead(x, &a));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode axpbypcz(Vec z, PetscScalar alpha, PetscScalar beta, PetscScalar gamma, Vec x, Vec y)
{
    const PetscScalar weights[2] = {alpha, beta};
    Vec vectors[2] = {x, y};

    PetscFunctionBegin;
    PetscCall(combine(z, 2, weights, gamma, vectors));
    PetscFunctionReturn(PETSC_SUCCESS);
}

static PetscErrorCode forget(PetscCtxRt c)
{
    PetscFunctionBegin;
    PetscCall(PetscFree(*(void **)c));
    PetscFunctionReturn(PETSC_SUCCESS);
}

/* Make a vector, and all its duplicates from now on, one that sums in the order of its pieces. */
PetscErrorCode ddml_fix_order(Vec x, long pieces, long first, long count, const long *edges)
{
    cut *c;

    PetscFunctionBegin;
    PetscCall(PetscMalloc(sizeof(cut) + (count + 1) * sizeof(PetscInt), &c));
    c->pieces = (PetscInt)pieces;
    c->first = (PetscInt)first;
    c->count = (PetscInt)count;
    for (long p = 0; p <= count; p++) c->edges[p] = (PetscInt)edges[p];
    PetscCall(PetscObjectContainerCompose((PetscObject)x, NAME, c, forget));
    x->ops->dot = x->ops->tdot = dot;
    x->ops->mdot = x->ops->mtdot = dots;
    x->ops->norm = norm;
    x->ops->dot_local = x->ops->tdot_local = dot_share;
    x->ops->mdot_local = x->ops->mtdot_local = dots_share;
    x->ops->norm_local = norm_share;
    x->ops->axpy = axpy;
    x->ops->axpby = axpby;
    x->ops->aypx = aypx;
    x->ops->waxpy = waxpy;
    x->ops->axpbypcz = axpbypcz;
    x->ops->maxpy = maxpy;
    x->ops->maxpby = maxpby;
    PetscFunctionReturn(PETSC_SUCCESS);
}
