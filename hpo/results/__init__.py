"""What a run writes to its folder, and how it is shown: tables, log lines, slot time, trackers, figures, report."""
