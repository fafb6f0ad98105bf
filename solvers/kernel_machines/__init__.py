"""Linear systems of kernel machines: PETSc's KSP, and preconditioners by subdomains of the samples."""
