"""The report of a study: one self-contained HTML page, its tables and its words."""
