"""Seeds that follow from the place in a run, so that no random state is kept."""

import hashlib


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from any mixture of numbers and names."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
