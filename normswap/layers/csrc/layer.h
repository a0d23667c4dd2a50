/* A layer's two passes forward and two backward, cut into units that threads share.
 *
 * A unit is a row where the activation is contiguous, and a segment of a sample where it is channels_last. Segments
 * follow from the shape alone, and their sums are added in order: results do not depend on the number of threads.
 */
typedef struct {
    Site site;
    Gates gates;
    const Passes *passes, *sums_of_rows;
    int by_channel;
    Py_ssize_t threads, segments; /* segments of a sample in channels_last */
    const char *x, *dy;
    char *y; /* or dx */
    Pulls pulls;
    double *partial; /* (N, segments, 2, C), where there are several */
    double *scratch; /* SCRATCH C for each thread */
} Job;

enum { SCRATCH = 10, SEGMENT = 1 << 15, SEGMENTS = 64, GRAIN = 1 << 14 };

/* What some units cover of a sample: channels, or positions in segments. */
typedef struct {
    Py_ssize_t channel, channels, position, positions, segment, segments;
    size_t offset; /* bytes */
} Part;

static Py_ssize_t units_of_sample(const Job *j) { return j->by_channel ? j->segments : j->site.channels; }

static Py_ssize_t cut(const Job *j, Py_ssize_t segment) { return j->site.positions * segment / j->segments; }

/* Of sample n, what the units from `begin` to `end` cover. */
static Part part_of(const Job *j, Py_ssize_t n, Py_ssize_t begin, Py_ssize_t end) {
    const Py_ssize_t each = units_of_sample(j), channels = j->site.channels, positions = j->site.positions;
    const Py_ssize_t from = begin > n * each ? begin - n * each : 0;
    const Py_ssize_t to = end < (n + 1) * each ? end - n * each : each;
    Part part = {from, to - from, 0, positions, 0, 0, 0};
    if (j->by_channel)
        part = (Part){0, channels, cut(j, from), cut(j, to) - cut(j, from), from, to - from, 0};
    part.offset = (size_t)(n * channels * positions) * j->passes->size;
    part.offset += (size_t)(j->by_channel ? part.position * channels : part.channel * positions) * j->passes->size;
    return part;
}

static double *scratch_of(const Job *j, Py_ssize_t thread) { return j->scratch + thread * SCRATCH * j->site.channels; }

/* Where the two sums of a segment go. */
static double *sums_of(const Job *j, Py_ssize_t n, Py_ssize_t segment) {
    return j->partial + (n * j->segments + segment) * 2 * j->site.channels;
}

/* Moments of sample n out of the sums of its segments. */
static void finish_moments(const Job *j, Py_ssize_t n, double *sums, double *scratch) {
    const Py_ssize_t channels = j->site.channels;
    for (Py_ssize_t segment = 1; segment < j->segments; segment++)
        for (Py_ssize_t c = 0; c < 2 * channels; c++)
            sums[c] += sums[segment * 2 * channels + c];
    j->passes->column_moments(j->x + (size_t)(n * channels * j->site.positions) * j->passes->size, channels,
                              j->site.positions, sums, sums + channels, j->site.mean, j->site.var, n * channels,
                              scratch);
}

static void measure_part(const Job *j, Py_ssize_t n, Part part, double *scratch) {
    const Site *s = &j->site;
    const char *sample = j->x + (size_t)(n * s->channels * s->positions) * j->passes->size;
    if (!j->by_channel) {
        j->sums_of_rows->row_moments(j->x + part.offset, part.channels, s->positions, s->mean, s->var,
                               n * s->channels + part.channel);
        return;
    }
    double *origin = scratch + 4 * s->channels;
    j->passes->origin(sample, s->channels, origin);
    for (Py_ssize_t segment = part.segment; segment < part.segment + part.segments; segment++) {
        double *sums = j->segments > 1 ? sums_of(j, n, segment) : scratch + 2 * s->channels;
        const size_t offset = (size_t)(cut(j, segment) * s->channels) * j->passes->size;
        j->passes->column_squares(sample + offset, origin, s->channels, cut(j, segment + 1) - cut(j, segment), sums,
                                  sums + s->channels, scratch);
        if (j->segments == 1)
            finish_moments(j, n, sums, scratch);
    }
}

static void apply_part(const Job *j, Py_ssize_t n, Part part, double *scratch) {
    const Py_ssize_t count = part.channels;
    double *scale = scratch, *shift = scale + count, *centre = shift + count, *rest = centre + count;
    forward_row(&j->site, n, part.channel, count, scale, shift, centre, rest);
    j->passes->affine[j->by_channel](j->x + part.offset, j->y + part.offset, count, part.positions, scale, shift, centre,
                                     rest);
}

static void gather_part(const Job *j, Py_ssize_t n, Part part, double *scratch) {
    const Py_ssize_t all = j->site.channels, at = n * all + part.channel;
    double *centre = scratch, *rstd = centre + part.channels, *rest = rstd + part.channels;
    mix(&j->site, n, part.channel, part.channels, centre, rstd, rest);
    if (!j->by_channel || j->segments == 1) {
        const Passes *passes = j->by_channel ? j->passes : j->sums_of_rows;
        passes->sums[j->by_channel](j->dy + part.offset, j->x + part.offset, part.channels, part.positions, centre,
                                       j->pulls.p + at, j->pulls.q + at, rest);
        return;
    }
    for (Py_ssize_t segment = part.segment; segment < part.segment + part.segments; segment++) {
        const size_t offset = (size_t)((n * j->site.positions + cut(j, segment)) * all) * j->passes->size;
        double *sums = sums_of(j, n, segment);
        j->passes->sums[1](j->dy + offset, j->x + offset, all, cut(j, segment + 1) - cut(j, segment), centre, sums,
                           sums + all, rest);
    }
}

