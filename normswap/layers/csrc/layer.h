/* The forward and the backward pass of a layer, divided among the threads of torch.
 *
 * A unit of work is a row of a contiguous activation, or a segment of a sample of a channels_last activation. One
 * thread computes a whole unit. The segments depend on the shape only and their sums are added in order, so results do
 * not depend on the number of threads.
 */

/* --- threads -------------------------------------------------------------------------------------------------- */

typedef void (*Slice)(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread);

typedef struct {
    Slice slice;
    void *job;
    Py_ssize_t units;
} Work;

static void run_share(void *data) {
    const Work *work = data;
    const Py_ssize_t number = normswap_threads.thread_number(), size = normswap_threads.team_size();
    work->slice(work->job, work->units * number / size, work->units * (number + 1) / size, number);
}

static void run(Slice slice, Job *job, Py_ssize_t units) {
    Work work = {slice, job, units};
    const Py_ssize_t threads = job->threads < units ? job->threads : units;
    if (threads > 1 && normswap_threads.parallel != NULL)
        normswap_threads.parallel(run_share, &work, (unsigned)threads, 0);
    else
        slice(job, 0, units, 0);
}

/* --- parts of a job ------------------------------------------------------------------------------------------- */

/* The part of a sample in some units: a range of channels, or of positions (in segments). */
typedef struct {
    Py_ssize_t channel, channels, position, positions, segment, segments;
    size_t offset; /* bytes */
} Part;

static Py_ssize_t units_of_sample(const Job *j) { return j->channels_last ? j->segments : j->site.channels; }

static Py_ssize_t segment_start(const Job *j, Py_ssize_t segment) { return j->site.positions * segment / j->segments; }

static size_t sample_offset(const Job *j, Py_ssize_t n) {
    return (size_t)(n * j->site.channels * j->site.positions) * j->passes->size;
}

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
    part.offset = sample_offset(j, n);
    part.offset += (size_t)(j->channels_last ? part.position * channels : part.channel * positions) * j->passes->size;
    return part;
}

static double *scratch_of(const Job *j, Py_ssize_t thread) { return j->scratch + thread * SCRATCH * j->site.channels; }

/* The four sums of a segment. */
static double *segment_sums(const Job *j, Py_ssize_t n, Py_ssize_t segment) {
    return j->partial + (n * j->segments + segment) * 4 * j->site.channels;
}

/* Add the first `sums` sums of all segments of sample n to those of the first segment. */
static double *add_segments(const Job *j, Py_ssize_t n, Py_ssize_t sums) {
    double *restrict total = segment_sums(j, n, 0);
    for (Py_ssize_t segment = 1; segment < j->segments; segment++) {
        const double *restrict other = segment_sums(j, n, segment);
        for (Py_ssize_t c = 0; c < sums * j->site.channels; c++)
            total[c] += other[c];
    }
    return total;
}

static void moments_of_part(const Job *j, Py_ssize_t n, Part part, double *scratch) {
    const Site *s = &j->site;
    const char *sample = j->x + sample_offset(j, n);
    if (!j->channels_last) {
        j->passes->row_moments(j->x + part.offset, part.channels, s->positions, s->mean, s->var,
                               n * s->channels + part.channel);
        return;
    }
    double *origin = scratch + 2 * s->channels;
    j->passes->first_column(sample, s->channels, origin);
    for (Py_ssize_t segment = part.segment; segment < part.segment + part.segments; segment++) {
        double *sums = j->segments > 1 ? segment_sums(j, n, segment) : scratch;
        const Py_ssize_t start = segment_start(j, segment);
        j->passes->column_squares(sample + (size_t)(start * s->channels) * j->passes->size, origin, s->channels,
                                  segment_start(j, segment + 1) - start, sums, scratch + 3 * s->channels);
        if (j->segments == 1)
            j->passes->column_moments(sample, s->channels, s->positions, sums, sums + s->channels, s->mean, s->var,
                                      n * s->channels);
    }
}

/* If sample n has several segments, compute its moments from their sums. */
static void finish_moments(const Job *j, Py_ssize_t n) {
    const Site *s = &j->site;
    if (!j->channels_last || j->segments == 1)
        return;
    double *sums = add_segments(j, n, 2);
    j->passes->column_moments(j->x + sample_offset(j, n), s->channels, s->positions, sums, sums + s->channels, s->mean,
                              s->var, n * s->channels);
}

