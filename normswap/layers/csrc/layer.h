/* The forward and the backward pass of a layer, divided among the threads of torch.
 *
 * A unit of work is a row of a contiguous activation, or a segment of a sample of a channels_last activation. One
 * thread computes a whole unit. The segments depend on the shape only and their sums are added in order, so results do
 * not depend on the number of threads.
 */

/* --- threads: the OpenMP runtime of torch -------------------------------------------------------------------- */

/* Its entry points, which are a stable interface of GCC's runtime and of those of LLVM and Intel. The extension links
 * no runtime of its own. */
static void (*parallel)(void (*function)(void *), void *data, unsigned threads, unsigned flags);
static int (*thread_number)(void), (*team_size)(void);

typedef void (*Slice)(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread);

typedef struct {
    Slice slice;
    void *job;
    Py_ssize_t units;
} Work;

static void run_share(void *data) {
    const Work *work = data;
    const Py_ssize_t number = thread_number(), size = team_size();
    work->slice(work->job, work->units * number / size, work->units * (number + 1) / size, number);
}

static void run(Slice slice, void *job, Py_ssize_t units, Py_ssize_t threads) {
    Work work = {slice, job, units};
    if (threads > units)
        threads = units;
    if (threads > 1 && parallel != NULL)
        parallel(run_share, &work, (unsigned)threads, 0);
    else
        slice(job, 0, units, 0);
}

/* --- a job and its parts ------------------------------------------------------------------------------------- */

typedef struct {
    Site site;
    Gates gates;
    const Passes *passes, *row_passes; /* the second for sums over rows */
    int channels_last;
    Py_ssize_t threads, segments; /* of a sample in channels_last */
    const char *x, *dy;
    char *y; /* or dx */
    Terms terms;
    double *partial; /* (N, segments, 2, C), if there are several segments */
    double *scratch; /* SCRATCH * C numbers for each thread */
} Job;

enum { SCRATCH = 10, SEGMENT = 1 << 15, SEGMENTS = 64, GRAIN = 1 << 14 };

/* The part of a sample in some units: a range of channels, or of positions (in segments). */
typedef struct {
    Py_ssize_t channel, channels, position, positions, segment, segments;
    size_t offset; /* bytes */
} Part;

static Py_ssize_t units_of_sample(const Job *j) { return j->channels_last ? j->segments : j->site.channels; }

static Py_ssize_t segment_start(const Job *j, Py_ssize_t segment) { return j->site.positions * segment / j->segments; }

/* The part of sample n in the units from `begin` to `end`. */
static Part part_of(const Job *j, Py_ssize_t n, Py_ssize_t begin, Py_ssize_t end) {
    const Py_ssize_t each = units_of_sample(j), channels = j->site.channels, positions = j->site.positions;
    const Py_ssize_t first = begin > n * each ? begin - n * each : 0;
    const Py_ssize_t last = end < (n + 1) * each ? end - n * each : each;
    Part part = {.channel = first, .channels = last - first, .positions = positions};
    if (j->channels_last)
        part = (Part){.channels = channels,
                      .position = segment_start(j, first),
                      .positions = segment_start(j, last) - segment_start(j, first),
                      .segment = first,
                      .segments = last - first};
    part.offset = (size_t)(n * channels * positions) * j->passes->size;
    part.offset += (size_t)(j->channels_last ? part.position * channels : part.channel * positions) * j->passes->size;
    return part;
}

static double *scratch_of(const Job *j, Py_ssize_t thread) { return j->scratch + thread * SCRATCH * j->site.channels; }

/* The two sums of a segment. */
static double *segment_sums(const Job *j, Py_ssize_t n, Py_ssize_t segment) {
    return j->partial + (n * j->segments + segment) * 2 * j->site.channels;
}

/* Compute the moments of sample n from the sums of its segments. */
static void finish_moments(const Job *j, Py_ssize_t n, double *sums, double *scratch) {
    const Py_ssize_t channels = j->site.channels;
    for (Py_ssize_t segment = 1; segment < j->segments; segment++)
        for (Py_ssize_t c = 0; c < 2 * channels; c++)
            sums[c] += sums[segment * 2 * channels + c];
    j->passes->column_moments(j->x + (size_t)(n * channels * j->site.positions) * j->passes->size, channels,
                              j->site.positions, sums, sums + channels, j->site.mean, j->site.var, n * channels,
                              scratch);
}

