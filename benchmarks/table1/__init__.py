"""The results table of the ScaLLA paper (arXiv 2601.21835), every row in this library or beside it; see `run.py`."""
