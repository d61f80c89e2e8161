"""Step: what every method gets and gives, and the bundle that it leaves on disk.

The bundle of every step holds its ONNX file, also that of a torch step: cost is only ever measured through the export.
"""
