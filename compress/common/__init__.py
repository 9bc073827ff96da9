"""What every room may use: errors, files, the journal, the cache, memory, the machine."""
