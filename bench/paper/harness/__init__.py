"""Runs experiments, keeps their results, and writes tables, figures and the page."""
