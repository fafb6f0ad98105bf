"""Which samples an objective has when."""
