"""What users have, as one normal form: a record with images and the turns of a dialogue.

Shapes (``--format``): ``llava`` (conversations, also under the misspelt key of LLaVA-Med's alignment file),
``messages`` (chat), ``caption`` (image and text), ``vqa`` (image, question, answer), ``mcq`` (with options), ``dicom``
(texts by SOP or study UID beside a tree of files). They may come in tables (JSON, JSONL, CSV, TSV, parquet), WebDataset
tars, Energon folders, or as a bare folder of pictures and texts; local or behind an fsspec URL. A record that cannot be
used carries the reason; it is never left out silently.

In the order of the data: ``place`` (bytes), ``archive``, ``energon``, ``folder`` and ``ingest.tables`` (rows),
``columns`` (what is what), ``rows`` (images and turns), ``record`` (checks), ``source`` (all of it).
"""

from megatron_medgpt.ingest.sources.columns import FIELDS, FORMATS
from megatron_medgpt.ingest.sources.record import Image, Inline, Record, RecordError
from megatron_medgpt.ingest.sources.source import Source, open_source

__all__ = ["FIELDS", "FORMATS", "Image", "Inline", "Record", "RecordError", "Source", "open_source"]
