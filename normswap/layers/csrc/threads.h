/* Work shared among the threads that torch has: those of the OpenMP runtime that it was built with, by its own entry
 * points (a stable interface of GCC's runtime, kept by those of LLVM and Intel). No runtime of our own comes in.
 *
 * A unit of work is done by one thread, from first to last as it would be alone; who does which changes no result.
 */
typedef void (*Slice)(void *job, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t thread);

static void (*parallel)(void (*function)(void *), void *data, unsigned threads, unsigned flags);
static int (*thread_number)(void), (*team_size)(void);

typedef struct {
    Slice slice;
    void *job;
    Py_ssize_t units;
} Work;

static void do_share(void *data) {
    const Work *work = data;
    const Py_ssize_t number = thread_number(), size = team_size();
    work->slice(work->job, work->units * number / size, work->units * (number + 1) / size, number);
}

static void run(Slice slice, void *job, Py_ssize_t units, Py_ssize_t threads) {
    Work work = {slice, job, units};
    if (threads > units)
        threads = units;
    if (threads > 1 && parallel != NULL)
        parallel(do_share, &work, (unsigned)threads, 0);
    else
        slice(job, 0, units, 0);
}
