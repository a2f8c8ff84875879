"""Everything that a run writes down or shows: its log files, the terminal view and the report page."""
