"""The mesh, where parameters lie on it, and many processes."""
