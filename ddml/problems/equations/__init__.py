"""Our equations, and their reference solutions."""
