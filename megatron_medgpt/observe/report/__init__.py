"""The report of a run: one static HTML file that needs no network. ``write_report`` is the door."""

from megatron_medgpt.observe.report.page import write_report

__all__ = ["write_report"]
