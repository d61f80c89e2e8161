"""MLPerf: the four scenarios of MLPerf Inference, and their log."""
