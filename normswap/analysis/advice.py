"""Advice for a site and for a network, from what was measured on data.

The limits were chosen on two small networks, see `docs/measured/analysis.md`: a rough guide for others.
"""

from collections.abc import Sequence
from statistics import median
from typing import Literal

from normswap.analysis.batch_norms import BatchNormSite
from normswap.text import pluralize

Advice = Literal["leave", "freeze", "convert", "calibrate"]

# Median over sites of `noise` at which batches are too small for BN, and of `shift` at which the statistics do not fit
# the data.
NOISE_LIMIT = 0.17
SHIFT_LIMIT = 0.3


def advise_site(site: BatchNormSite) -> Advice:
    """Return what to do with one site."""
    if site.untrained:
        return "calibrate"
    return choose_advice(site.noise, site.shift, frozen=site.frozen)


def choose_advice(noise: float, shift: float, *, frozen: bool = False) -> Advice:
    """Return what to do with trained norms from their distances, as in `BatchNormSite`."""
    noisy, shifted = noise >= NOISE_LIMIT, shift >= SHIFT_LIMIT
    if frozen:
        return "convert" if shifted else "leave"
    if noisy:
        return "convert" if shifted else "freeze"
    return "calibrate" if shifted else "leave"


def advise_network(sites: Sequence[BatchNormSite], batch_size: int) -> str:
    """Return what to do with the network: a sentence on sites that were never trained and one on the others."""
    untrained = [site.fqn for site in sites if site.untrained]
    trained = [site for site in sites if not site.untrained]
    sentences = [_advise_untrained(untrained, everything=not trained)] if untrained else []
    if trained:
        noise, shift = (median(getattr(site, name) for site in trained) for name in ("noise", "shift"))
        frozen = all(site.frozen for site in trained)
        sentences.append(_advise_trained(noise, shift, batch_size, frozen=frozen))
    return " ".join(sentences)


def _advise_untrained(names: Sequence[str], *, everything: bool) -> str:
    only = "" if everything else f", only={[*names]}"
    return (
        f"Calibrate {pluralize(len(names), 'site')} whose statistics were never updated: "
        f"normswap.calibrate(model, batches{only})."
    )


def _advise_trained(noise: float, shift: float, batch_size: int, *, frozen: bool) -> str:
    fit = f"the running statistics {'do not fit' if shift >= SHIFT_LIMIT else 'fit'} this data"
    size = f"batches of {batch_size} are {'too small' if noise >= NOISE_LIMIT else 'large enough'} for batch statistics"
    reason = f"its norms are frozen, and {fit}" if frozen else f"{size}, and {fit}"
    match choose_advice(noise, shift, frozen=frozen):
        case "convert":
            return f"Convert it: {reason}: normswap.convert(model, x)."
        case "freeze":
            return f"Freeze it: {reason}: normswap.freeze_statistics(model)."
        case "calibrate":
            return (
                f"Train it as it is, or calibrate it to use it without training: {reason}: "
                "normswap.calibrate(model, batches)."
            )
        case _:
            return f"Leave it: {reason}."
