"""Seeds that are derived from the position in a run, so that no random state has to be saved."""

import hashlib


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed: a hash of any numbers and names."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
