"""Reading DICOM files without a word of what stands in them.

pydicom tells of a damaged element by printing its value, as a warning and to its log.
"""

from __future__ import annotations

import logging

from pydicom import config, dcmread

config.settings.reading_validation_mode = config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)

__all__ = ["dcmread"]
