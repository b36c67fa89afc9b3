"""Plans a search before it runs: how long it takes, and how much disk and GPU memory it needs.

simulator.py runs the real searcher and scheduler in simulated time. plan.py prints the plan. memory.py forecasts the
memory of a GPU. budget.py says whether one more trial fits into a budget. pace.py computes hours from the times that a
--check has measured.
"""