static void affine_part(const Job *j, Py_ssize_t n, Part part, double *scratch) {
    const Site *s = &j->site;
    forward_row(s, n, part.channel, part.channels, scratch);
    j->passes->affine[j->channels_last](j->x + part.offset, j->y + part.offset, part.channels, part.positions, scratch,
                                        s->bias + part.channel, s->centre + mixed_at(s, n) + part.channel,
                                        scratch + part.channels);
}

static void sums_of_part(const Job *j, Py_ssize_t n, Part part, double *scratch) {
    const Py_ssize_t all = j->site.channels, at = n * all + part.channel;
    const double *centre = j->site.centre + mixed_at(&j->site, n) + part.channel;
    if (!j->channels_last || j->segments == 1) {
        j->passes->sums[j->channels_last](j->dy + part.offset, j->x + part.offset, part.channels, part.positions,
                                          centre, j->terms.p + at, j->terms.q + at, scratch);
        return;
    }
    for (Py_ssize_t segment = part.segment; segment < part.segment + part.segments; segment++) {
        const Py_ssize_t start = segment_start(j, segment);
        const size_t offset = sample_offset(j, n) + (size_t)(start * all) * j->passes->size;
        double *sums = segment_sums(j, n, segment);
        j->passes->sums[1](j->dy + offset, j->x + offset, all, segment_start(j, segment + 1) - start, centre, sums,
                           sums + all, scratch);
    }
}

static void input_gradient_of_part(const Job *j, Py_ssize_t n, Part part, double *scratch) {
    const Py_ssize_t count = part.channels;
    double *scale = scratch, *slope = scale + count, *shift = slope + count, *centre = shift + count;
    backward_row(&j->site, &j->terms, n, part.channel, count, scale, slope, shift, centre);
    j->passes->input_gradient[j->channels_last](j->dy + part.offset, j->x + part.offset, j->y + part.offset, count,
                                                part.positions, scale, slope, shift, centre, centre + count);
}

/* dx, the sums and, if gates need them, the moments of a part whose mean and variance are constants, in one pass. */
static void gradients_of_part(const Job *j, Py_ssize_t n, Part part, double *scratch) {
    const Site *s = &j->site;
    const Py_ssize_t all = s->channels, at = n * all + part.channel;
    const int moments = j->needs_gates && !j->has_moments;
    const Table none = {NULL, FLOAT};
    double *scale = scratch, *origin = scale + all, *own = origin + all, *rest = own + 4 * all;
    forward_row(s, 0, part.channel, part.channels, scale);
    if (!j->channels_last) {
        j->passes->row_gradients(j->dy + part.offset, j->x + part.offset, j->y + part.offset, part.channels,
                                 s->positions, scale, s->centre + part.channel, j->terms.p + at, j->terms.q + at,
                                 moments ? s->mean : none, moments ? s->var : none, at);
        return;
    }
    j->passes->first_column(j->x + sample_offset(j, n), all, origin);
    for (Py_ssize_t segment = part.segment; segment < part.segment + part.segments; segment++) {
        const Py_ssize_t start = segment_start(j, segment);
        const size_t offset = sample_offset(j, n) + (size_t)(start * all) * j->passes->size;
        double *sums = j->segments > 1 ? segment_sums(j, n, segment) : own;
        j->passes->column_gradients(j->dy + offset, j->x + offset, j->y + offset, origin, all,
                                    segment_start(j, segment + 1) - start, scale, s->centre, sums, moments, rest);
        if (j->segments == 1) {
            memcpy(j->terms.p + at, sums, (size_t)all * sizeof(double));
            memcpy(j->terms.q + at, sums + all, (size_t)all * sizeof(double));
            if (moments)
                j->passes->column_moments(j->x + sample_offset(j, n), all, s->positions, sums + 2 * all,
                                          sums + 3 * all, s->mean, s->var, at);
        }
    }
}

/* If sample n has several segments, compute its terms p and q and, if `moments`, its moments from their sums. */
static void finish_sums(const Job *j, Py_ssize_t n, int moments) {
    const Site *s = &j->site;
    const Py_ssize_t all = s->channels;
    if (!j->channels_last || j->segments == 1)
        return;
    double *sums = add_segments(j, n, moments ? 4 : 2);
    memcpy(j->terms.p + n * all, sums, (size_t)all * sizeof(double));
    memcpy(j->terms.q + n * all, sums + all, (size_t)all * sizeof(double));
    if (moments)
        j->passes->column_moments(j->x + sample_offset(j, n), all, s->positions, sums + 2 * all, sums + 3 * all,
                                  s->mean, s->var, n * all);
}

