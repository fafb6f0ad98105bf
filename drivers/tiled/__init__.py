"""Classifiers of divided images: local networks on tiles, trained side by side, and what joins them."""
