"""The entropy-coded form of compressed layers: exact integers in, few bytes out, and back. NumPy and constriction only.

What a file holds is what runs: everything here is lossless. Coarser integers are chosen before, by
`compress.rate_distortion`. ``docs/formats.md`` has the layout to the bit.
"""

from compress.codec.layer import LayerSpec
from compress.codec.network import (
    DEFAULT_MAX_WEIGHTS,
    PRESETS,
    decode_network,
    encode_network,
    open_network,
    section_sizes,
    state_size,
)

__all__ = [
    "DEFAULT_MAX_WEIGHTS",
    "PRESETS",
    "LayerSpec",
    "decode_network",
    "encode_network",
    "open_network",
    "section_sizes",
    "state_size",
]
