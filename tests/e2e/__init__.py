"""A real cluster, and one scenario on it; `python -m tests.e2e` keeps one to look at."""