static void combine_part(const Job *j, Py_ssize_t n, Part part, double *scratch) {
    const Py_ssize_t count = part.channels;
    double *scale = scratch, *slope = scale + count, *shift = slope + count, *centre = shift + count;
    backward_row(&j->site, &j->pulls, n, part.channel, count, scale, slope, shift, centre, centre + count);
    j->passes->combine[j->by_channel](j->dy + part.offset, j->x + part.offset, j->y + part.offset, count,
                                      part.positions, scale, slope, shift, centre, centre + count);
}

typedef void (*ForPart)(const Job *, Py_ssize_t n, Part, double *scratch);

static void forwards(const Job *j, ForPart act, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    const Py_ssize_t each = units_of_sample(j);
    for (Py_ssize_t n = begin / each; n * each < end; n++)
        act(j, n, part_of(j, n, begin, end), scratch_of(j, thread));
}

/* From the last sample back: it is still in the cache. */
static void backwards(const Job *j, ForPart act, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    const Py_ssize_t each = units_of_sample(j);
    for (Py_ssize_t n = (end - 1) / each; n >= begin / each && begin < end; n--)
        act(j, n, part_of(j, n, begin, end), scratch_of(j, thread));
}

static void measure(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    forwards(job, measure_part, begin, end, thread);
}

static void apply(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    backwards(job, apply_part, begin, end, thread);
}

static void gather(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    forwards(job, gather_part, begin, end, thread);
}

static void combine(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    backwards(job, combine_part, begin, end, thread);
}

/* Where no sample needs another one: one after the other, each in the cache from its first value to y. */
static void normalise_samples(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    const Job *j = job;
    const Py_ssize_t each = units_of_sample(j);
    for (Py_ssize_t n = begin; n < end; n++) {
        const Part whole = part_of(j, n, n * each, (n + 1) * each);
        measure_part(j, n, whole, scratch_of(j, thread));
        if (j->by_channel && j->segments > 1)
            finish_moments(j, n, sums_of(j, n, 0), scratch_of(j, thread));
        pool_sample(&j->site, n, scratch_of(j, thread));
        apply_part(j, n, whole, scratch_of(j, thread));
    }
}

static void pool(const Job *j) {
    const Site *s = &j->site;
    for (Py_ssize_t n = 0; n < s->samples; n++)
        pool_sample(s, n, j->scratch);
    if (s->fixed_mean.values == NULL)
        pool_batch(s, j->scratch);
}

static void forward(Job *j) {
    const Site *s = &j->site;
    const Py_ssize_t units = s->samples * units_of_sample(j);
    const int even = s->samples % j->threads == 0 || s->samples >= 4 * j->threads;
    if (s->fixed_mean.values != NULL && even) {
        run(normalise_samples, j, s->samples, j->threads);
        return;
    }
    run(measure, j, units, j->threads);
    if (j->by_channel && j->segments > 1)
        for (Py_ssize_t n = 0; n < s->samples; n++)
            finish_moments(j, n, sums_of(j, n, 0), j->scratch);
    pool(j);
    run(apply, j, units, j->threads);
}

static void backward(Job *j) {
    const Site *s = &j->site;
    const Py_ssize_t units = s->samples * units_of_sample(j);
    pool(j);
    run(gather, j, units, j->threads);
    for (Py_ssize_t n = 0; n < s->samples; n++) {
        for (Py_ssize_t segment = 0; j->by_channel && j->segments > 1 && segment < j->segments; segment++)
            for (Py_ssize_t c = 0; c < s->channels; c++) {
                const double *sums = sums_of(j, n, segment);
                double *p = j->pulls.p + n * s->channels, *q = j->pulls.q + n * s->channels;
                p[c] = (segment ? p[c] : 0) + sums[c];
                q[c] = (segment ? q[c] : 0) + sums[s->channels + c];
            }
        pull_sample(s, &j->pulls, n, j->scratch);
    }
    if (j->y != NULL)
        run(combine, j, units, j->threads);
}

/* One block for all tables of a job, zeros at first where that matters; NULL where there is no memory. */
static double *allocate(Job *j, int with_pulls) {
    Site *s = &j->site;
    Pulls *p = &j->pulls;
    const size_t n = (size_t)s->samples, c = (size_t)s->channels, threads = (size_t)j->threads;
    const size_t partial = j->by_channel && j->segments > 1 ? n * (size_t)j->segments * 2 * c : 0;
    const size_t zeroed = 5 * c, pulls = with_pulls ? 2 * n * c + 2 * n : 0;
    double *block = malloc((zeroed + 2 * n + 2 * c + pulls + partial + threads * SCRATCH * c) * sizeof(double));
    if (block == NULL)
        return NULL;
    memset(block, 0, zeroed * sizeof(double));
    double **tables[] = {&s->zeros, &p->p_bn,  &p->q_bn,    &p->weight, &p->bias, &s->bn_mean,
                         &s->bn_var, &s->ln_mean, &s->ln_var, &p->p_ln,   &p->q_ln, &p->p, &p->q};
    const size_t sizes[] = {c, c, c, c, c, c, c, n, n, with_pulls ? n : 0, with_pulls ? n : 0,
                            with_pulls ? n * c : 0, with_pulls ? n * c : 0};
    double *next = block;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; next += sizes[i], i++)
        *tables[i] = next;
    j->partial = next;
    j->scratch = next + partial;
    return block;
}