static void moments_of_part(const Job *j, Py_ssize_t n, Part part, double *scratch) {
    const Site *s = &j->site;
    const char *sample = j->x + (size_t)(n * s->channels * s->positions) * j->passes->size;
    if (!j->channels_last) {
        j->row_passes->row_moments(j->x + part.offset, part.channels, s->positions, s->mean, s->var,
                                   n * s->channels + part.channel);
        return;
    }
    double *origin = scratch + 4 * s->channels;
    j->passes->first_column(sample, s->channels, origin);
    for (Py_ssize_t segment = part.segment; segment < part.segment + part.segments; segment++) {
        double *sums = j->segments > 1 ? segment_sums(j, n, segment) : scratch + 2 * s->channels;
        const size_t offset = (size_t)(segment_start(j, segment) * s->channels) * j->passes->size;
        j->passes->column_squares(sample + offset, origin, s->channels,
                                  segment_start(j, segment + 1) - segment_start(j, segment), sums, sums + s->channels,
                                  scratch);
        if (j->segments == 1)
            finish_moments(j, n, sums, scratch);
    }
}

static void affine_part(const Job *j, Py_ssize_t n, Part part, double *scratch) {
    const Py_ssize_t count = part.channels;
    double *scale = scratch, *shift = scale + count, *centre = shift + count, *rest = centre + count;
    forward_row(&j->site, n, part.channel, count, scale, shift, centre, rest);
    j->passes->affine[j->channels_last](j->x + part.offset, j->y + part.offset, count, part.positions, scale, shift,
                                        centre, rest);
}

static void gradient_sums_of_part(const Job *j, Py_ssize_t n, Part part, double *scratch) {
    const Py_ssize_t all = j->site.channels, at = n * all + part.channel;
    double *centre = scratch, *rstd = centre + part.channels, *rest = rstd + part.channels;
    mix(&j->site, n, part.channel, part.channels, centre, rstd, rest);
    if (!j->channels_last || j->segments == 1) {
        const Passes *passes = j->channels_last ? j->passes : j->row_passes;
        passes->sums[j->channels_last](j->dy + part.offset, j->x + part.offset, part.channels, part.positions, centre,
                                       j->terms.p + at, j->terms.q + at, rest);
        return;
    }
    for (Py_ssize_t segment = part.segment; segment < part.segment + part.segments; segment++) {
        const size_t offset = (size_t)((n * j->site.positions + segment_start(j, segment)) * all) * j->passes->size;
        double *sums = segment_sums(j, n, segment);
        j->passes->sums[1](j->dy + offset, j->x + offset, all,
                           segment_start(j, segment + 1) - segment_start(j, segment), centre, sums, sums + all, rest);
    }
}

static void input_gradient_of_part(const Job *j, Py_ssize_t n, Part part, double *scratch) {
    const Py_ssize_t count = part.channels;
    double *scale = scratch, *slope = scale + count, *shift = slope + count, *centre = shift + count;
    backward_row(&j->site, &j->terms, n, part.channel, count, scale, slope, shift, centre, centre + count);
    j->passes->input_gradient[j->channels_last](j->dy + part.offset, j->x + part.offset, j->y + part.offset, count,
                                                part.positions, scale, slope, shift, centre, centre + count);
}

/* --- passes -------------------------------------------------------------------------------------------------- */

typedef void (*PartFunction)(const Job *, Py_ssize_t n, Part, double *scratch);

static void for_parts(const Job *j, PartFunction function, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    const Py_ssize_t each = units_of_sample(j);
    for (Py_ssize_t n = begin / each; n * each < end; n++)
        function(j, n, part_of(j, n, begin, end), scratch_of(j, thread));
}

/* Start at the last sample, which is still in the cache. */
static void for_parts_backwards(const Job *j, PartFunction function, Py_ssize_t begin, Py_ssize_t end,
                                Py_ssize_t thread) {
    const Py_ssize_t each = units_of_sample(j);
    for (Py_ssize_t n = (end - 1) / each; n >= begin / each && begin < end; n--)
        function(j, n, part_of(j, n, begin, end), scratch_of(j, thread));
}

static void run_moments(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    for_parts(job, moments_of_part, begin, end, thread);
}

static void run_affine(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    for_parts_backwards(job, affine_part, begin, end, thread);
}

static void run_gradient_sums(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    for_parts(job, gradient_sums_of_part, begin, end, thread);
}

