"""Where work runs on a cluster: node labels, and waiting for free resources."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from alit.errors import AlitError


def await_room(wanted: Sequence[tuple[Mapping[str, float], Mapping[str, str]]], patience: float) -> None:
    """Waits until a cluster that was joined has room for all of it at once, which makes an autoscaler bring nodes.

    Args:
        wanted: bundles of resources, as Ray counts them, each with the labels of the node on which it lies.
        patience: in seconds.

    Raises:
        AlitError: there is still no room.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    if not os.environ.get("RAY_ADDRESS"):
        return
    bundles = [dict(bundle) for bundle, _ in wanted]
    labels = [dict(labels) for _, labels in wanted]
    selectors: Any = labels if any(labels) else None
    group = placement_group(bundles, bundle_label_selector=selectors)
    try:
        if group.wait(2):
            return
        words = [
            "(" + ", ".join(f"{amount:g} {name}" for name, amount in bundle.items()) + ")"
            + "".join(f" on {key}={value}" for key, value in where.items())
            for bundle, where in wanted
        ]  # fmt: skip
        asked = " and ".join(f"{words.count(each)} x {each}" for each in dict.fromkeys(words))
        print(f"waiting up to {patience:g} s for the cluster to have room for {asked}", file=sys.stderr)
        if not group.wait(patience):
            there = ray.cluster_resources()
            names = dict.fromkeys(name for bundle in bundles for name in bundle)
            has = ", ".join(f"{there.get(name, 0):g} {name}" for name in names)
            raise AlitError(
                f"the cluster has no room for {asked} after {patience:g} s; its nodes have {has} together, in use or "
                "not. Ask for less, add nodes, or wait longer with --patience"
            )
    finally:
        remove_placement_group(group)


def labels(option: str, given: Sequence[str]) -> dict[str, str]:
    """Ray's label selector from `key=value` texts; a value may be negated, as in `tier=!gpu`.

    Raises:
        AlitError: one of them is written otherwise.
    """
    pairs = [text.partition("=") for text in given]
    if wrong := [text for text, (key, _, value) in zip(given, pairs, strict=True) if not (key and value)]:
        raise AlitError(f"{option} takes labels such as tier=gpu, got {wrong[0]!r}")
    return {key: value for key, _, value in pairs}