/* --- passes --------------------------------------------------------------------------------------------------- */

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

static void run_sums(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    for_parts(job, sums_of_part, begin, end, thread);
}

static void run_input_gradient(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    for_parts_backwards(job, input_gradient_of_part, begin, end, thread);
}

static void run_gradients(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    for_parts(job, gradients_of_part, begin, end, thread);
}

static void mix_samples(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    const Job *j = job;
    for (Py_ssize_t n = begin; n < end; n++)
        mix(&j->site, n, scratch_of(j, thread));
}

static Part whole_sample(const Job *j, Py_ssize_t n) {
    return part_of(j, n, n * units_of_sample(j), (n + 1) * units_of_sample(j));
}

/* For constant moments no sample depends on another: compute moments and y of each sample while it is in the cache. */
static void normalise_samples(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    const Job *j = job;
    double *scratch = scratch_of(j, thread);
    for (Py_ssize_t n = begin; n < end; n++) {
        moments_of_part(j, n, whole_sample(j, n), scratch);
        finish_moments(j, n);
        pool_sample(&j->site, n, scratch);
        mix(&j->site, n, scratch);
        affine_part(j, n, whole_sample(j, n), scratch);
    }
}

/* The same for the backward pass: sums and dx of each sample. */
static void differentiate_samples(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread) {
    Job *j = job;
    double *scratch = scratch_of(j, thread);
    for (Py_ssize_t n = begin; n < end; n++) {
        pool_sample(&j->site, n, scratch);
        mix(&j->site, n, scratch);
        sums_of_part(j, n, whole_sample(j, n), scratch);
        finish_sums(j, n, 0);
        backward_sample(&j->site, &j->terms, n, scratch);
        if (j->y != NULL)
            input_gradient_of_part(j, n, whole_sample(j, n), scratch);
    }
}

/* Whether samples can be divided among the threads evenly. */
static int is_balanced(const Job *j) { return j->site.samples % j->threads == 0 || j->site.samples >= 4 * j->threads; }

static void compute_moments(Job *j) {
    run(run_moments, j, j->site.samples * units_of_sample(j));
    for (Py_ssize_t n = 0; n < j->site.samples; n++)
        finish_moments(j, n);
}

static void pool_and_mix(Job *j) {
    for (Py_ssize_t n = 0; n < j->site.samples; n++)
        pool_sample(&j->site, n, j->scratch);
    if (!j->site.constant)
        pool_batch(&j->site, j->scratch);
    run(mix_samples, j, j->site.samples);
}

static void forward(Job *j) {
    j->passes = PASSES[j->dtype];
    const Py_ssize_t units = j->site.samples * units_of_sample(j);
    if (j->site.fixed)
        mix(&j->site, 0, j->scratch);
    else if (j->site.constant && is_balanced(j)) {
        run(normalise_samples, j, j->site.samples);
        return;
    } else {
        compute_moments(j);
        pool_and_mix(j);
    }
    run(run_affine, j, units);
}

/* The backward pass of a layer with constant moments: dx does not depend on sums. */
static void backward_fixed(Job *j) {
    const Site *s = &j->site;
    const Py_ssize_t units = s->samples * units_of_sample(j);
    const int moments = j->needs_gates && !j->has_moments;
    mix(s, 0, j->scratch);
    if (j->y == NULL && moments)
        compute_moments(j);
    run(j->y == NULL ? run_sums : run_gradients, j, units);
    for (Py_ssize_t n = 0; n < s->samples; n++) {
        finish_sums(j, n, moments && j->y != NULL);
        if (j->needs_gates) {
            pool_sample(s, n, j->scratch);
            backward_sample(s, &j->terms, n, j->scratch);
        } else
            normalise_products(s, &j->terms, n);
    }
}

static void backward(Job *j) {
    j->passes = PASSES[j->dtype];
    const Site *s = &j->site;
    const Py_ssize_t units = s->samples * units_of_sample(j);
    if (s->fixed)
        backward_fixed(j);
    else {
        if (!j->has_moments)
            compute_moments(j);
        if (s->constant && is_balanced(j))
            run(differentiate_samples, j, s->samples);
        else {
            pool_and_mix(j);
            run(run_sums, j, units);
            for (Py_ssize_t n = 0; n < s->samples; n++) {
                finish_sums(j, n, 0);
                backward_sample(s, &j->terms, n, j->scratch);
            }
            if (j->y != NULL)
                run(run_input_gradient, j, units);
        }
    }
    finish_terms(s, &j->terms, j->needs_gates);
}
