"""Which variant an id gets: a slot of 10,000, and variants that take slots in the order in which they are declared.

When a variant grows, only the ids at its edge move. Pure.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from hashlib import blake2b

SLOTS = 10_000


def slot_of(name: str, id: str) -> int:
    """The slot of an id, for the virtual model `name`."""
    digest = blake2b(f"{name}\0{id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % SLOTS


def variant_of(slot: int, weights: Mapping[str, float], is_out: Callable[[str], bool] = lambda name: False) -> str:
    """The variant of a slot. The slots of one that is out go to the others by the same rule, and no other slot moves.

    If all are out, it is the one that it would be if none were.
    """
    left = tuple(weights.items())
    while any(weight for _, weight in left):
        chosen = next(name for end, name in ends(left) if slot < end)
        if not is_out(chosen):
            return chosen
        left = tuple((name, weight) for name, weight in left if name != chosen)
    return next(name for end, name in ends(tuple(weights.items())) if slot < end)


@lru_cache(4096)
def ends(weights: tuple[tuple[str, float], ...]) -> tuple[tuple[int, str], ...]:
    """(end, variant), in order: a variant has the slots before its end, from the end of the one before."""
    total, sum_so_far, found = sum(weight for _, weight in weights), 0.0, []
    for name, weight in weights:
        sum_so_far += weight
        found.append((round(SLOTS * sum_so_far / total), name))
    return tuple(found)
