"""The jobs of the table, by recipe."""

from collections.abc import Mapping

from benchmarks.jobs.plan import Job

JOBS: Mapping[str, Job] = {
    job.recipe: job
    for job in (Job("digits_small_batch", "Classification of shifted digits, batch 1", source="digits_source"),)
}
