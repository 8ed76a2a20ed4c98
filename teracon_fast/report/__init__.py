"""What a run has found, as tables, pictures and a page."""