static void run_input_gradient(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    for_parts_backwards(job, input_gradient_of_part, begin, end, thread);
}

/* For constant moments no sample depends on another: compute moments and y of each sample while it is in the cache. */
static void normalise_samples(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    const Job *j = job;
    const Py_ssize_t each = units_of_sample(j);
    for (Py_ssize_t n = begin; n < end; n++) {
        const Part sample = part_of(j, n, n * each, (n + 1) * each);
        moments_of_part(j, n, sample, scratch_of(j, thread));
        if (j->channels_last && j->segments > 1)
            finish_moments(j, n, segment_sums(j, n, 0), scratch_of(j, thread));
        pool_sample(&j->site, n, scratch_of(j, thread));
        affine_part(j, n, sample, scratch_of(j, thread));
    }
}

static void pool_all(const Job *j) {
    const Site *s = &j->site;
    for (Py_ssize_t n = 0; n < s->samples; n++)
        pool_sample(s, n, j->scratch);
    if (s->constant_mean.values == NULL)
        pool_batch(s, j->scratch);
}

static void forward(Job *j) {
    const Site *s = &j->site;
    const Py_ssize_t units = s->samples * units_of_sample(j);
    const int balanced = s->samples % j->threads == 0 || s->samples >= 4 * j->threads;
    if (s->constant_mean.values != NULL && balanced) {
        run(normalise_samples, j, s->samples, j->threads);
        return;
    }
    run(run_moments, j, units, j->threads);
    if (j->channels_last && j->segments > 1)
        for (Py_ssize_t n = 0; n < s->samples; n++)
            finish_moments(j, n, segment_sums(j, n, 0), j->scratch);
    pool_all(j);
    run(run_affine, j, units, j->threads);
}

static void backward(Job *j) {
    const Site *s = &j->site;
    const Py_ssize_t units = s->samples * units_of_sample(j);
    pool_all(j);
    run(run_gradient_sums, j, units, j->threads);
    for (Py_ssize_t n = 0; n < s->samples; n++) {
        for (Py_ssize_t segment = 0; j->channels_last && j->segments > 1 && segment < j->segments; segment++)
            for (Py_ssize_t c = 0; c < s->channels; c++) {
                const double *sums = segment_sums(j, n, segment);
                double *p = j->terms.p + n * s->channels, *q = j->terms.q + n * s->channels;
                p[c] = (segment ? p[c] : 0) + sums[c];
                q[c] = (segment ? q[c] : 0) + sums[s->channels + c];
            }
        backward_sample(s, &j->terms, n, j->scratch);
    }
    if (j->y != NULL)
        run(run_input_gradient, j, units, j->threads);
}

/* Allocate one block for all tables of a job; NULL if there is no memory. Tables that sums are added to start at 0. */
static double *allocate(Job *j, int with_terms) {
    Site *s = &j->site;
    Terms *p = &j->terms;
    const size_t n = (size_t)s->samples, c = (size_t)s->channels, threads = (size_t)j->threads;
    const size_t partial = j->channels_last && j->segments > 1 ? n * (size_t)j->segments * 2 * c : 0;
    const size_t rows = n * (size_t)s->groups, constants = s->extended ? c : 0;
    const size_t zeroed = 5 * c, terms = with_terms ? 2 * n * c + 2 * rows : 0;
    double *block = malloc((zeroed + 2 * rows + 2 * c + 3 * constants + terms + partial + threads * SCRATCH * c) *
                           sizeof(double));
    if (block == NULL)
        return NULL;
    memset(block, 0, zeroed * sizeof(double));
    double **tables[] = {&s->zeros,   &p->p_bn,   &p->q_bn,  &p->weight, &p->bias, &s->bn_mean,
                         &s->bn_var,  &s->shift,  &s->scale, &s->in_scales, &s->ln_mean, &s->ln_var,
                         &p->p_ln,    &p->slope_ln, &p->p,   &p->q};
    const size_t sizes[] = {c,
                            c,
                            c,
                            c,
                            c,
                            c,
                            c,
                            constants,
                            constants,
                            constants,
                            rows,
                            rows,
                            with_terms ? rows : 0,
                            with_terms ? rows : 0,
                            with_terms ? n * c : 0,
                            with_terms ? n * c : 0};
    double *next = block;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; next += sizes[i], i++)
        *tables[i] = next;
    j->partial = next;
    j->scratch = next + partial;
    return block;
}
