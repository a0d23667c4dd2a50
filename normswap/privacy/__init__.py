"""Differentially private training of converted networks with Opacus. Importing this package registers the SN layers.

Opacus computes the gradient of every sample, shortens it, and adds noise. This needs layers in which samples do not
share statistics: SN layers whose `bn` branch uses running statistics, or that have no such branch.
"""

from normswap.privacy import sample_gradients as _sample_gradients  # registers
from normswap.privacy import validation as _validation  # registers
from normswap.privacy.preparation import prepare as prepare
from normswap.privacy.preparation import restore as restore

del _sample_gradients, _validation
