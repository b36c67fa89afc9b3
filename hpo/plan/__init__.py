"""What a search would run and take: the real searcher and scheduler on simulated time, and the memory of a GPU."""
