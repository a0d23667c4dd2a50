"""SN layers for the argument `norm_layer` of timm's models.

Many models of timm ask for the norm that belongs to a class and has an activation inside (`BatchNormAct2d` for
`BatchNorm2d`). timm looks it up in tables of its own; `timm_norm_layer` adds SN to them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from normswap.errors import ArgumentError
from normswap.layers.switch_norm import SwitchNorm2d, SwitchNormAct2d

_KEY = SwitchNorm2d.__name__.lower()  # as timm spells it


def timm_norm_layer(**options: Any) -> Callable[..., nn.Module]:
    """Return SN as the `norm_layer` of `timm.create_model`, for a network that is trained from its start.

    Layers have `gate="softmax"` and the statistics of the batch in training, as in the paper (Luo et al., ICLR 2019),
    unless `options` differ. Models whose norms have an activation inside get `SwitchNormAct` layers, so the names of
    tensors are those of the model with BN. Pass `normswap.param_groups(model, ...)` to the optimizer.

    The first call adds SN to timm's tables of norms. Afterwards `norm_layer="switchnorm2d"` also works, as in the
    `--model-kwargs` of timm's `train.py`.

    Args:
        options: arguments of `normswap.SwitchNorm2d`, such as `gate`, `branches`, `eps`.

    Returns:
        A function of the number of channels that returns a layer.

    Raises:
        ArgumentError: `SwitchNorm2d` has no such argument; this version of timm has other tables.
        LayerError: a value in `options` is unknown.

    Examples:
        >>> import normswap, timm, torch
        >>> model = timm.create_model("resnet10t", norm_layer=normswap.timm_norm_layer())
        >>> type(model.bn1)
        <class 'normswap.SwitchNorm2d'>
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 1000])
    """
    try:
        SwitchNorm2d(1, **options)  # refuses what no layer accepts, before timm builds anything
    except TypeError as error:
        raise ArgumentError(f"options: expected arguments of normswap.SwitchNorm2d, got {options}: {error}") from None
    _add_to_tables()
    return partial(SwitchNorm2d, **options)


def norm_act_layer(
    num_features: int,
    *args: Any,
    apply_act: bool = True,
    act_layer: Any = nn.ReLU,
    act_kwargs: dict[str, Any] | None = None,
    inplace: bool = True,
    drop_layer: Callable[[], nn.Module] | None = None,
    **options: Any,
) -> SwitchNormAct2d:
    """Return SN over (N, C, H, W) followed by an activation; the arguments are those of timm's `BatchNormAct2d`."""
    from timm.layers.create_act import create_act_layer

    act = create_act_layer(act_layer, **{"inplace": inplace, **(act_kwargs or {})}) if apply_act else None
    drop = drop_layer() if drop_layer is not None else None
    return SwitchNormAct2d(num_features, *args, act=act, drop=drop, **options)


def _add_to_tables() -> None:
    """Add SN to timm's tables of norms, of norms with an activation, and of those that take `act_layer`."""
    from timm.layers import create_norm, create_norm_act

    norm_act: Any = norm_act_layer  # the tables are annotated for classes, and contain functions too
    try:
        create_norm._NORM_MAP[_KEY] = SwitchNorm2d
        create_norm_act._NORM_ACT_MAP[_KEY] = norm_act
        create_norm_act._NORM_TO_NORM_ACT_MAP[_KEY] = norm_act
        create_norm_act._NORM_ACT_REQUIRES_ARG.add(norm_act)
    except AttributeError as error:
        raise ArgumentError(
            f"norm_layer: this version of timm has no table of norms ({error}): build the model with BN and call "
            'normswap.convert(model, gate="softmax", bn_statistics="batch")'
        ) from None
