/* What module.c and the engines share: the parts of a job, and the functions of an engine. */

/* Number of values that a lane adds in the precision of the arithmetic before the result is added to a double. */
enum { BLOCK = 16 };

enum { IN, LN, BN, BRANCHES };

typedef struct {
    int softmax, index_of[BRANCHES], count; /* index of a branch in the parameters, -1 if not mixed; K */
    Table mean, var;                        /* gate parameters (K,) */
} Gates;

typedef struct {
    Py_ssize_t samples, channels, positions, groups; /* groups of channels that `ln` pools over */
    double eps, means[BRANCHES], variances[BRANCHES]; /* importance weights */
    int constant;                                    /* whether `bn` has constants instead of the batch's moments */
    int fixed;                                       /* whether all weight is on constants: no moments are mixed */
    Table mean, var;                                 /* of x over its positions, (N, C) */
    double *bn_mean, *bn_var;                        /* (C) */
    double *weight, *bias;                           /* (C), or the identity */
    double *ln_shift, *ln_scale, *in_scale;          /* (C), constants of matched branches, or the identity */
    double *ln_mean, *ln_var;                        /* pooled, (N, G) */
    double *centre, *rstd;                           /* mixed mean and 1 / sqrt(mixed variance + eps): (N, C), or (C) if
                                                        fixed */
    double *zeros;                                   /* (C) */
} Site;

/* Results of the backward pass before dx. */
typedef struct {
    double *p, *q;                                 /* sums of dy, and of dy (x - centre) or dy xhat: (N, C) */
    double *p_ln, *slope_ln;                       /* of `ln`: p and its part of the slope (N, G) */
    double *p_bn, *q_bn;                           /* of `bn` (C) */
    double *gates;                                 /* (N, G, 2, BRANCHES): parts of the two below */
    double means[BRANCHES], variances[BRANCHES];   /* gradients of the importance weights; of means plus a constant */
    double *weight, *bias;                         /* gradients (C) */
} Terms;

struct Passes;

typedef struct {
    Site site;
    Gates gates;
    const struct Passes *passes;
    int dtype, channels_last;
    int has_moments, needs_gates; /* in the backward pass: the forward pass saved them; gates need a gradient */
    Py_ssize_t threads, segments; /* of a sample in channels_last */
    const char *x, *dy;
    char *y; /* or dx, or NULL if dx is not needed */
    Terms terms;
    double *partial; /* (N, segments, 4, C), if there are several segments */
    double *scratch; /* SCRATCH * C numbers for each thread */
} Job;

enum { SCRATCH = 12, SEGMENT = 1 << 15, SEGMENTS = 64, GRAIN = 1 << 14 };

/* The passes for one kind of processor. */
typedef struct {
    const char *name;
    int (*is_available)(void);
    void (*forward)(Job *);  /* writes y, and mean and var unless `fixed` */
    void (*backward)(Job *); /* writes dx and the gradients in `terms` */
} Engine;

/* Threads of torch: the entry points of its OpenMP runtime, a stable interface of GCC's runtime and of those of LLVM
 * and Intel. The extension links no runtime of its own. NULL: one thread. */
typedef struct {
    void (*parallel)(void (*function)(void *), void *data, unsigned threads, unsigned flags);
    int (*thread_number)(void), (*team_size)(void);
} Threads;

#if defined(__GNUC__)
#define HIDDEN __attribute__((visibility("hidden")))
#else
#define HIDDEN
#endif

extern Threads normswap_threads HIDDEN;
extern const Engine normswap_baseline HIDDEN, normswap_avx2 HIDDEN, normswap_avx512 HIDDEN;
