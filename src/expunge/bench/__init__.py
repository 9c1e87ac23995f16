"""Measurements that are too long for tests: each writes JSON, a Markdown table or a plot, and resumes cell by cell."""
