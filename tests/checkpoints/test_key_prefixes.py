"""Prefixes of wrappers: found, removed from keys, added to new keys."""

import pytest

from normswap.checkpoints.content.key_prefixes import find_prefixes, match_names, names_with_prefix

OWN = ["conv.weight", "bn.weight", "bn.running_mean", "layer1.0.bn.weight"]


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.model.", "net.module.net.", "backbone."]
)
def test_names_come_off_and_go_back(prefix: str) -> None:
    keys = [prefix + name for name in OWN]
    names = match_names(keys, OWN)
    assert (names.prefix, names.foreign) == (prefix if prefix != "_orig_mod." else "", ())
    assert list(names.stored) == OWN
    assert list(names.stored.values()) == keys
    assert names.stored_key("bn.mean_weight") == f"{prefix}bn.mean_weight"
    assert names.stored_key("layer1.0.bn.mean_weight") == f"{prefix}layer1.0.bn.mean_weight"


def test_a_model_whose_own_names_look_like_wrappers_keeps_them() -> None:
    own = ["model.bn.weight", "model.conv.weight", "head.weight"]
    assert match_names(own, own).prefix == ""
    assert match_names([f"module.{name}" for name in own], own).prefix == "module."


def test_what_follows_the_prefix_is_foreign() -> None:
    keys = ["n_averaged", *(f"module.{name}" for name in OWN)]
    names = match_names(keys, OWN)
    assert (names.prefix, names.foreign) == ("module.", ("n_averaged",))


def test_what_does_not_fit_stays_to_be_reported() -> None:
    names = match_names(["conv.weight", "stranger"], OWN)
    assert list(names.stored) == ["conv.weight", "stranger"]


def test_compiled_parts_inside_a_model() -> None:
    names = names_with_prefix(["layer1._orig_mod.0.bn.weight", "bn._orig_mod.running_mean"], "")
    assert list(names.stored) == ["layer1.0.bn.weight", "bn.running_mean"]
    assert names.stored_key("layer1.0.bn.mean_weight") == "layer1._orig_mod.0.bn.mean_weight"
    assert names.stored_key("bn.mean_weight") == "bn._orig_mod.mean_weight"


def test_a_module_without_tensors_of_its_own_is_placed_by_its_surroundings() -> None:
    names = match_names([f"module.{name}" for name in OWN], OWN)
    assert names.stored_key("layer1.0.bn.norm_1.mean_weight") == "module.layer1.0.bn.norm_1.mean_weight"
    assert names.stored_key("elsewhere.mean_weight") == "module.elsewhere.mean_weight"


def test_prefixes_are_reported_shortest_first() -> None:
    assert find_prefixes(["module.model.a", "module.b", "c"]) == ["", "module.", "module.model."]
