"""Record: what a result file holds, its lines read and written, and the figures that are read from them."""
