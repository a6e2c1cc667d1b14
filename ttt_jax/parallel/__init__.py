"""Makes the mesh, lays out parameters on it, and coordinates processes."""
