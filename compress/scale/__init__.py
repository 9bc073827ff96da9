"""Work that is cut into units: a part of a corpus, a task. Done here one after the other, or by workers of Ray."""
