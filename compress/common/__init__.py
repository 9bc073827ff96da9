"""Used by all other packages: errors, files, the journal, the cache, memory, the machine."""
