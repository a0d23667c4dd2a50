"""The jobs of the table, by recipe."""

from collections.abc import Mapping

from benchmarks.jobs.plan import Job

# Opacus replaces BN by a GroupNorm of its own, since BN has no gradients of single images.
_OPACUS = ("convert.enabled=false", "own.options={epsilon = 8.0, delta = 1e-3, norm = 'opacus'}")

JOBS: Mapping[str, Job] = {
    job.recipe: job
    for job in (
        Job("detection", "Detection, Faster R-CNN, batch 2", rates=(3e-4, 5e-4, 1e-3)),
        Job("segmentation", "Segmentation, DeepLabV3, batch 2", rates=(3e-4, 5e-4, 1e-3)),
        Job("volume", "Volumes, batch 1", source="volume_source", rates=(1e-3, 3e-3, 1e-2)),
        Job("video", "Videos, R3D-18, batch 2", source="video_source", rates=(3e-3, 1e-2, 3e-2)),
        Job("robot_policy", "Robot policy, batch 4", source="robot_policy_source", rates=(3e-4, 1e-3, 3e-3)),
        Job(
            "private",
            "Differential privacy, epsilon 8",
            source="digits_source",
            rates=(0.01, 0.03, 0.1),
            arms={"BN in training": _OPACUS},
            notes="Opacus cannot train BN: its arm is the GroupNorm that `ModuleValidator.fix` puts there.",
        ),
        Job("federated", "Four clients, batch 2", source="digits_source", rates=(0.003, 0.01, 0.03)),
        Job(
            "adaptation",
            "Adaptation at test time, batch 1, ten passes",
            source="digits_source",
            rates=(1e-5, 3e-5, 1e-4),
            notes="In evaluation after the passes: BN in training then has the running statistics of the stream.",
        ),
    )
}
