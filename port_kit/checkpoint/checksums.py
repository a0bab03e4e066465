"""CRC-32, as zip directories state it."""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32
except ImportError:  # setup.cfg asks for isal where it is built for; zlib gives the same values, at a tenth of the rate
    from zlib import crc32

__all__ = ["crc32"]
