"""Training on several levels: cycles over networks of different depth, or over nested sets of samples."""
