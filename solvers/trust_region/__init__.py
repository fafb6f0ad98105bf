"""Trust-region methods in several norms."""
