"""One image, one question, one answer of an exported model: ``medgpt chat`` and its local page."""
