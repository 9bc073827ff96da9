"""How close two models' vectors are, and how vectors can be stored."""
