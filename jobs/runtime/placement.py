"""Placement of work on a cluster: node labels, and waiting for free resources."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from alit.errors import AlitError


def wait_for_resources(bundles: Sequence[tuple[Mapping[str, float], Mapping[str, str]]], patience: float) -> None:
    """Waits until a joined cluster has room for all bundles at once; an autoscaler adds nodes for them meanwhile.

    Returns at once where Ray runs on this machine alone.

    Args:
        bundles: Ray resource requirements, each with the label selector of the node to place it on.
        patience: Timeout in seconds.

    Raises:
        AlitError: The cluster still has no room.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    if not os.environ.get("RAY_ADDRESS"):
        return
    amounts = [dict(bundle) for bundle, _ in bundles]
    labels = [dict(selector) for _, selector in bundles]
    selectors: Any = labels if any(labels) else None
    group = placement_group(amounts, bundle_label_selector=selectors)
    try:
        if group.wait(2):
            return
        descriptions = [
            "(" + ", ".join(f"{amount:g} {name}" for name, amount in bundle.items()) + ")"
            + "".join(f" on {key}={value}" for key, value in selector.items())
            for bundle, selector in bundles
        ]  # fmt: skip
        request = " and ".join(f"{descriptions.count(each)} x {each}" for each in dict.fromkeys(descriptions))
        print(f"waiting up to {patience:g} s for the cluster to have room for {request}", file=sys.stderr)
        if not group.wait(patience):
            totals = ray.cluster_resources()
            names = dict.fromkeys(name for bundle in amounts for name in bundle)
            total = ", ".join(f"{totals.get(name, 0):g} {name}" for name in names)
            raise AlitError(
                f"the cluster has no room for {request} after {patience:g} s; its nodes have a total of {total}, in "
                "use or free. Request less, add nodes, or wait longer with --patience"
            )
    finally:
        remove_placement_group(group)


def parse_labels(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Parses `key=value` texts into a Ray label selector; a value may be negated, as in `tier=!gpu`.

    Args:
        option: The command-line option, for the error message.
        texts: The option's values.

    Raises:
        AlitError: A text is not of the form `key=value`.
    """
    pairs = [text.partition("=") for text in texts]
    if malformed := [text for text, (key, _, value) in zip(texts, pairs, strict=True) if not (key and value)]:
        raise AlitError(f"{option} takes labels such as tier=gpu, got {malformed[0]!r}")
    return {key: value for key, _, value in pairs}
