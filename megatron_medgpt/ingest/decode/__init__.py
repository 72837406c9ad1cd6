"""One file to pictures fit for a shard: DICOM and NIfTI windowed to 8 bits once, JPEG and PNG checked and stripped.

``decode`` takes bytes, ``decode_slide`` takes the path of a whole slide (they are too large to be read at once).
"""

from megatron_medgpt.ingest.decode.options import CT_WINDOWS_HU, DecodeOptions, picked
from megatron_medgpt.ingest.decode.pictures import Decoded, decode
from megatron_medgpt.ingest.decode.slide import decode_slide, is_slide_name

__all__ = ["CT_WINDOWS_HU", "DecodeOptions", "Decoded", "decode", "decode_slide", "is_slide_name", "picked"]
