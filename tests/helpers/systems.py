"""Tests that need what not every system has, by name, each with what it needs; elsewhere they are skipped.

`POSIX_ONLY` is skipped on Windows, `LINUX_ONLY` on macOS as well. Some tests of /proc and os.fork skip themselves.
"""

import sys

LOCKS = "locks that end with their process (flock)"
FORK = "os.fork"
LIMITS = "limits of a process (setrlimit)"
LINKS = "symbolic links for everybody"
MODES = "POSIX permissions"
PIPES = "named pipes and devices as paths"
SIGNALS = "signals that end another process"
GROUPS = "processes that meet over gloo and a launcher as on Linux"
UNNAMED = "files without a name (O_TMPFILE, memfd_create)"

LINUX_ONLY = {
    "test_a_copy_between_file_systems_is_read_and_written": "os.copy_file_range",
    "test_without_room_on_the_disk_the_copy_goes_to_memory": UNNAMED,
}

POSIX_ONLY = {
    "test_a_change_at_any_moment_gives_no_output_or_the_tensors_of_one_version": FORK,
    "test_a_disk_that_takes_no_more_is_reported": LIMITS,
    "test_a_full_disk_loses_nothing": LIMITS,
    "test_a_kill_at_any_moment_leaves_nothing_the_old_or_the_whole_new_file": FORK,
    "test_a_killed_run_leaves_a_temporary_that_the_next_one_removes": LOCKS,
    "test_a_link_out_of_a_folder_is_not_followed": LINKS,
    "test_a_link_that_is_no_file_is_reported_or_left_alone": LINKS,
    "test_a_living_run_of_another_user_is_left_alone_and_a_dead_one_is_not": FORK,
    "test_a_log_that_cannot_be_written_is_reported": LIMITS,
    "test_a_name_that_is_too_long_is_refused_early": "the message of the system",
    "test_a_replaced_file_keeps_its_mode": MODES,
    "test_a_run_that_is_ended_leaves_nothing": SIGNALS,
    "test_a_run_whose_temporary_was_taken_for_stale_takes_another": LOCKS,
    "test_an_error_of_all_processes_is_printed_once": GROUPS,
    "test_an_existing_file_is_replaced_and_a_link_followed": LINKS,
    "test_default_handlers_are_put_back": SIGNALS,
    "test_new_files_and_folders_follow_the_umask": MODES,
    "test_permissions_are_reported": MODES,
    "test_the_cache_of_the_hub_is_made_of_links": LINKS,
    "test_the_temporary_of_a_living_run_stays": LOCKS,
    "test_two_processes_end_alike_interrupted_or_not": GROUPS,
    "test_two_processes_pool_what_they_gathered": FORK,
    "test_two_processes_train_the_conversion_as_they_trained_the_original": FORK,
    "test_what_is_no_place_for_a_file_is_refused": PIPES,
    "test_what_only_looks_like_a_temporary_is_neither_followed_nor_waited_for": PIPES,
    "test_without_locks_a_temporary_is_left": LOCKS,
}


def missing_here(name: str, platform: str = sys.platform) -> str | None:
    """Return what a test needs and the system lacks."""
    if platform == "linux":
        return None
    return LINUX_ONLY.get(name) or (POSIX_ONLY.get(name) if platform == "win32" else None)
