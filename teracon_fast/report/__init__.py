"""The results of a run as tables, plots and a page."""
