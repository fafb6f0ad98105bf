"""Networks, and their derivatives with respect to their inputs."""
