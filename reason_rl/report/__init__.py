"""What a run writes down and shows: log files, terminal, page."""
