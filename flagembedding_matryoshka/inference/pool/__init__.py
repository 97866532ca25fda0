"""Worker processes, one for each device."""
