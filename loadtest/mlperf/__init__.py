"""MLPerf: the four scenarios of MLPerf Inference, and their log.

The figures are computed from our result file, not by LoadGen: it keeps its state in the process and sends from
callbacks in Python, which cost more than our sender does. Its formulas are short, and a test holds ours against it.
"""
