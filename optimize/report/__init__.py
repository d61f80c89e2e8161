"""Report: the proof page and the tables, written from run documents."""
