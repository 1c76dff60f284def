"""The report: one self-contained page of a run or a study, and the plots of an alignment."""
