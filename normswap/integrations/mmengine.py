"""SN in mmengine's registry of models, as `SN1d`, `SN2d` (also `SN`) and `SN3d`. Importing this module registers them.

A config imports it: `custom_imports = dict(imports=["normswap.integrations.mmengine"])`. Its networks then take
`norm_cfg=dict(type="SN")`, with arguments of `normswap.SwitchNorm2d` such as `gate` and `branches`.
"""

from mmengine.registry import MODELS

from normswap.layers.switch_norm import SwitchNorm1d, SwitchNorm2d, SwitchNorm3d

NORMS = {"SN": SwitchNorm2d, "SN1d": SwitchNorm1d, "SN2d": SwitchNorm2d, "SN3d": SwitchNorm3d}

for _name, _layer in NORMS.items():
    MODELS.register_module(name=_name, module=_layer, force=True)
