"""Whether a model gives the vectors that it should, and if not why: `compress doctor`. One file a step; `diagnose` is the door."""
