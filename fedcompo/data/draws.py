"""Random draws of data: the classes of a client, its test images, its subset.

Each client derives its own share from the seed. So a draw must give the same result on every
machine and with every version of NumPy: it uses the legacy ``RandomState``, whose stream is frozen
(https://numpy.org/neps/nep-0019-rng-policy.html). Each purpose and class has a generator of its
own, so that the images drawn of one class do not depend on the other classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedcompo.data.catalogue import Catalogue
from fedcompo.errors import DataError
from fedcompo.seeds import derive_seed

Indices = NDArray[np.int64]
TEST_SHARE = 0.2
"""Share of each class that becomes test images where the source does not mark them."""


def frozen_generator(seed: int, *purpose: str) -> np.random.RandomState:
    """Return NumPy's generator for one draw.

    Args:
        seed: Seed of the run, >= 0.
        purpose: Words such as ``"split", "cat"``; each purpose has its own stream.
    """
    return np.random.RandomState(derive_seed(seed, "data", *purpose))


def draw_classes(names: Sequence[str], count: int, *, seed: int) -> tuple[str, ...]:
    """Permute the sorted names by seed and keep the first ``count``; 0: all.

    Example:
        >>> sorted(draw_classes(["cat", "dog", "emu"], 0, seed=7))
        ['cat', 'dog', 'emu']
    """
    order = frozen_generator(seed, "classes").permutation(len(names))
    drawn = tuple(sorted(names)[place] for place in order)
    return drawn[:count] if count else drawn


def deal_classes(
    names: Sequence[str], num_tasks: int, *, num_classes: int, seed: int, source: str
) -> list[tuple[str, ...]]:
    """Divide the classes into one group a client, of sizes as equal as possible.

    Args:
        names: Class names; their order does not matter.
        num_tasks: Groups to make.
        num_classes: Keep this many classes, drawn by seed, before dealing; 0: all.
        seed: Seed of the run.
        source: Where the classes come from, for messages.

    Returns:
        ``num_tasks`` groups, each sorted, whose sizes differ by at most one, larger ones first.

    Raises:
        DataError: If there are too few classes to keep, or to give each client one.
    """
    if num_classes > len(names):
        raise DataError(
            f"`num-classes` asks for {num_classes} classes, but {source} has {len(names)}. "
            f"Set `num-classes` to at most {len(names)}, or to 0 for all."
        )
    drawn = draw_classes(names, num_classes, seed=seed)
    if len(drawn) < num_tasks:
        kept = f" (`num-classes`), of {len(names)} in {source}" if num_classes else f" in {source}"
        raise DataError(
            f"{len(drawn)} classes{kept} are too few for {num_tasks} clients or tasks: each needs "
            f"one of its own. Set `num-tasks` to at most {len(drawn)}, or use more classes."
        )
    groups = np.array_split(np.arange(len(drawn)), num_tasks)
    return [tuple(sorted(drawn[place] for place in group)) for group in groups]


def split_members(members: Indices, *, share: float, draw: np.random.RandomState) -> list[Indices]:
    """Split the images of one class in two, at random, at least one image in each part.

    Args:
        members: Indices of the images, (count,) with count >= 2.
        share: Share of the second part, such as the test images, in (0, 1).
        draw: Generator of this draw.

    Returns:
        Indices of the first part and of the second, each in ascending order.
    """
    order = draw.permutation(members)
    taken = min(max(1, round(share * len(members))), len(members) - 1)
    return [np.sort(order[taken:]), np.sort(order[:taken])]


def split_class(catalogue: Catalogue, own: str, *, client: str, seed: int) -> list[Indices]:
    """Return indices of the training and of the test images of one class.

    Args:
        catalogue: The source; where it does not mark test images, :data:`TEST_SHARE` are drawn.
        own: Name of the class.
        client: Whose images they are, for messages; empty: of all.
        seed: Seed of the run.

    Raises:
        DataError: If there are no training images, or too few to draw test images.
    """
    members = np.flatnonzero(catalogue.classes == own)
    whose = f"Client {client!r}: class {own!r}" if client else f"Class {own!r}"
    if catalogue.is_test is None:
        if len(members) < 2:
            raise DataError(
                f"{whose} in {catalogue.source} has 1 image, "
                f"{catalogue.describe(int(members[0]))}. Test images must be drawn, so at least 2 "
                "are needed: add images, take the class out, or say which images are for testing.",
                told=f"class {own!r} has 1 image, and needs at least 2",
            )
        return split_members(members, share=TEST_SHARE, draw=frozen_generator(seed, "split", own))
    tests = catalogue.is_test[members]
    if tests.all():
        raise DataError(
            f"{whose} in {catalogue.source} has test images but no "
            "training images. Add training images, or take its test images out.",
            told=f"class {own!r} has test images but no training images",
        )
    return [members[~tests], members[tests]]


def cap_members(members: Indices, limit: int, *, draw: np.random.RandomState) -> Indices:
    """Keep at most ``limit`` images, drawn at random; 0: all.

    A smaller limit keeps a subset of what a larger one keeps.

    Args:
        members: Indices of the images, (count,).
        limit: Images to keep.
        draw: Generator of this draw.

    Returns:
        (min(count, limit),) indices in ascending order.
    """
    return np.sort(draw.permutation(members)[:limit]) if limit else members
