"""What a search would run and need: the searcher and scheduler on simulated time, and the memory of a GPU."""
