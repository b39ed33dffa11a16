"""Reports for people: what was captured, what fired, what was refused, what was proved."""

from lensfx.report.report import Report

__all__ = ["Report"]
