"""Methods whose steps come from solvers on subdomains."""
