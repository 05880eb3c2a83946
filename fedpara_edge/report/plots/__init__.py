"""Figures of the report. All modules here import matplotlib."""
