"""Digests of images, by which two images are told to be the same."""

import hashlib

# So many bytes of a sha256 that two images of any dataset share them only if they are the same.
DIGEST_BYTES = 16


def image_digest(encoded: bytes) -> bytes:
    """Return the digest of an image: the first DIGEST_BYTES bytes of the sha256 of its encoded file."""
    return hashlib.sha256(encoded).digest()[:DIGEST_BYTES]
