"""The figures of the report, drawn with matplotlib, which all modules here import."""
